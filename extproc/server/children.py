"""Child processes: started, watched, replaced when they die, ended in good order.

Used by the supervisor alone. The surprising thing: Envoy ends itself when the thread that started it ends, so children
are always started from the event loop's own thread. The others end when their standard input does.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)
_LONGEST_LINE_BYTES = 1 << 16
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.05, 5.0
_STEADY_S = 10.0
_LAST_LINES_S = 1.0


class ChildFailedError(RuntimeError):
    """A child ended before it was ready."""


async def at_once() -> None:
    """For a child that is ready as soon as it runs."""


@dataclass
class Child:
    """One program that is kept running. `on_line` gets each line of its standard output.

    It is ready when `until_ready` has returned, which is awaited anew after each start; or, where `is_ready_line` is
    given, at the line that this takes.
    """

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    on_line: Callable[[bytes], None]
    is_ready_line: Callable[[bytes], bool] | None = None
    until_ready: Callable[[], Awaitable[None]] = at_once
    restarts: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    _process: Process | None = None
    _ending: bool = False
    _keeper: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """The process id of the one that runs now."""
        return self._process.pid if self._process is not None and self.alive else None

    async def start(self, timeout_s: float) -> None:
        """Start it and wait until it is ready. Raises ChildFailedError when it ends first, or is not ready in time."""
        try:
            process = await self._spawn()
        except OSError as error:
            raise ChildFailedError(f"{self.name} can not be run: {error.strerror or error}") from error
        self._keeper = asyncio.create_task(self._keep(process))
        ended = asyncio.create_task(process.wait())
        ready = asyncio.create_task(self.ready.wait())
        await asyncio.wait((ended, ready), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        was_ready = ready.done()  # even where it has ended since, and so is not ready any more
        for waiting in (ended, ready):
            waiting.cancel()
        if was_ready:
            return
        if process.returncode is not None:
            raise ChildFailedError(f"{self.name} ended with {process.returncode} before it was ready")
        raise ChildFailedError(f"{self.name} was not ready after {timeout_s:g} s")

    def send(self, line: bytes) -> None:
        """Write a line to its standard input. Raises OSError when it does not run."""
        if self._process is None or self._process.stdin is None or not self.alive:
            raise OSError(f"{self.name} does not run")
        self._process.stdin.write(line)

    async def end(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL after `timeout_s`."""
        self._ending = True
        if not self.alive:
            await self._stop_keeping()  # it may be about to start another
        if self._process is not None and self.alive:
            with suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), timeout_s)
            except TimeoutError:
                with suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
            if self._keeper is not None:
                await asyncio.wait((self._keeper,), timeout=_LAST_LINES_S)  # it has yet to read what was said last
        await self._stop_keeping()

    async def _stop_keeping(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None

    async def _spawn(self) -> Process:
        # A session of its own: Ctrl-C reaches the supervisor alone, which then ends its children in order.
        self._process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=PIPE,
            stdout=PIPE,
            env=dict(self.environ),
            start_new_session=True,
            limit=_LONGEST_LINE_BYTES,
        )
        return self._process

    async def _keep(self, process: Process) -> None:
        backoff_s = _FIRST_BACKOFF_S
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            code = await self._see_through(process)
            if self._ending:
                return
            backoff_s = _FIRST_BACKOFF_S if loop.time() - began > _STEADY_S else min(backoff_s * 2, _LONGEST_BACKOFF_S)
            _log.error("%s ended with %d and is started again", self.name, code)
            process = await self._replace(backoff_s)

    async def _replace(self, backoff_s: float) -> Process:
        while True:
            await asyncio.sleep(backoff_s)
            self.restarts += 1
            try:
                return await self._spawn()
            except OSError as error:  # no memory or no process left, say
                _log.error("%s can not be run now: %s", self.name, error)
                backoff_s = _LONGEST_BACKOFF_S

    async def _see_through(self, process: Process) -> int:
        """From its start to its end: ready in between, its lines read. Its exit code."""
        becoming = None if self.is_ready_line else asyncio.create_task(self._become_ready())
        try:
            await self._read_lines(process)
            return await process.wait()
        finally:
            self.ready.clear()
            if becoming is not None:
                becoming.cancel()

    async def _become_ready(self) -> None:
        await self.until_ready()
        self.ready.set()

    async def _read_lines(self, process: Process) -> None:
        stdout = process.stdout
        while stdout is not None:
            try:
                line = await stdout.readline()
            except ValueError:  # a line longer than the limit; the reader drops it
                continue
            if not line:
                return
            if self.is_ready_line is not None and not self.ready.is_set() and self.is_ready_line(line):
                self.ready.set()
                continue
            try:
                self.on_line(line)
            except Exception:
                _log.exception("a line of %s could not be taken", self.name)
