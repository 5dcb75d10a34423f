"""Child processes: started, watched, replaced when they die, ended in good order.

Used by the supervisor alone. The surprising thing: Envoy ends itself when the thread that started it ends, so children
are always started from the event loop's own thread.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)
_LONGEST_LINE_BYTES = 1 << 16
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.05, 5.0
_STEADY_S = 10.0


class ChildFailedError(RuntimeError):
    """A child ended before it was ready."""


@dataclass
class Child:
    """One program that is kept running. `on_line` gets each line of its standard output."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    on_line: Callable[[bytes], None]
    is_ready_line: Callable[[bytes], bool] = lambda _: True
    process: Process | None = None
    restarts: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    _ending: bool = False
    _keeper: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def start(self, timeout_s: float) -> None:
        """Start it and wait until it says that it is ready. Raises ChildFailedError."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())
        assert self.process is not None
        ended = asyncio.create_task(self.process.wait())
        ready = asyncio.create_task(self.ready.wait())
        await asyncio.wait((ended, ready), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if not self.ready.is_set():
            raise ChildFailedError(f"{self.name} did not start")

    async def end(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL after `timeout_s`."""
        self._ending = True
        if self.process is not None and self.alive:
            with suppress(ProcessLookupError):
                self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), timeout_s)
            except TimeoutError:
                with suppress(ProcessLookupError):
                    self.process.kill()
                await self.process.wait()
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper

    async def _spawn(self) -> None:
        # A session of its own: Ctrl-C reaches the supervisor alone, which then ends its children in order.
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            env=dict(self.environ),
            start_new_session=True,
            limit=_LONGEST_LINE_BYTES,
        )

    async def _keep(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        loop = asyncio.get_running_loop()
        while True:
            assert self.process is not None
            began = loop.time()
            await self._read_lines(self.process)
            code = await self.process.wait()
            if self._ending:
                return
            self.ready.clear()
            backoff_s = _FIRST_BACKOFF_S if loop.time() - began > _STEADY_S else min(backoff_s * 2, _LONGEST_BACKOFF_S)
            _log.error("%s ended with %d and is started again", self.name, code)
            await asyncio.sleep(backoff_s)
            self.restarts += 1
            await self._spawn()

    async def _read_lines(self, process: Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line longer than the limit; the reader drops it
                continue
            if not line:
                return
            if not self.ready.is_set() and self.is_ready_line(line):
                self.ready.set()
                continue
            self.on_line(line)
