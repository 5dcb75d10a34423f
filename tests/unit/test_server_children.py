"""Children that die, linger, never become ready or say too much: small Python programs under the real keeper."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from extproc.server.children import Child, ChildFailedError
from tests.gateway import wait_for

READY = "print('ready', flush=True)\n"
WAIT = "import time\ntime.sleep(60)\n"
Making = Callable[..., Child]


@pytest.fixture
async def make() -> AsyncIterator[Making]:
    """Makes children that run the given program and are ended with the test."""
    made: list[Child] = []

    def child(program: str, lines: list[bytes] | None = None, **options: object) -> Child:
        seen = [] if lines is None else lines
        wanted = {"is_ready_line": lambda line: line == b"ready\n", **options}
        made.append(Child("the child", (sys.executable, "-c", program), dict(os.environ), seen.append, **wanted))  # type: ignore[arg-type]
        return made[-1]

    yield child
    for each in made:
        await each.end(5)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    await asyncio.to_thread(wait_for, condition, timeout_s, what)


async def test_it_has_started_when_it_says_so_and_its_other_lines_are_passed_on(make: Making) -> None:
    lines: list[bytes] = []
    child = make(f"print('before', flush=True)\n{READY}print('after', flush=True)\n{WAIT}", lines)
    await child.start(10)
    assert child.alive
    assert child.ready.is_set()
    await until(lambda: lines == [b"before\n", b"after\n"], "both lines")


async def test_one_without_a_ready_line_is_ready_when_its_probe_is_and_anew_after_each_death(make: Making) -> None:
    may_be_ready = asyncio.Event()
    child = make(WAIT, is_ready_line=None, until_ready=may_be_ready.wait)
    with pytest.raises(ChildFailedError, match="not ready after"):
        await child.start(0.2)
    may_be_ready.set()
    await asyncio.wait_for(child.ready.wait(), 5)
    may_be_ready.clear()
    os.kill(child.pid or 0, signal.SIGKILL)
    await until(lambda: child.restarts == 1, "its restart")
    assert not child.ready.is_set()
    may_be_ready.set()
    await asyncio.wait_for(child.ready.wait(), 5)


async def test_one_that_ends_before_it_is_ready_is_a_failure_with_its_code(make: Making) -> None:
    with pytest.raises(ChildFailedError, match="the child ended with 3 before it was ready"):
        await make("raise SystemExit(3)").start(10)


async def test_one_that_can_not_be_run_is_a_failure_with_its_reason() -> None:
    child = Child("Envoy", ("/nowhere/envoy",), {}, lambda _: None)
    with pytest.raises(ChildFailedError, match=r"Envoy can not be run: No such file or directory"):
        await child.start(5)
    await child.end(1)


async def test_a_killed_one_is_replaced_and_becomes_ready_again(make: Making) -> None:
    child = make(READY + WAIT)
    await child.start(10)
    first = child.pid
    os.kill(first or 0, signal.SIGKILL)
    await until(lambda: child.pid not in (None, first) and child.ready.is_set(), "its replacement")
    assert child.restarts == 1


async def test_one_that_dies_at_once_is_started_ever_more_slowly(make: Making, tmp_path: Path) -> None:
    log = tmp_path / "starts"
    program = f"import time, sys\nwith open({str(log)!r}, 'a') as log: log.write(f'{{time.time()}}\\n')\n{READY}"
    await make(program).start(10)
    await until(lambda: len(log.read_text().splitlines()) >= 5, "five starts", 20)
    starts = [float(line) for line in log.read_text().splitlines()[:5]]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert pauses[3] > pauses[0] + 0.3
    assert pauses[3] >= 0.8


async def test_ending_one_that_waits_to_be_started_again_starts_it_no_more(make: Making, tmp_path: Path) -> None:
    log = tmp_path / "starts"
    program = f"with open({str(log)!r}, 'a') as log: log.write('x')\n{READY}"
    child = make(program)
    await child.start(10)
    await until(lambda: child.restarts >= 2 and not child.alive, "a pause between two starts")
    await child.end(5)
    starts = log.read_text()
    await asyncio.sleep(1)
    assert log.read_text() == starts


async def test_one_that_ignores_sigterm_is_killed(make: Making) -> None:
    child = make(f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{READY}{WAIT}")
    await child.start(10)
    began = asyncio.get_running_loop().time()
    await child.end(0.3)
    assert not child.alive
    assert asyncio.get_running_loop().time() - began < 5
    assert child.restarts == 0


async def test_what_it_says_while_it_ends_is_still_read(make: Making) -> None:
    lines: list[bytes] = []
    said = "signal.signal(signal.SIGTERM, lambda *_: (print('last words', flush=True), sys.exit()))"
    child = make(f"import signal, sys\n{said}\n{READY}{WAIT}", lines)
    await child.start(10)
    await child.end(5)
    assert lines == [b"last words\n"]


async def test_a_line_without_end_is_dropped_and_those_behind_it_are_read(make: Making) -> None:
    lines: list[bytes] = []
    child = make(f"{READY}print('x' * 200_000, flush=True)\nprint('next', flush=True)\n{WAIT}", lines)
    await child.start(10)
    await until(lambda: b"next\n" in lines, "the line behind the long one")


async def test_a_reader_of_lines_that_fails_does_not_end_the_keeping(make: Making) -> None:
    child = make(f"{READY}print('x', flush=True)\n{WAIT}")
    child.on_line = _failing
    await child.start(10)
    await asyncio.sleep(0.2)
    os.kill(child.pid or 0, signal.SIGKILL)
    await until(lambda: child.restarts == 1 and child.ready.is_set(), "its replacement")


def _failing(_: bytes) -> None:
    raise ValueError("a line that can not be shown")


async def test_it_is_in_a_session_of_its_own_so_that_ctrl_c_reaches_the_supervisor_alone(make: Making) -> None:
    child = make(READY + WAIT)
    await child.start(10)
    assert os.getsid(child.pid or 0) == child.pid != os.getsid(0)


LIFELINE = """
import asyncio
from extproc.demo import lifeline

