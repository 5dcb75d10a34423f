"""`extproc run`: Envoy, the workers and the demo provider as one program, from one file.

Above the request path: it starts what the path is made of, keeps it alive, reloads it, answers the admin port and shows
what passes. The surprising thing: it is the only process that ever reads a provider's secret, and it hands it to nobody
but Envoy.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import aiohttp

from extproc.config.snapshot import Snapshot
from extproc.render.deployment import Deployment, system_ca_bundle
from extproc.server.admin import Metrics, serve_admin
from extproc.server.board import Board
from extproc.server.children import Child
from extproc.server.envoy_admin import EnvoyAdmin, check_port_free
from extproc.server.envoy_folder import ConfigRejectedError, EnvoyFolder
from extproc.server.journals import Journals, files_in
from extproc.server.reload import BadConfigError, Loaded, Reloader
from extproc.server.screen import Screen
from extproc.server.watch import passed_of
from extproc.server.workers import WITHHELD, names_file

_START_TIMEOUT_S = 30.0
_DRAIN_S = 25.0
_DRAIN_LISTENER_S = 600
"""How long connections of a listener that a reload has replaced may go on."""
_END_TIMEOUT_S = 5.0
_WORKERS_END_TIMEOUT_S = 14.0
_RELOAD_TIMEOUT_S = 5.0
_RECONCILE_TIMEOUT_S = 60.0
_LAST_RECONCILE_TIMEOUT_S = 5.0
"""At the end of a run; what is not settled by then is left to the next."""
_JOURNAL_EVERY_S = 2.0
_POOL_ANSWERS = frozenset(("reloaded", "not-reloaded", "reconciled", "not-reconciled"))
_LAST_RECORDS_S = 0.5
"""Envoy sends its last access-log entries within its flush interval (0.1 s)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Size:
    """How many worker processes decide, and how many threads Envoy has."""

    workers: int
    envoy_threads: int


