"""Both gRPC transports under test: scripted sessions, and a server of either kind in a thread of its own.

The surprising thing: the server has its own loop, uvloop's or asyncio's, so blocking clients can call it from a test.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import uvloop

from extproc.server.grpc_aio import GrpcAioTransport
from extproc.server.ngh2_transport import Ngh2Transport
from extproc.server.transport import (
    Answer,
    Listener,
    Metadata,
    Method,
    Replies,
    Session,
    Shape,
    Status,
    StatusError,
    TcpAddress,
    Transport,
)

T = TypeVar("T")

BIDI, COLLECT, SHOUT, META = "/test.Calls/Bidi", "/test.Calls/Collect", "/test.Calls/Shout", "/test.Calls/Meta"
REFUSED, BROKEN = "/test.Calls/Refused", "/test.Calls/Broken"
AWKWARD = 'naïve 100% "quoted"\n€'
MAX_BODY_BYTES = 32 << 20


_LATE = frozenset(
    (b"sleep", b"wait", b"late-refuse", b"late-break", b"late-done", b"late-cancel", b"mend", b"spin", b"cancel")
)


class Calls:
    """The methods of a test, and what happened to their sessions."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.finished = 0
        self.waiting: list[asyncio.Future[None]] = []

    def methods(self) -> list[Method]:
        def refused(_: Metadata) -> Session:
            raise StatusError(Status.NOT_FOUND, AWKWARD)

        def broken(_: Metadata) -> Session:
            raise ValueError("a secret")

        return [
            Method(BIDI, Shape.BIDI, lambda _: Scripted(self)),
            Method(COLLECT, Shape.CLIENT_STREAM, lambda _: Collect()),
            Method(SHOUT, Shape.UNARY, lambda _: Shout(self)),
            Method(META, Shape.UNARY, Meta),
            Method(REFUSED, Shape.BIDI, refused),
            Method(BROKEN, Shape.BIDI, broken),
        ]

    async def wait(self) -> None:
        """Until a test calls `let_go`, or the peer leaves."""
        waiting = asyncio.get_running_loop().create_future()
        self.waiting.append(waiting)
        try:
            await waiting
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def let_go(self) -> None:
        """The sessions that wait now go on."""
        waiting, self.waiting = self.waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)


