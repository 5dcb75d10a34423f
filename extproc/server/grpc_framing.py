"""gRPC's framing over HTTP/2, without I/O: length-prefixed messages, headers and the status in the trailers.

Between `ngh2_stream` and the bytes (grpc/doc/PROTOCOL-HTTP2.md). The surprising thing: a message that comes alone in
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
_CONTENT_TYPES = (b"application/grpc+", b"application/grpc;")
_PLAIN = frozenset(range(0x20, 0x7F)) - {ord("%")}


class Messages:
    """The messages of one stream, from the bytes of its DATA frames. `rest` is what waits to be taken."""

    __slots__ = ("_max_message_bytes", "rest")

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self.rest: bytes | bytearray = b""

    def feed(self, data: bytes) -> None:
        """Add the bytes of a DATA frame."""
        rest = self.rest
        if not rest:
            self.rest = data
            return
        if isinstance(rest, bytes):
            self.rest = rest = bytearray(rest)
        rest += data

    def take(self) -> bytes | None:
        """The next whole message, or None. Raises StatusError for one that is compressed or too large."""
        rest = self.rest
        there = len(rest)
        if there < _PREFIX_BYTES:
            return None
        if rest[0]:
            raise StatusError(Status.UNIMPLEMENTED, "compressed messages are not taken")
        size = int.from_bytes(rest[1:_PREFIX_BYTES], "big")
        if size > self._max_message_bytes:
            raise StatusError(Status.RESOURCE_EXHAUSTED, f"a message may have at most {self._max_message_bytes} bytes")
        end = _PREFIX_BYTES + size
        if there < end:
            return None
        if isinstance(rest, bytes):
            if there == end:
                self.rest = b""
                return rest[_PREFIX_BYTES:]
            self.rest = rest = bytearray(rest)
        with memoryview(rest) as view, view[_PREFIX_BYTES:end] as part:
            message = bytes(part)
        del rest[:end]  # bytearray moves its start, not its bytes
        return message

    def clear(self) -> None:
        """Forget what waits."""
        self.rest = b""


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
    kind = fields.get(b"content-type", b"")
    if kind != _CONTENT_TYPE and not kind.startswith(_CONTENT_TYPES):
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
