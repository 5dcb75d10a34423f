"""The recording upstream's HTTP/1.1: requests read byte for byte, scripted answers written byte for byte.

`upstream` accepts the connections and chooses the `Reply`; here it is sent. The surprising thing: an answer watches
the client while it sleeps. A provider that stalls or never ends must still notice that its client has left, for that
is what the tests of early leavers count.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, cycle
from typing import Any

from tests.upstream_answers import Usage, compact, default_answer, error_document

MARKER_HEADER = "x-test-marker"
MAX_HEAD_BYTES = 1 << 20
KEPT_BYTES = 32 << 20
"""How much of an answer `Recorded.sent` keeps; what goes beyond (endless streams) is only counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """How to answer. Left alone it is the default answer of the endpoint; each field changes one thing about it.

    `body` and `chunks` replace the content, `raw` the whole answer from the status line on. `chunk_bytes` cuts the
    content anew into pieces of that size, each one HTTP chunk and one write, `chunk_delay_s` apart. After so many
    chunks `stall_after` sends no more until the client leaves, `reset_after` resets the connection (RST), and
    `close_after` closes it in order but without the last chunk. `endless` repeats the chunks until the client leaves.
    """

    status: int = 200
    reason: str = "Scripted"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    chunks: tuple[bytes, ...] | None = None
    raw: bytes | None = None
    chunk_bytes: int | None = None
    chunk_delay_s: float = 0.0
    before_headers_s: float = 0.0
    reset_before_headers: bool = False
    stall_before_headers: bool = False
    stall_after: int | None = None
    reset_after: int | None = None
    close_after: int | None = None
    endless: bool = False
    gzip: bool = False
    usage: Usage | None = None

    @classmethod
    def html_error(cls, status: int = 502) -> Reply:
        """A load balancer's error page, where a client expects JSON."""
        page = f"<html><head><title>{status} Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>\r\n"
        return cls(status=status, headers=(("content-type", "text/html"),), body=page.encode())

    @classmethod
    def huge(cls, size_bytes: int) -> Reply:
        """A valid JSON body of exactly `size_bytes`."""
        frame = b'{"object":"chat.completion","padding":""}'
        return cls(body=frame[:-2] + b"x" * (size_bytes - len(frame)) + frame[-2:])


@dataclass(slots=True, eq=False)
class Recorded:
    """One request, byte for byte, and what became of it.

    `raw_head` runs to the empty line; `body` is free of transfer coding, `raw_body` is as framed. `client_left`: the
    connection ended before the answer did. `sent` is the answer's body before transfer and content coding. `usage` is
    what the upstream counts for it, None for errors; it stands as planned until `completed`.
    """

    ordinal: int
    connection: int
    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    raw_head: bytes
    arrived_s: float
    body: bytes = b""
    raw_body: bytes = b""
    status: int | None = None
    sent: bytearray = field(default_factory=bytearray)
    sent_bytes: int = 0
    sent_chunks: int = 0
    usage: Usage | None = None
    completed: bool = False
    client_left: bool = False
    finished: bool = False

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def values(self, name: str) -> list[str]:
        """Every value of a header, in order; `name` in any case."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """The first value of a header, None without one."""
        return next(iter(self.values(name)), None)

    @property
    def marker(self) -> str | None:
        return self.header(MARKER_HEADER)


class ClientLeftError(ConnectionError):
    """The client closed or reset its connection before the answer's end."""


class HangUp(Exception):  # noqa: N818 - not a fault: the script says to drop the connection here
    """The script ends the connection."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__()
        self.reset = reset


class Reader(asyncio.StreamReader):
    """A reader that also tells when the client has gone, which an answer must know while nobody reads."""

    def __init__(self) -> None:
        super().__init__(limit=MAX_HEAD_BYTES)
        self.left = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.left.set()

    def set_exception(self, exc: Any) -> None:
        super().set_exception(exc)
        self.left.set()


class MalformedError(Exception):
    """What the client sent is no HTTP request; `raw` is what it sent, as far as it is known."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self.raw = raw


