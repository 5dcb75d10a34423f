"""A server connection of the libnghttp2 transport in memory, and a peer that speaks to it, well or badly.

No socket, no waiting: `pump` carries bytes both ways until both sides are silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ngh2

from extproc.server.ngh2_connection import Connection
from extproc.server.ngh2_stream import Limits
from extproc.server.transport import Method
from tests.transports import BIDI, SHOUT, Calls

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
MESSAGE_LIMIT = 4 << 20
_READ_BYTES = 1 << 16
"""What a socket gives at once."""


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame, whether legal or not (RFC 9113 section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def prefixed(message: bytes, flag: int = 0) -> bytes:
    """A length-prefixed gRPC message."""
    return bytes((flag,)) + len(message).to_bytes(4, "big") + message


def request_headers(path: str = BIDI, *more: tuple[bytes, bytes], content_type: bytes = b"application/grpc") -> Any:
    """What a gRPC client begins a call with."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"test"),
        (b"te", b"trailers"),
        (b"content-type", content_type),
        *more,
    ]


class Wires(asyncio.Transport):
    """A transport that keeps what is written. While `stalled`, it is a socket whose peer does not read."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._protocol = protocol
        self.written = bytearray()
        self.reading = True
        self.closing = False
        self.stalled = False
        self.paused = False
        self.high_bytes = 1 << 16

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.closing:
            return
        self.written += data
        if self.stalled and not self.paused and len(self.written) > self.high_bytes:
            self.paused = True
            self._protocol.pause_writing()

    def take(self) -> bytes:
        """What the peer reads now."""
        taken = bytes(self.written)
        self.written.clear()
        if self.paused:
            self.paused = False
            self._protocol.resume_writing()
        return taken

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high_bytes = high or self.high_bytes

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_reading(self) -> bool:
        return self.reading

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    abort = close


@dataclass(slots=True)
class Heard:
    """What came back on one stream."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    trailers: dict[bytes, bytes] = field(default_factory=dict)
    ended: bool = False
    reset_code: int | None = None

    @property
    def status(self) -> int | None:
        """The grpc-status, if one came."""
        found = self.trailers.get(b"grpc-status", self.headers.get(b"grpc-status"))
        return None if found is None else int(found)

    @property
    def messages(self) -> list[bytes]:
        """The whole messages; nothing may be left over."""
        found, rest = [], bytes(self.body)
        while rest:
            assert rest[0] == 0
            size = int.from_bytes(rest[1:5], "big")
            assert len(rest) >= 5 + size
            found.append(rest[5 : 5 + size])
            rest = rest[5 + size :]
        return found


class Peer:
    """A client of one server connection. Make it on a running loop."""

    def __init__(
        self,
        methods: Sequence[Method] | None = None,
        limits: Limits | None = None,
        *,
        settings: dict[int, int] | None = None,
        auto_window_update: bool = True,
    ) -> None:
        self.calls = Calls()
        self.all: set[Connection] = set()
        served = self.calls.methods() if methods is None else methods
        self.server = Connection(
            {method.path.encode(): method for method in served}, limits or Limits(MESSAGE_LIMIT), self.all
        )
        self.wires = Wires(self.server)
        self.server.connection_made(self.wires)
        self.h2 = ngh2.Connection(
            ngh2.Role.CLIENT,
            ngh2.Configuration(auto_window_update=auto_window_update, peer_max_concurrent_streams=100_000),
        )
        self.h2.initiate_connection(settings)
        self.heard: dict[int, Heard] = {}
        self.events: list[Any] = []
        self._unsent = bytearray()
        self.pump()

    def open(self, path: str = BIDI, *messages: bytes, ends: bool = False, headers: Any = None) -> int:
        """Begin a call and queue what it says."""
        stream_id = self.h2.send_request(request_headers(path) if headers is None else headers)
        self.heard[stream_id] = Heard()
        self.say(stream_id, *messages, ends=ends)
        return stream_id

    def say(self, stream_id: int, *messages: bytes, ends: bool = False) -> None:
        """Queue messages."""
        for message in messages:
            self.h2.send_data(stream_id, prefixed(message))
        if ends:
            self.h2.end_stream(stream_id)

    def pump(self) -> None:
        """Carry bytes until both sides are silent."""
        while True:
            self._unsent += self.h2.data_to_send()
            sent = 0
            while self._unsent and self.wires.reading and not self.wires.closing:
                part = bytes(self._unsent[:_READ_BYTES])
                del self._unsent[:_READ_BYTES]
                sent += len(part)
                self.server.data_received(part)
            received = b"" if self.wires.stalled else self.wires.take()
            if received:
                self.h2.receive_data(received)
                self._hear(self.h2.events())
            if not sent and not received:
                return

    async def settle(self, turns: int = 20) -> None:
        """`pump`, and give the server's tasks their turns."""
        for _ in range(turns):
            self.pump()
            await asyncio.sleep(0)
        self.pump()

    async def is_served(self) -> bool:
        """Whether the connection still answers."""
        stream_id = self.open(SHOUT, b"alive")
        await self.settle()
        return self.heard[stream_id].messages == [b"ALIVE"]

    def feed(self, data: bytes) -> None:
        """Raw bytes to the server, as much as a socket would give at once."""
        for start in range(0, len(data), _READ_BYTES):
            self.server.data_received(data[start : start + _READ_BYTES])

    def _hear(self, events: Iterable[Any]) -> None:
        for event in events:
            self.events.append(event)
            heard = self.heard.get(getattr(event, "stream_id", 0))
            if heard is None:
                continue
            match event:
                case ngh2.ResponseReceived():
                    heard.headers = dict(event.headers)
                    heard.ended = event.end_stream
                case ngh2.DataReceived():
                    heard.body += event.data
                    heard.ended = event.end_stream
                case ngh2.TrailersReceived():
                    heard.trailers = dict(event.headers)
                    heard.ended = True
                case ngh2.StreamReset():
                    heard.reset_code = event.error_code
