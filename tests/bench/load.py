"""The load generator: a process of its own that sends prepared requests over kept-alive connections and takes the time.

`python -m tests.bench.load` reads a `Run` as JSON a line and answers each with a `Result`. The surprising thing: it
keeps a target's connections from one run to the next, so that no measured round pays for opening them.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from random import Random
from typing import Literal, cast

import uvloop

from tests.bench.traffic import Chat

How = Literal["closed", "open", "hold", "release"]
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_LAST_CHUNK = b"0\r\n\r\n"
_OPENING_AT_ONCE = 50
_SHOWN_BYTES = 400
_SEED = 1


@dataclass(frozen=True, slots=True)
class Run:
    """What to send to `port`.

    `closed`: `requests` in all, each of `connections` sending the next when it has its answer. `open`: `requests` in
    all, `rate_per_s` whatever comes back, at random times that are the same for every target. `hold`: a stream on each
    of `connections`, left open once its first chunk is there. `release`: close what `hold` opened.
    """

    how: How
    port: int
    chat: Chat
    requests: int = 0
    connections: int = 32
    rate_per_s: float = 0.0
    timeout_s: float = 60.0


@dataclass(slots=True)
class Result:
    """What came of a run. `latencies_us` (from sending to the answer's end) only for `open` runs."""

    completed: int = 0
    failed: int = 0
    unfinished: int = 0
    seconds: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    first_failure: str = ""
    latencies_us: list[int] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One client connection: a request out, an answer in. `on_answer` gets the status, 0 for a broken connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sent_at = 0.0
        self.on_answer: Callable[[Connection, int, bytes], None] | None = None
        self.on_first_byte: Callable[[], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._missing: int | None = None
        self._status = 0
        self._tail = b""

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its bases

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self.on_answer is not None:
            self._finish(0, b"")

    def close(self) -> None:
        self.on_answer = None
        if self._transport is not None:
            self._transport.abort()

    def send(self, request: bytes, on_answer: Callable[[Connection, int, bytes], None]) -> None:
        self.on_answer = on_answer
        self._head, self._tail, self._status = b"", b"", 0
        self.sent_at = time.perf_counter()
        if self._transport is None:
            self._finish(0, b"")
        else:
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._status == 0:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[: end + 2], self._head[end + 4 :]
            self._status = int(head[9:12])
            length = _LENGTH.search(head)
            self._missing = int(length[1]) if length else None if _CHUNKED.search(head) else 0
        if self._missing is not None:
            self._missing -= len(data)
            ended = self._missing <= 0
        else:
            # An answer is over at its last chunk, which may come in two pieces.
            self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
            ended = self._tail == _LAST_CHUNK
        if data and self.on_first_byte is not None:
            self.on_first_byte()
        if ended:
            self._finish(self._status, data[:_SHOWN_BYTES])

    def _finish(self, status: int, shown: bytes) -> None:
        on_answer, self.on_answer = self.on_answer, None
        if on_answer is not None:
            on_answer(self, status, shown)


class Generator:
    """Runs one `Run` after another; keeps connections between them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle: defaultdict[int, list[Connection]] = defaultdict(list)
        self._held: list[Connection] = []
        self._prepared: dict[tuple[int, Chat], list[bytes]] = {}
        self._position: Counter[tuple[int, Chat]] = Counter()

    async def run(self, run: Run) -> Result:
        match run.how:
            case "closed":
                return await self._sending(run, self._start_closed)
            case "open":
                return await self._sending(run, self._start_open)
            case "hold":
                return await self._hold(run)
            case "release":
                for connection in self._held:
                    connection.close()
                self._held.clear()
                return Result()

    async def _sending(self, run: Run, start: Callable[[Run, _Tally], asyncio.Task[None] | None]) -> Result:
        await self._open(run.port, run.connections)
        tally = _Tally(run.requests, self._loop.create_future())
        began = time.perf_counter()
        task = start(run, tally)
        with suppress(TimeoutError):
            await asyncio.wait_for(tally.done, run.timeout_s)
        tally.result.seconds = time.perf_counter() - began
        if task is not None:
            task.cancel()
        if tally.result.unfinished:
            tally.over = True
            for connection in tally.busy:
                connection.close()
        return tally.result

    def _start_closed(self, run: Run, tally: _Tally) -> None:
        left = run.requests

        def on_answer(connection: Connection, status: int, shown: bytes) -> None:
            tally.note(connection, status, shown)
            go_on(connection)

        def go_on(connection: Connection) -> None:
            nonlocal left
            if left == 0 or tally.over or not connection.alive:
                self._put_back(connection)
                if left and not tally.over and not tally.busy:  # the target closed every connection
                    left = 0
                    tally.give_up()
                return
            left -= 1
            tally.busy.add(connection)
            connection.send(self._next(run), on_answer)

        for connection in self._take(run.port, run.connections):
            go_on(connection)

    def _start_open(self, run: Run, tally: _Tally) -> asyncio.Task[None]:
        def on_answer(connection: Connection, status: int, shown: bytes) -> None:
            tally.result.latencies_us.append(int((time.perf_counter() - connection.sent_at) * 1e6))
            tally.note(connection, status, shown)
            self._put_back(connection)

        async def send_all() -> None:
            due = self._loop.time()
            arrivals = Random(_SEED)
            for _ in range(run.requests):
                due += arrivals.expovariate(run.rate_per_s)
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                connection = next(iter(self._take(run.port, 1)), None) or await self._connect(run.port)
                tally.busy.add(connection)
                connection.send(self._next(run), on_answer)

        return self._loop.create_task(send_all())

    async def _hold(self, run: Run) -> Result:
        result = Result()
        first_bytes = 0

        def on_first_byte() -> None:
            nonlocal first_bytes
            first_bytes += 1

        def on_end(_: Connection, status: int, shown: bytes) -> None:
            result.failed += 1
            result.first_failure = result.first_failure or f"{status} {shown!r}"

        began = time.perf_counter()
        for start in range(0, run.connections, _OPENING_AT_ONCE):
            number = min(_OPENING_AT_ONCE, run.connections - start)
            opened = await asyncio.gather(*(self._connect(run.port) for _ in range(number)))
            for connection in opened:
                connection.on_first_byte = on_first_byte
                connection.send(self._next(run), on_end)
            self._held += opened
            while first_bytes + result.failed < start + number and time.perf_counter() - began < run.timeout_s:
                await asyncio.sleep(0.01)
        result.completed = first_bytes
        result.unfinished = run.connections - first_bytes - result.failed
        result.seconds = time.perf_counter() - began
        return result

    async def _open(self, port: int, number: int) -> None:
        self._idle[port] = [each for each in self._idle[port] if each.alive]
        missing = number - len(self._idle[port])
        self._idle[port] += await asyncio.gather(*(self._connect(port) for _ in range(missing)))

    async def _connect(self, port: int) -> Connection:
        _, connection = await self._loop.create_connection(lambda: Connection(port), "127.0.0.1", port)
        return connection

    def _take(self, port: int, number: int) -> list[Connection]:
        idle = self._idle[port] = [each for each in self._idle[port] if each.alive]
        taken, self._idle[port] = idle[:number], idle[number:]
        return taken

    def _put_back(self, connection: Connection) -> None:
        if connection.alive:
            self._idle[connection.port].append(connection)

    def _next(self, run: Run) -> bytes:
        which = (run.port, run.chat)
        prepared = self._prepared.get(which)
        if prepared is None:
            prepared = self._prepared[which] = run.chat.requests(run.port)
        self._position[which] += 1
        return prepared[self._position[which] % len(prepared)]


class _Tally:
    """Counts the answers of one run and says when the last is there."""

    def __init__(self, requests: int, done: asyncio.Future[None]) -> None:
        self.result = Result(unfinished=requests)
        self.busy: set[Connection] = set()
        self.done = done
        self.over = False

    def note(self, connection: Connection, status: int, shown: bytes) -> None:
        self.busy.discard(connection)
        result = self.result
        result.unfinished -= 1
        if status == 200:
            result.completed += 1
        else:
            result.failed += 1
            result.first_failure = result.first_failure or f"{status} {shown.decode(errors='replace')}"
            result.statuses[str(status)] = result.statuses.get(str(status), 0) + 1
        if result.unfinished == 0:
            self.give_up()

    def give_up(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


def encode(run: Run) -> str:
    """A run as one line."""
    return json.dumps(asdict(run)) + "\n"


def decode(line: str) -> Run:
    """The run that `encode` wrote."""
    read = json.loads(line)
    chat = read.pop("chat")
    chat["headers"] = tuple(chat["headers"])
    return Run(chat=Chat(**chat), **read)


async def _serve() -> None:
    generator = Generator()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        result = await generator.run(decode(line))
        print(json.dumps({each.name: getattr(result, each.name) for each in fields(result)}), flush=True)


if __name__ == "__main__":
    uvloop.run(_serve())