async def read_head(reader: Reader, connection: int, ordinal: int) -> Recorded | None:
    """The next request's line and headers; None when the client closed between requests. Raises MalformedError."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as ended:
        if ended.partial:
            raise MalformedError(ended.partial) from None
        return None
    except asyncio.LimitOverrunError:
        raise MalformedError(b"") from None
    first, *lines = raw.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words = first.split(" ")
    if len(words) != 3:
        raise MalformedError(raw)
    pairs = [line.partition(":") for line in lines]
    headers = [(name, value.strip(" \t")) for name, _, value in pairs]
    return Recorded(ordinal, connection, words[0], words[1], words[2], headers, raw, time.monotonic())


async def read_body(reader: Reader, writer: asyncio.StreamWriter, request: Recorded) -> None:
    """Read the rest of `request`. Raises IncompleteReadError when the client leaves, keeping what had come."""
    if (request.header("expect") or "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body, raw = bytearray(), bytearray()
    try:
        if (request.header("transfer-encoding") or "").lower() == "chunked":
            while size := int((line := await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                raw += line
                data = await reader.readexactly(size)
                body += data
                raw += data + await reader.readexactly(2)
            while line != b"\r\n":
                raw += line
                line = await reader.readuntil(b"\r\n")
            raw += line
        else:
            body += await reader.readexactly(int(request.header("content-length") or 0))
            raw += body
    except asyncio.IncompleteReadError as ended:
        body += ended.partial
        raw += ended.partial
        raise
    except ValueError:
        raise MalformedError(request.raw_head + raw) from None
    finally:
        request.body, request.raw_body = bytes(body), bytes(raw)


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with RST, not FIN: with no time to linger the kernel discards it."""
    if not writer.is_closing():
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@dataclass(slots=True)
class Answering:
    """One request being answered as `reply` says."""

    request: Recorded
    reader: Reader
    writer: asyncio.StreamWriter
    reply: Reply

    async def run(self, usage: Usage, model: str | None) -> None:
        """Send the answer. Raises ClientLeftError when the client goes first, HangUp where the script hangs up."""
        reply, request = self.reply, self.request
        await self._pause(reply.before_headers_s)
        if reply.stall_before_headers:
            await self._pause(None)
        if reply.reset_before_headers:
            raise HangUp(reset=True)
        if reply.raw is not None:
            request.usage = reply.usage
            for piece in _cut([reply.raw], reply.chunk_bytes):
                await self._send(piece)
                await self._pause(reply.chunk_delay_s)
            request.completed = True
            raise HangUp(reset=False)
        request.status = reply.status
        body, chunks = self._content(usage, model)
        scripted_cut = (reply.chunk_bytes, reply.stall_after, reply.reset_after, reply.close_after)
        if chunks is None and body is not None and scripted_cut == (None,) * 4:
            await self._whole(body)
        else:
            await self._streamed([body or b""] if chunks is None else chunks, as_events=chunks is not None)
        request.completed = True

    def _content(self, usage: Usage, model: str | None) -> tuple[bytes | None, tuple[bytes, ...] | None]:
        reply, request = self.reply, self.request
        request.usage = reply.usage
        if reply.body is not None or reply.chunks is not None:
            return reply.body, reply.chunks
        if reply.status >= 400:
            return compact(error_document(reply.status, request.path)), None
        answer = default_answer(request.method, request.path, request.query, request.body, usage=usage, model=model)
        request.usage = reply.usage or answer.usage
        return answer.body, answer.chunks or None

    async def _whole(self, body: bytes) -> None:
        coded = zlib.compress(body, wbits=31) if self.reply.gzip else body
        if self.request.method == "HEAD" or self.reply.status in (204, 304):
            coded, body = b"", b""
        self._keep(body)
        framing = [] if self.reply.status in (204, 304) else [("content-length", str(len(coded)))]
        await self._send(self._head("application/json", framing) + coded)

    async def _streamed(self, chunks: Iterable[bytes], *, as_events: bool) -> None:
        reply, request = self.reply, self.request
        framed = not any(name.lower() == "content-length" for name, _ in reply.headers)
        framing = [("transfer-encoding", "chunked")] if framed else []
        await self._send(self._head("text/event-stream" if as_events else "application/json", framing))
        deflate = zlib.compressobj(wbits=31) if reply.gzip else None
        source = cycle(chunks) if reply.endless else chunks
        for chunk in _cut(source, reply.chunk_bytes):
            await self._maybe_break()
            if request.sent_chunks:
                await self._pause(reply.chunk_delay_s)
            coded = chunk if deflate is None else deflate.compress(chunk) + deflate.flush(zlib.Z_SYNC_FLUSH)
            await self._send(b"%x\r\n%b\r\n" % (len(coded), coded) if framed and coded else coded)
            self._keep(chunk)
            request.sent_chunks += 1
        await self._maybe_break()
        rest = b"" if deflate is None else deflate.flush()
        end = (b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n" if framed else rest
        await self._send(end)

    async def _maybe_break(self) -> None:
        reply, sent = self.reply, self.request.sent_chunks
        if sent == reply.stall_after:
            await self._pause(None)
        if sent in (reply.reset_after, reply.close_after):
            raise HangUp(reset=sent == reply.reset_after)

    def _head(self, content_type: str, framing: list[tuple[str, str]]) -> bytes:
        reply = self.reply
        scripted = {name.lower() for name, _ in reply.headers}
        own = [("content-type", content_type), ("x-request-id", f"req_upstream_{self.request.ordinal}")]
        own += [("content-encoding", "gzip")] if reply.gzip else []
        pairs = chain(((name, value) for name, value in own if name not in scripted), reply.headers, framing)
        reason = "OK" if reply.status == 200 else reply.reason
        lines = "".join(f"{name}: {value}\r\n" for name, value in pairs)
        return f"HTTP/1.1 {reply.status} {reason}\r\n{lines}\r\n".encode("latin-1")

    def _keep(self, data: bytes) -> None:
        self.request.sent_bytes += len(data)
        self.request.sent += data[: max(KEPT_BYTES - len(self.request.sent), 0)]

    async def _send(self, data: bytes) -> None:
        if self.reader.left.is_set():
            raise ClientLeftError
        self.writer.write(data)
        await self.writer.drain()

    async def _pause(self, duration_s: float | None) -> None:
        """Wait, for ever with None. Raises ClientLeftError as soon as the client goes."""
        if duration_s == 0:
            return
        try:
            await asyncio.wait_for(self.reader.left.wait(), duration_s)
        except TimeoutError:
            return
        raise ClientLeftError


def _cut(chunks: Iterable[bytes], size: int | None) -> Iterator[bytes]:
    """`chunks` as they are, or run together and cut every `size` bytes."""
    if size is None:
        yield from chunks
        return
    held = b""
    for chunk in chunks:
        held += chunk
        whole = len(held) - len(held) % size
        for start in range(0, whole, size):
            yield held[start : start + size]
        held = held[whole:]
    if held:
        yield held