async def main():
    stop = asyncio.Event()
    lifeline.watch(stop.set)
    print("ready", flush=True)
    await stop.wait()
    print("alone", flush=True)

asyncio.run(main())
"""


async def test_a_child_hears_of_its_starters_death_however_it_died(tmp_path: Path) -> None:
    """The starter is a process of its own, killed; what its child says then goes to a file."""
    heard = tmp_path / "heard"
    starter = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {LIFELINE!r}],"
        f" stdin=subprocess.PIPE, stdout=open({str(heard)!r}, 'w'))\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter]) as process:
        await until(lambda: heard.exists() and heard.read_text() == "ready\n", "the child to be ready")
        process.kill()
        await until(lambda: heard.read_text() == "ready\nalone\n", "the child to notice")


async def test_the_demo_provider_logs_nothing_when_a_client_hangs_up_in_a_stream(tmp_path: Path) -> None:
    socket = tmp_path / "demo.sock"
    command = [sys.executable, "-m", "extproc.demo", "--socket", str(socket), "--token-delay-ms", "10"]
    asked: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
        "completions": {"prompt": "Hi"},
        "responses": {"input": "Hi"},
        "messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50},
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        await until(socket.exists, "the demo provider")
        transport = httpx.AsyncHTTPTransport(uds=str(socket), retries=20)
        async with httpx.AsyncClient(transport=transport, base_url="http://demo") as client:
            for path, body in asked.items():
                async with client.stream("POST", f"/v1/{path}", json={"model": "m", "stream": True, **body}) as answer:
                    assert answer.status_code == 200
                    await anext(_chunks(answer))
        await asyncio.sleep(0.3)  # for it to write to those who have gone
        process.terminate()
        output, _ = await asyncio.to_thread(process.communicate, timeout=10)
    assert (process.returncode, output) == (0, b"ready\n")


async def _chunks(answer: httpx.Response) -> AsyncIterator[bytes]:
    async for chunk in answer.aiter_raw():
        yield chunk