class Scripted:
    """Does what a message's first word says, and echoes all others."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.done = False

    def receive(self, message: bytes) -> Answer:
        match message[:16].split(b" ")[0]:
            case b"refuse":
                raise StatusError(Status.NOT_FOUND, AWKWARD)
            case b"break":
                raise ValueError("a secret")
            case b"silent":
                return ()
            case b"many":
                return [b"1", b"2", b"3"]
            case b"done":
                self.done = True
                return (message,)
            case b"at-once":
                return self._at_once(message)
            case (
                b"sleep"
                | b"wait"
                | b"late-refuse"
                | b"late-break"
                | b"mend"
                | b"late-done"
                | b"spin"
                | b"cancel"
                | b"late-cancel"
            ):
                return self._late(message)
            case b"count":
                return self._count()
        return (message,)

    def finish(self) -> Replies:
        self._calls.finished += 1
        return (b"finished",)

    async def _at_once(self, message: bytes) -> Replies:
        return (message,)

    async def _late(self, message: bytes) -> Replies:
        match message.split(b" ")[0]:
            case b"sleep":
                await asyncio.sleep(0.002)
                await asyncio.sleep(0)
            case b"wait":
                await self._calls.wait()
            case b"late-refuse":
                await asyncio.sleep(0)
                raise StatusError(Status.NOT_FOUND, AWKWARD)
            case b"late-break":
                await asyncio.sleep(0.001)
                raise ValueError("a secret")
            case b"mend":
                # The first thing that is awaited fails, and the session knows what to do about it.
                with suppress(ZeroDivisionError):
                    await asyncio.get_running_loop().run_in_executor(None, lambda: 1 // 0)
            case b"cancel":
                raise asyncio.CancelledError
            case b"late-cancel":
                cancelled = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_soon(cancelled.cancel)
                await cancelled
            case b"spin":
                try:
                    while True:
                        await asyncio.sleep(0)
                finally:
                    self._calls.cancelled += 1
            case b"late-done":
                await asyncio.sleep(0.001)
                self.done = True
        return (message,)

    async def _count(self) -> AsyncIterator[bytes]:
        for number in range(3):
            yield b"%d" % number
            await asyncio.sleep(0.001)
        try:
            await self._calls.wait()
        finally:
            self.done = True
        yield b"end"


class Collect:
    """Answers with how many messages and bytes came."""

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0
        self.done = False

    def receive(self, message: bytes) -> Answer:
        if message == b"break":
            raise ValueError("a secret")
        self.messages += 1
        self.bytes += len(message)
        self.done = message == b"done"
        return self._later() if message == b"sleep" else ()

    def finish(self) -> Replies:
        return (b"%d %d" % (self.messages, self.bytes),)

    async def _later(self) -> Replies:
        await asyncio.sleep(0.001)
        return ()


class Shout:
    """Upper case."""

    done = False

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def receive(self, message: bytes) -> Answer:
        if message == b"refuse":
            raise StatusError(Status.UNAVAILABLE, AWKWARD)
        return self._wait() if message == b"wait" else (message.upper(),)

    def finish(self) -> Replies:
        return ()

    async def _wait(self) -> Replies:
        await self._calls.wait()
        return (b"WAITED",)


class Meta:
    """What its metadata says of `x-one`, and whether it says anything of `x-two`."""

    done = False

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def receive(self, _: bytes) -> Replies:
        metadata = self._metadata
        known = "x-one" in metadata and "x-two" not in metadata and "x-one" in list(metadata) and len(metadata) > 0
        return (b"%s %s" % (metadata["x-one"].encode(), str(known).encode()),)

    def finish(self) -> Replies:
        return ()


Make = Callable[[Listener, Sequence[Method], float], Transport]


def _ngh2(listener: Listener, methods: Sequence[Method], ping_every_s: float) -> Transport:
    return Ngh2Transport(listener, methods, max_body_bytes=MAX_BODY_BYTES, ping_every_s=ping_every_s)


def _grpc_aio(listener: Listener, methods: Sequence[Method], ping_every_s: float) -> Transport:
    return GrpcAioTransport(listener, methods, max_body_bytes=MAX_BODY_BYTES, ping_every_s=ping_every_s)


KINDS: dict[str, tuple[Make, Callable[[], asyncio.AbstractEventLoop]]] = {
    "ngh2-uvloop": (_ngh2, uvloop.new_event_loop),
    "ngh2-asyncio": (_ngh2, asyncio.new_event_loop),
    "grpc-aio": (_grpc_aio, asyncio.new_event_loop),
}


class Served:
    """A transport that runs, on a loop in another thread."""

    def __init__(self, transport: Transport, loop: asyncio.AbstractEventLoop, calls: Calls, target: str) -> None:
        self.target = target
        """What a client is told."""
        self.transport = transport
        self.loop = loop
        self.calls = calls

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
        """Run `work` on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def let_go(self) -> None:
        """See `Calls.let_go`."""
        self.loop.call_soon_threadsafe(self.calls.let_go)


@contextmanager
def served(
    kind: str, listener: Listener, more: Sequence[Method] = (), calls: Calls | None = None, ping_every_s: float = 30.0
) -> Iterator[Served]:
    """A transport of `kind` on `listener`, drained at the end."""
    make, new_loop = KINDS[kind]
    calls = calls or Calls()
    loop = new_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def build() -> Transport:
        transport = make(listener, [*calls.methods(), *more], ping_every_s)
        await transport.start()
        return transport

    target = _target(listener)
    try:
        transport = asyncio.run_coroutine_threadsafe(build(), loop).result(10)
        server = Served(transport, loop, calls, target)
        yield server
        server.run(transport.drain(0.0))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def _target(listener: Listener) -> str:
    match listener:
        case TcpAddress(host, port, _):
            return f"{host}:{port}"
        case Path() as path:
            return f"unix:{path}"
        case _:
            return f"unix:{listener.getsockname()}"


def bidi(channel: grpc.Channel | grpc.aio.Channel, path: str = BIDI) -> Any:
    """A callable of raw bytes."""
    return channel.stream_stream(path, request_serializer=None, response_deserializer=None)


def unary(channel: grpc.Channel | grpc.aio.Channel, path: str = SHOUT) -> Any:
    """A callable of raw bytes."""
    return channel.unary_unary(path, request_serializer=None, response_deserializer=None)


def client_stream(channel: grpc.Channel | grpc.aio.Channel, path: str = COLLECT) -> Any:
    """A callable of raw bytes."""
    return channel.stream_unary(path, request_serializer=None, response_deserializer=None)
