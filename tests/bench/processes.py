"""What processes cost: CPU and memory, by the part they play (Envoy, the workers, the supervisor).

Used by `targets`. The surprising thing: on Linux CPU comes from each thread's schedstat, which counts nanoseconds;
/proc/PID/stat counts ticks of 10 ms, a tenth of what a short round takes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from tests.bench.load import Result, Run, encode

ENVOY, WORKER, SUPERVISOR = "Envoy", "worker", "supervisor"
_WANTED_FILES = 16_384


def cpu_s(pids: Sequence[int]) -> float:
    """CPU that the processes used since they started, all threads that still run. Seconds."""
    return sum(_cpu_s(pid) for pid in pids)


def _cpu_s(pid: int) -> float:
    tasks = list(Path(f"/proc/{pid}/task").glob("*/schedstat"))
    if tasks:
        spent_ns = 0
        for task in tasks:
            with suppress(OSError):  # a thread that has just ended
                spent_ns += int(task.read_text().split()[0])
        return spent_ns / 1e9
    with suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def rss_bytes(pids: Sequence[int]) -> int:
    """Resident memory. Pages that forked workers share are counted in each."""
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total


def roles_of_gateway(supervisor_pid: int) -> dict[str, list[int]]:
    """All processes of `extproc run`, by their part."""
    roles: dict[str, list[int]] = {ENVOY: [], WORKER: [], SUPERVISOR: [supervisor_pid]}
    for child in psutil.Process(supervisor_pid).children(recursive=True):
        with suppress(psutil.Error):
            command = child.cmdline()
            is_envoy = bool(command) and Path(command[0]).name == "envoy"
            roles[ENVOY if is_envoy else WORKER].append(child.pid)
    return roles


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def allow_many_files() -> None:
    """Idle streams need two descriptors each in Envoy; children inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes], timeout_s: float = 10.0) -> None:
    """SIGTERM, and SIGKILL after `timeout_s`; this one process."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Helper:
    """One of the bench's own processes, spoken to in lines. It ends when its standard input does."""

    def __init__(self, module: str, environ: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            end(self._process)

    def read(self) -> str:
        """The next line that it prints. Raises RuntimeError where it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the bench ended before its time")
        return line

    def write(self, line: str) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()


class UpstreamProcess(Helper):
    """The fast upstream, on `port`."""

    def __init__(self) -> None:
        super().__init__("tests.bench.upstream")
        self.port = int(self.read())


class LoadProcess(Helper):
    """The load generator."""

    def __init__(self) -> None:
        super().__init__("tests.bench.load")

    def run(self, run: Run) -> Result:
        """Carry out `run` and wait for its end."""
        self.write(encode(run))
        return Result(**json.loads(self.read()))
