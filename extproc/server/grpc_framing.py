"""gRPC's framing over HTTP/2, without I/O: length-prefixed messages, headers and the status in the trailers.

Between `ngh2_connection` and the bytes (grpc/doc/PROTOCOL-HTTP2.md). The surprising thing: a message that comes alone in
one DATA frame, as nearly all of Envoy's do, is one slice of it; only what is split or packed is gathered in a buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from extproc.server.transport import Replies, Status, StatusError

Headers = Sequence[tuple[bytes, bytes]]

HEADERS: Headers = ((b":status", b"200"), (b"content-type", b"application/grpc"))
OK: Headers = ((b"grpc-status", b"0"),)
_PREFIX_BYTES = 5
_COPIED_BYTES = 1 << 14
_CONTENT_TYPE = b"application/grpc"
_PLAIN = frozenset(range(0x20, 0x7F)) - {ord("%")}


class Messages:
    """The messages of one stream, from the bytes of its DATA frames. `len` is what waits to become whole."""

    __slots__ = ("_max_message_bytes", "_rest")

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._rest: bytes | bytearray = b""

    def __len__(self) -> int:
        return len(self._rest)

    def feed(self, data: bytes) -> None:
        """Add the bytes of a DATA frame."""
        rest = self._rest
        if not rest:
            self._rest = data
            return
        if isinstance(rest, bytes):
            self._rest = rest = bytearray(rest)
        rest += data

    def take(self) -> bytes | None:
        """The next whole message, or None. Raises StatusError for one that is compressed or too large."""
        rest = self._rest
        if len(rest) < _PREFIX_BYTES:
            return None
        if rest[0]:
            raise StatusError(Status.UNIMPLEMENTED, "compressed messages are not taken")
        end = _PREFIX_BYTES + int.from_bytes(rest[1:_PREFIX_BYTES], "big")
        if end - _PREFIX_BYTES > self._max_message_bytes:
            raise StatusError(Status.RESOURCE_EXHAUSTED, f"a message may have at most {self._max_message_bytes} bytes")
        if len(rest) < end:
            return None
        if len(rest) == end and isinstance(rest, bytes):
            self._rest = b""
            return rest[_PREFIX_BYTES:]
        if isinstance(rest, bytes):
            self._rest = rest = bytearray(rest)
        with memoryview(rest) as view, view[_PREFIX_BYTES:end] as part:
            message = bytes(part)
        del rest[:end]  # bytearray moves its start, not its bytes
        return message

    def clear(self) -> None:
        """Forget what waits."""
        self._rest = b""


class LazyMetadata(Mapping[str, str]):
    """A request's headers as gRPC metadata, decoded only where one is asked for."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[bytes, bytes]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        return self._fields[name.encode()].decode("latin-1")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.encode() in self._fields

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def refused_as_http(fields: Mapping[bytes, bytes]) -> Headers | None:
    """What a request that is not gRPC at all gets, or None: 405 or 415, as the specification says."""
    if fields.get(b":method") != b"POST":
        return ((b":status", b"405"), (b"allow", b"POST"))
    kind, rest = fields.get(b"content-type", b"")[:16], fields.get(b"content-type", b"")[16:17]
    if kind != _CONTENT_TYPE or rest not in (b"", b"+", b";"):
        return ((b":status", b"415"),)
    return None


def framed(reply: bytes) -> Replies:
    """A reply with its prefix, in pieces to be sent one after another; a large one is not copied."""
    prefix = b"\0" + len(reply).to_bytes(4, "big")
    return (prefix + reply,) if len(reply) < _COPIED_BYTES else (prefix, reply)


def trailers(error: StatusError) -> Headers:
    """Status and message, the latter percent-encoded UTF-8 (PROTOCOL-HTTP2.md, Status-Message)."""
    message = b"".join(
        byte.to_bytes() if byte in _PLAIN else b"%%%02X" % byte for byte in error.message.encode(errors="replace")
    )
    return ((b"grpc-status", b"%d" % error.status), (b"grpc-message", message))
