"""A client that sends exactly the bytes a test wrote: HTTP/1.1 over a bare socket, HTTP/2 frame by frame.

For the tests of threats, whose requests no library would send. The surprising thing: it does not wait to be asked. An
answer may come while only half of the request is out, and that it does is what many of these tests are about.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

TIMEOUT_S = 20.0
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One response. `interim` are the 1xx before it, `elapsed_s` is from the connection's start to its last byte."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    interim: tuple[int, ...] = ()
    elapsed_s: float = 0.0

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        return next(iter(self.values(name)), None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class NoAnswerError(ConnectionError):
    """The server closed or reset the connection before a whole response; `partial` is what had come."""

    def __init__(self, partial: bytes) -> None:
        super().__init__(f"no whole answer, only {partial[:200]!r}")
        self.partial = partial


class Connection:
    """One TCP connection: write anything, read responses. Sending to a peer that has closed is no error."""

    def __init__(self, port: int, timeout_s: float = TIMEOUT_S) -> None:
        self._began = time.monotonic()
        self._socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        self._read = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, _: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has answered, and the answer is there to be read
            self._socket.sendall(data)

    def end(self) -> None:
        """Send no more, and read on."""
        self._socket.shutdown(socket.SHUT_WR)

    def answer(self, method: str = "POST") -> Answer:
        """The next response. Raises NoAnswerError, and TimeoutError where nothing comes."""
        self._read = b""
        interim: list[int] = []
        while True:
            status, headers = self._head()
            if status >= 200:
                break
            interim.append(status)
        body = b"" if method == "HEAD" or status in (204, 304) else self._body(headers)
        return Answer(status, headers, body, tuple(interim), time.monotonic() - self._began)

    def is_closed(self, timeout_s: float = 5.0) -> bool:
        """Whether the peer closes within `timeout_s`, without a further byte."""
        self._socket.settimeout(timeout_s)
        try:
            return self._unread == b"" and self._socket.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def read(self, size: int = 65536) -> bytes:
        """Whatever has come, at least one byte; empty at the end."""
        found, self._unread = self._unread, b""
        return found or self._socket.recv(size)

    def _head(self) -> tuple[int, tuple[tuple[str, str], ...]]:
        first, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        return int(first.split(" ")[1]), tuple((name.strip(), value.strip()) for name, _, value in pairs)

    def _body(self, headers: Pairs) -> bytes:
        fields = {name.lower(): value for name, value in headers}
        if fields.get("transfer-encoding", "").lower() == "chunked":
            parts: list[bytes] = []
            while size := int(self._until(b"\r\n"), 16):
                parts.append(self._exactly(size + 2)[:-2])
            self._until(b"\r\n")
            return b"".join(parts)
        if "content-length" in fields:
            return self._exactly(int(fields["content-length"]))
        rest = b""
        while more := self.read():
            rest += more
        return rest

    def _until(self, end: bytes) -> bytes:
        while end not in self._unread:
            self._more()
        found, _, self._unread = self._unread.partition(end)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._unread) < size:
            self._more()
        found, self._unread = self._unread[:size], self._unread[size:]
        return found

    def _more(self) -> None:
        try:
            data = self._socket.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        if not data:
            raise NoAnswerError(self._read)
        self._read += data
        self._unread += data


def request_bytes(
    method: str, target: str, headers: Iterable[tuple[str, str]] = (), body: bytes = b"", *, version: str = "HTTP/1.1"
) -> bytes:
    """A request with just these headers; add `host` and `content-length` yourself. Texts are Latin-1."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"{method} {target} {version}\r\n{lines}\r\n".encode("latin-1") + body


def chunked(body: bytes, size: int = 1000) -> bytes:
    """`body` in HTTP/1.1's chunked coding."""
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def exchange(port: int, raw: bytes, *, method: str = "POST", timeout_s: float = TIMEOUT_S) -> Answer:
    """Send `raw` on a connection of its own and read the answer."""
    with Connection(port, timeout_s) as connection:
        connection.send(raw)
        return connection.answer(method)


@dataclass(slots=True)
class _Http2Stream:
    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytearray = field(default_factory=bytearray)
    reset: bool = False
    ended: bool = False


def exchange_http2(
    port: int,
    headers: Pairs,
    body: bytes = b"",
    *,
    trailers: Pairs = (),
    ends: bool = True,
    timeout_s: float = TIMEOUT_S,
) -> Answer:
    """One request over HTTP/2 with prior knowledge; `headers` hold the pseudo-headers too, and nothing checks them.

    With `ends=False` the request stays open, as if more were to come. Raises NoAnswerError where the stream or the
    connection is reset.
    """
    settings = h2.config.H2Configuration(
        client_side=True,
        header_encoding="latin-1",
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )
    connection = h2.connection.H2Connection(settings)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout_s) as wire:
        connection.initiate_connection()
        connection.send_headers(1, list(headers), end_stream=ends and not body and not trailers)
        for at in range(0, len(body), 16384):
            piece = body[at : at + 16384]
            is_last = at + len(piece) == len(body)
            connection.send_data(1, piece, end_stream=ends and is_last and not trailers)
        if trailers:
            connection.send_headers(1, list(trailers), end_stream=True)
        wire.sendall(connection.data_to_send())
        stream = _Http2Stream()
        while not stream.ended:
            data = wire.recv(1 << 16)
            if not data:
                raise NoAnswerError(bytes(stream.body))
            for event in connection.receive_data(data):
                _note(event, stream)
            wire.sendall(connection.data_to_send())
    if stream.reset and not stream.status:
        raise NoAnswerError(bytes(stream.body))
    return Answer(stream.status, stream.headers, bytes(stream.body), (), time.monotonic() - began)


def _note(event: h2.events.Event, stream: _Http2Stream) -> None:
    match event:
        case h2.events.ResponseReceived(headers=headers):
            pairs = tuple((str(name), str(value)) for name, value in headers or ())
            stream.status = int(dict(pairs)[":status"])
            stream.headers = tuple(pair for pair in pairs if not pair[0].startswith(":"))
        case h2.events.DataReceived(data=data):
            stream.body += data or b""
        case h2.events.StreamReset() | h2.events.ConnectionTerminated():
            stream.reset = stream.ended = True
        case h2.events.StreamEnded():
            stream.ended = True
