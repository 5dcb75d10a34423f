"""What a hostile HTTP/2 peer may send, as bytes after a good preface, and what else may reach a socket.

Each attack is endless or large; whoever uses it stops when the server has closed. HPACK is written by hand, so that
nothing but these bytes decides what is sent (RFC 7541).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.ngh2_peer import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    prefixed,
)
from tests.transports import BIDI, SHOUT

HELLO = PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, ACK, 0)
"""With the acknowledgement that opens the windows to their full size."""
_PRIORITY_UPDATE = 0x10


def _literal(name: bytes, value: bytes) -> bytes:
    def text(data: bytes) -> bytes:
        length = len(data)
        if length < 127:
            return bytes([length]) + data
        rest, encoded = length - 127, bytearray([127])
        while rest >= 128:
            encoded.append(rest % 128 + 128)
            rest //= 128
        encoded.append(rest)
        return bytes(encoded) + data

    return b"\0" + text(name) + text(value)


def block(path: str = BIDI, *more: tuple[bytes, bytes]) -> bytes:
    """The header block of a gRPC request, without any compression."""
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"test"),
        (b"content-type", b"application/grpc"),
        *more,
    ]
    return b"".join(_literal(name, value) for name, value in fields)


def _streams() -> Iterator[int]:
    return iter(range(1, 1 << 30, 2))


def rapid_reset() -> Iterator[bytes]:
    for stream in _streams():
        yield frame(HEADERS, END_HEADERS, stream, block()) + frame(RST_STREAM, 0, stream, bytes(4))


def reset_inside_a_message() -> Iterator[bytes]:
    for stream in _streams():
        yield frame(HEADERS, END_HEADERS, stream, block())
        yield frame(DATA, 0, stream, prefixed(bytes(64))[:-1]) + frame(RST_STREAM, 0, stream, bytes(4))


def settings() -> Iterator[bytes]:
    while True:
        yield frame(SETTINGS, 0, 0, bytes((0, 4, 0, 1, 0, 0)))


def pings() -> Iterator[bytes]:
    while True:
        yield frame(PING, 0, 0, bytes(8))


def empty_data() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, block())
    while True:
        yield frame(DATA, 0, 1)


def empty_messages() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, block())
    for _ in range(200):
        yield frame(DATA, 0, 1, bytes(16_000))


def continuations() -> Iterator[bytes]:
    yield frame(HEADERS, 0, 1, block())
    while True:
        yield frame(CONTINUATION, 0, 1, _literal(b"x-more", bytes(100)))


def empty_continuations() -> Iterator[bytes]:
    yield frame(HEADERS, 0, 1, block())
    while True:
        yield frame(CONTINUATION, 0, 1)


def huge_headers() -> Iterator[bytes]:
    big = block(BIDI, *((b"x-%d" % number, b"v" * 1000) for number in range(90)))
    yield frame(HEADERS, 0, 1, big[:16_000])
    for start in range(16_000, len(big), 16_000):
        yield frame(CONTINUATION, END_HEADERS if start + 16_000 >= len(big) else 0, 1, big[start : start + 16_000])


def many_headers() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, block(BIDI, *((b"x", b"") for _ in range(2000))))


def hpack_bomb() -> Iterator[bytes]:
    entry = b"\x40" + _literal(b"x-bomb", b"b" * 3900)[1:]
    for stream in _streams():
        yield frame(HEADERS, END_HEADERS, stream, block() + (entry if stream == 1 else b"") + b"\xbe" * 12_000)


def broken_hpack() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff")


def table_size_updates() -> Iterator[bytes]:
    for stream in _streams():
        yield frame(HEADERS, END_HEADERS, stream, b"\x20" * 16_000 + block())


def tiny_window_updates() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, block())
    for _ in range(100_000):
        yield frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1") + frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1")


def overflowing_window() -> Iterator[bytes]:
    while True:
        yield frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff")


def zero_window_update() -> Iterator[bytes]:
    while True:
        yield frame(WINDOW_UPDATE, 0, 0, bytes(4))


def priorities() -> Iterator[bytes]:
    for stream in _streams():
        yield frame(PRIORITY, 0, stream, b"\0\0\0\0\1")


def priority_updates() -> Iterator[bytes]:
    for stream in _streams():
        yield frame(_PRIORITY_UPDATE, 0, 0, stream.to_bytes(4, "big") + b"u=1")


def unknown_frames() -> Iterator[bytes]:
    while True:
        yield frame(0xEE, 0xFF, 7, bytes(100))


def zero_window() -> Iterator[bytes]:
    yield frame(SETTINGS, 0, 0, bytes((0, 4, 0, 0, 0, 0)))
    for stream in _streams():
        if stream > 4000:
            return
        yield frame(HEADERS, END_HEADERS, stream, block())
        yield frame(DATA, END_STREAM, stream, prefixed(bytes(16_000)))


def data_on_closed_streams() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, block(SHOUT)) + frame(DATA, END_STREAM, 1, prefixed(b"a"))
    while True:
        yield frame(DATA, 0, 1, bytes(16_000))


def data_on_reset_streams() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, block()) + frame(RST_STREAM, 0, 1, bytes(4))
    for _ in range(20_000):
        yield frame(DATA, 0, 1, bytes(16_000))


def data_on_answered_streams() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, block(SHOUT)) + frame(DATA, 0, 1, prefixed(b"a"))
    for _ in range(20_000):
        yield frame(DATA, 0, 1, bytes(16_000))


def more_than_the_window() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, block()) + frame(DATA, 0, 1, prefixed(b"wait"))
    while True:
        yield frame(DATA, 0, 1, bytes(16_000))


def too_many_streams() -> Iterator[bytes]:
    for stream in _streams():
        if stream > 60_000:
            return
        yield frame(HEADERS, END_HEADERS, stream, block())


def never_whole_messages() -> Iterator[bytes]:
    for stream in _streams():
        if stream > 8_000:
            return
        yield frame(HEADERS, END_HEADERS, stream, block())
        yield frame(DATA, 0, stream, prefixed(bytes(16_300))[:16_300])


def unknown_methods() -> Iterator[bytes]:
    for stream in _streams():
        if stream > 8_000:
            return
        yield frame(HEADERS, END_HEADERS | END_STREAM, stream, block("/no/such"))


def broken_sessions() -> Iterator[bytes]:
    for stream in _streams():
        if stream > 400:
            return
        yield frame(HEADERS, END_HEADERS, stream, block()) + frame(DATA, END_STREAM, stream, prefixed(b"break"))


def even_stream() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 2, block())


def backward_stream() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 9, block()) + frame(HEADERS, END_HEADERS, 5, block())


def data_on_stream_zero() -> Iterator[bytes]:
    yield frame(DATA, 0, 0, b"abc")


def data_on_idle_stream() -> Iterator[bytes]:
    yield frame(DATA, 0, 77, b"abc")


def reset_of_idle_stream() -> Iterator[bytes]:
    yield frame(RST_STREAM, 0, 77, bytes(4))


def push_from_a_client() -> Iterator[bytes]:
    yield frame(PUSH_PROMISE, END_HEADERS, 1, bytes((0, 0, 0, 2)) + block())


def oversized_frame() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, block()) + frame(DATA, 0, 1, bytes(1 << 20))


def bad_padding() -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, block()) + frame(DATA, 0x8, 1, b"\xff123")


def settings_out_of_range() -> Iterator[bytes]:
    yield frame(SETTINGS, 0, 0, bytes((0, 4, 0xFF, 0xFF, 0xFF, 0xFF)))


def settings_of_odd_length() -> Iterator[bytes]:
    yield frame(SETTINGS, 0, 0, bytes(5))


def acknowledged_settings_with_payload() -> Iterator[bytes]:
    yield frame(SETTINGS, 1, 0, bytes(6))


def goaway_then_more() -> Iterator[bytes]:
    yield frame(GOAWAY, 0, 0, bytes(8))
    yield from too_many_streams()


def wrong_content_length() -> Iterator[bytes]:
    for stream in _streams():
        if stream > 40_000:
            return
        yield frame(HEADERS, END_HEADERS, stream, block(BIDI, (b"content-length", b"5")))
        yield frame(DATA, END_STREAM, stream, prefixed(bytes(100)))


def upper_case_headers() -> Iterator[bytes]:
    for stream in _streams():
        if stream > 40_000:
            return
        yield frame(HEADERS, END_HEADERS, stream, block(BIDI, (b"X-Upper", b"1")))


ATTACKS: tuple[Callable[[], Iterator[bytes]], ...] = (
    rapid_reset, reset_inside_a_message, settings, pings, empty_data, empty_messages, continuations,
    empty_continuations, huge_headers, many_headers, hpack_bomb, broken_hpack, table_size_updates, tiny_window_updates,
    overflowing_window, zero_window_update, priorities, priority_updates, unknown_frames, zero_window,
    data_on_closed_streams, data_on_reset_streams, data_on_answered_streams, more_than_the_window, too_many_streams,
    never_whole_messages, unknown_methods, broken_sessions, even_stream, backward_stream, data_on_stream_zero,
    data_on_idle_stream, reset_of_idle_stream, push_from_a_client, oversized_frame, bad_padding, settings_out_of_range,
    settings_of_odd_length, acknowledged_settings_with_payload, goaway_then_more, wrong_content_length,
    upper_case_headers,
)  # fmt: skip

STRANGERS: dict[str, bytes] = {
    "an HTTP/1 request": b"POST /test.Calls/Bidi HTTP/1.1\r\nHost: test\r\nContent-Length: 3\r\n\r\nabc",
    "an upgrade": b"GET / HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "a TLS hello": bytes.fromhex("160301020001000001fc0303") + bytes(500),
    "zeros": bytes(100_000),
    "a preface that goes wrong": PREFACE[:20] + b"XX\r\n\r\n",
    "a preface and noise": PREFACE + bytes(range(256)) * 100,
    "a preface without settings": PREFACE + frame(PING, 0, 0, bytes(8)),
    "lines": b"\r\n" * 1000,
}