class Supervisor:
    """Runs one file until SIGTERM or SIGINT; SIGHUP reloads it."""

    def __init__(self, file: Path, first: Loaded, environ: Mapping[str, str], screen: Screen, size: Size) -> None:
        self._file = file
        self._environ = environ
        self._screen = screen
        self._size = size
        self._metrics = Metrics()
        self._children: list[Child] = []
        self._pool: Child | None = None
        self._workers: dict[int, tuple[int, int]] = {}
        self._pool_answer: asyncio.Future[str] | None = None
        self._asking = asyncio.Lock()
        self._suspect = False
        """A worker has died, or Envoy has dropped records, since the journal was last put before the ledger."""
        self._dropped = 0
        self._reloader = Reloader(file, first, environ, self._apply)
        self._state: Literal["starting", "serving", "draining"] = "starting"

    @property
    def _snapshot(self) -> Snapshot:
        return self._reloader.loaded.snapshot

    # What the admin port tells

    def problems(self) -> list[str]:
        """See `admin.Health`."""
        if self._state != "serving":
            return [self._state]
        return [
            f"{child.name} is not running" for child in self._children if not (child.alive and child.ready.is_set())
        ]

    def status(self) -> dict[str, object]:
        """See `admin.Health`."""
        return {
            "config": {
                "revision": self._snapshot.revision,
                "reloads": self._reloader.reloads,
                "last_error": self._reloader.last_error or None,
            },
            "workers": [
                {"number": number, "process": pid, "restarts": restarts}
                for number, (pid, restarts) in sorted(self._workers.items())
            ],
            "providers": [
                {**told, "cooling_s": round(max(0.0, self._board.until(str(told["name"])) - time.time()), 1)}
                for told in self._metrics.providers(self._snapshot.providers)
            ],
        }

    # From start to end

    async def run(self) -> None:
        """Start all, wait for the signal, drain, end all. Raises ChildFailedError or OSError where a part can not."""
        os.umask(0o077)  # what a gateway writes (ledger, journal, sockets) is its owner's alone
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for wanted in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(wanted, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reloader.ask)
        check_port_free(self._snapshot.listen)
        async with AsyncExitStack() as stack:
            run_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="extproc-", ignore_cleanup_errors=True))
            self._journals = Journals(self._snapshot.folder)
            self._deployment = Deployment(
                PurePosixPath(run_dir),
                PurePosixPath(system_ca_bundle()),
                self._size.workers,
                journal=self._journals.file,
            )
            self._board = Board(Path(self._deployment.board))
            self._board.know(self._snapshot.providers)
            self._folder = EnvoyFolder(self._deployment)
            self._folder.write(self._snapshot, self._reloader.loaded.secrets)
            stack.push_async_callback(await serve_admin(self._snapshot.admin, self, self._metrics))
            stack.push_async_callback(self._end_all)
            await self._start_all()
            self._state = "serving"
            self._screen.welcome(self._snapshot)
            beside = [asyncio.create_task(self._show_reloads()), asyncio.create_task(self._keep_journal())]
            await stop.wait()
            for task in beside:
                task.cancel()
            self._state = "draining"
            self._screen.note("ending: open requests may finish")
            await self._envoy_admin.drain(_DRAIN_S)
            await asyncio.sleep(_LAST_RECORDS_S)
            await self._look_for_dropped()
            if not self._suspect or await self._settle(_LAST_RECONCILE_TIMEOUT_S):
                stack.callback(self._journals.close)

    async def _start_all(self) -> None:
        await self._start_demo(self._snapshot)
        self._pool = self._workers_child(self._copy(self._reloader.loaded))
        await self._start(self._pool)
        self._envoy_admin = EnvoyAdmin(Path(self._deployment.admin_socket))
        await self._start(self._envoy(self._envoy_admin))

    async def _start(self, child: Child) -> None:
        self._children.append(child)
        await child.start(_START_TIMEOUT_S)

    async def _end_all(self) -> None:
        for child in reversed(self._children):
            await child.end(_WORKERS_END_TIMEOUT_S if child is self._pool else _END_TIMEOUT_S)

    # Reloads

    async def _show_reloads(self) -> None:
        async for line in self._reloader.outcomes():
            self._screen.note(line)

    async def _apply(self, loaded: Loaded, before: tuple[Snapshot, ...]) -> None:
        """See `reload.Apply`."""
        if loaded.snapshot.listen != self._snapshot.listen:
            try:
                check_port_free(loaded.snapshot.listen)
            except OSError as error:
                raise BadConfigError(str(error)) from None
        await self._start_demo(loaded.snapshot)
        await self._folder.replace(loaded.snapshot, loaded.secrets, self._envoy_admin, also=before)
        copy = self._copy(loaded)
        self._board.know(loaded.snapshot.providers)
        answer = await self._ask_pool(f"reload {copy}", _RELOAD_TIMEOUT_S)
        if answer != f"reloaded {loaded.snapshot.revision}":
            raise ConfigRejectedError(f"the workers did not take this configuration: {answer}")
        if self._pool is not None:
            self._pool.command = self._workers_command(copy)

    async def _ask_pool(self, command: str, timeout_s: float) -> str:
        """One question at a time."""
        pool = self._pool
        assert pool is not None  # noqa: S101  (nothing is asked before all has started)
        async with self._asking:
            self._pool_answer = asyncio.get_running_loop().create_future()
            try:
                pool.send(f"{command}\n".encode())
                return await asyncio.wait_for(self._pool_answer, timeout_s)
            except (TimeoutError, OSError):
                return "no answer"
            finally:
                self._pool_answer = None

    # The journal

    async def _keep_journal(self) -> None:
        """Settle what earlier runs left, what a dead worker may have lost, and what has grown too large."""
        for folder in self._journals.left_behind():
            if await self._reconcile(files_in(folder)):
                shutil.rmtree(folder, ignore_errors=True)
        while True:
            await asyncio.sleep(_JOURNAL_EVERY_S)
            try:
                await self._keep_own_journal()
            except (aiohttp.ClientError, OSError) as error:
                _log.warning("the journal is looked at again later: %s", error)  # Envoy is being started again, say

    async def _keep_own_journal(self) -> None:
        await self._look_for_dropped()
        if self._journals.put_aside() is not None:
            await self._envoy_admin.reopen_logs()
            await asyncio.sleep(_LAST_RECORDS_S)
        if not self._suspect or await self._settle(_RECONCILE_TIMEOUT_S):
            self._journals.remove_aside()

    async def _settle(self, timeout_s: float) -> bool:
        """Put all that this run has written before the ledger.

        What dies meanwhile makes it suspect again, and so does an end in the middle: nothing unsettled is removed.
        """
        self._suspect = False
        settled = False
        try:
            settled = await self._reconcile(files_in(Path(self._journals.file).parent), timeout_s)
        finally:
            self._suspect = self._suspect or not settled
        return not self._suspect

    async def _look_for_dropped(self) -> None:
        """Envoy drops records when the workers do not keep up; the journal has them all the same."""
        try:
            dropped = await self._envoy_admin.dropped_records()
        except (aiohttp.ClientError, OSError):
            return  # it is being started again, or has ended
        if dropped != self._dropped:
            self._dropped = dropped
            self._suspect = True

    async def _reconcile(self, files: Iterable[Path], timeout_s: float = _RECONCILE_TIMEOUT_S) -> bool:
        """Have a worker put these journals before the ledger; False where none could."""
        for file in files:
            if file.exists() and await self._ask_pool(f"reconcile {file}", timeout_s) != "reconciled":
                return False
        return True

    def _copy(self, loaded: Loaded) -> Path:
        """The bytes that the workers compile, and which variables are set where they were read."""
        copy = Path(self._deployment.run_dir) / f"gateway-{loaded.snapshot.revision}.yaml"
        refs = [provider.secret for provider in loaded.snapshot.providers.values()]
        present = [ref.name for ref in refs if ref is not None and ref.source == "env"]
        names_file(copy).write_text(json.dumps(present))
        copy.write_bytes(loaded.raw)
        copy.chmod(0o600)
        return copy

    # Children

    async def _start_demo(self, snapshot: Snapshot) -> None:
        wanted = any(provider.kind == "demo" for provider in snapshot.providers.values())
        if not wanted or any(child.name == "demo provider" for child in self._children):
            return
        socket = str(self._deployment.demo_socket)
        command = (sys.executable, "-m", "extproc.demo", "--socket", socket, "--until-stdin-ends")
        await self._start(
            Child("demo provider", command, self._bare_environ(), lambda _: None, is_ready_line=_says_ready)
        )

    def _workers_child(self, copy: Path) -> Child:
        command = self._workers_command(copy)
        return Child("workers", command, self._workers_environ(), self._on_line, is_ready_line=_says_ready)

    def _workers_command(self, copy: Path) -> tuple[str, ...]:
        return (
            *(sys.executable, "-m", "extproc", "serve", str(self._file), "--copy", str(copy)),
            *("--run-dir", str(self._deployment.run_dir), "--workers", str(self._size.workers)),
        )

    def _envoy(self, admin: EnvoyAdmin) -> Child:
        binary = Path(sysconfig.get_paths()["purelib"]) / "envoy" / "_bin" / "envoy"
        command = (
            *(str(binary), "-c", str(self._folder.bootstrap), "--log-level", "error", "--use-dynamic-base-id"),
            *("--concurrency", str(self._size.envoy_threads), "--drain-time-s", str(_DRAIN_LISTENER_S)),
            *("--drain-strategy", "immediate", "--file-flush-interval-msec", "100"),
            "--reject-unknown-dynamic-fields",  # a setting that Envoy does not know is none that it keeps
        )
        return Child("Envoy", command, self._bare_environ(), lambda _: None, until_ready=admin.wait_live)

    def _bare_environ(self) -> dict[str, str]:
        """For children that need no secret: where programs and temporary files are, and nothing else."""
        kept = ("PATH", "HOME", "TMPDIR", "LANG", "PYTHONPATH", "VIRTUAL_ENV")
        return {name: self._environ[name] for name in kept if name in self._environ}

    def _workers_environ(self) -> dict[str, str]:
        """Workers open the ledger, and so may need its URL; of providers' variables they see only that they are set."""
        refs = [provider.secret for provider in self._snapshot.providers.values() if provider.secret is not None]
        withheld = {ref.name: WITHHELD for ref in refs if ref.source == "env"}
        if self._snapshot.sql_secret is not None:
            withheld.pop(self._snapshot.sql_secret.name, None)
        return {**self._environ, **withheld}

    def _on_line(self, line: bytes) -> None:
        """A line of the pool: a request that passed, or something about the workers themselves."""
        if line.startswith(b"{"):
            passed = passed_of(line)
            if passed is not None:
                self._metrics.count(passed)
                self._screen.passed(passed)
            return
        word, _, rest = line.decode(errors="replace").strip().partition(" ")
        if word == "worker":
            number, pid, restarts = (int(part) for part in rest.split())
            self._workers[number] = (pid, restarts)
            if restarts or (self._pool is not None and self._pool.restarts):
                self._suspect = True
            if restarts:
                self._screen.note(f"worker {number} was replaced (process {pid})")
        elif word in _POOL_ANSWERS and self._pool_answer is not None and not self._pool_answer.done():
            self._pool_answer.set_result(f"{word} {rest}".strip())


def _says_ready(line: bytes) -> bool:
    return line == b"ready\n"
