"""Any bytes at all, and any order of legal events, against the libnghttp2 transport in memory.

After each example: nothing was raised, nothing was logged as our own error, no stream or task is left, and a new
connection is answered.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import ngh2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extproc.server.ngh2_connection import Connection
from extproc.server.ngh2_stream import Limits, Wire
from tests.hostile import HELLO, block
from tests.ngh2_peer import DATA, HEADERS, MESSAGE_LIMIT, RST_STREAM, SETTINGS, Peer, Wires, frame, prefixed
from tests.transports import BIDI, BROKEN, COLLECT, META, REFUSED, SHOUT, Calls

PATHS = (BIDI, COLLECT, SHOUT, META, REFUSED, BROKEN, "/unknown")
WORDS = (
    *(b"a", b"", b"sleep", b"wait", b"mend", b"count", b"spin", b"done", b"late-done"),
    *(b"refuse", b"late-refuse", b"break", b"late-break", b"cancel", b"late-cancel"),
)
EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@contextmanager
def no_error_of_ours() -> Iterator[None]:
    """Sessions may fail, that is what some are for; the connection may not."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    loggers = [logging.getLogger(name) for name in ("extproc.server.ngh2_connection", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert records == []


class Window:
    """How many bytes came as DATA, and how many of them were acknowledged."""

    def __init__(self) -> None:
        self.received = 0
        self.acknowledged = 0

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator[Window]:
        window, on_data, acknowledge = cls(), Connection._on_data, Wire.acknowledge

        def receive(connection: Connection, stream_id: int, data: bytes, *, ends: bool) -> None:
            window.received += len(data)
            on_data(connection, stream_id, data, ends=ends)

        def give_back(wire: Wire, stream_id: int, amount: int) -> None:
            window.acknowledged += amount
            acknowledge(wire, stream_id, amount)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Connection, "_on_data", receive)
            patch.setattr(Wire, "acknowledge", give_back)
            yield window


async def _survives(reads: list[bytes]) -> None:
    """Feed `reads`, lose the connection, and see what is left; then be of use to someone else."""
    before = asyncio.all_tasks()
    calls, all_ = Calls(), set[Connection]()
    methods = {method.path.encode(): method for method in calls.methods()}
    connection = Connection(methods, Limits(1 << 20, gathered_bytes=1 << 21, queued_bytes=1 << 20), all_)
    wires = Wires(connection)
    with no_error_of_ours():
        connection.connection_made(wires)
        for number, read in enumerate(reads):
            connection.data_received(read)
            wires.take()
            if number % 3 == 0:
                calls.let_go()
                await asyncio.sleep(0)
        connection.connection_lost(None)
        calls.let_go()
        for _ in range(4):
            await asyncio.sleep(0)
    assert not connection._streams
    assert not all_
    assert connection._wire.gathered_bytes == 0
    assert asyncio.all_tasks() == before
    peer = Peer()
    stream_id = peer.open(BIDI, b"alive", b"done")
    peer.pump()
    assert peer.heard[stream_id].messages == [b"alive", b"done"]


@functools.cache
def _valid() -> bytes:
    """What a client that does everything right sends: all methods and words, large and small, ends and resets."""

    async def record() -> bytes:
        peer = Peer()
        sent = bytearray()
        keep = peer.server.data_received

        def listen(data: bytes) -> None:
            sent.extend(data)
            keep(data)

        peer.server.data_received = listen  # type: ignore[method-assign]
        for path in PATHS:
            peer.open(path, *WORDS[:3], ends=True)
            await peer.settle(2)
        for word in WORDS:
            stream_id = peer.open(BIDI, word, bytes(300), word)
            await peer.settle(2)
            peer.say(stream_id, b"more")
            if word == b"wait":
                peer.h2.reset_stream(stream_id)
            await peer.settle(2)
        peer.open(BIDI, bytes(100_000), ends=True)
        await peer.settle()
        peer.h2.ping()
        peer.h2.send_goaway()
        await peer.settle(2)
        peer.server.connection_lost(None)
        return HELLO + bytes(sent)

    with ThreadPoolExecutor(1) as elsewhere:  # this thread's loop is at work
        return elsewhere.submit(asyncio.run, record()).result()


@st.composite
def _mutated(draw: st.DrawFn) -> list[bytes]:
    data = bytearray(_valid())
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("flip", "delete", "insert", "repeat", "cut"))):
            case "flip" if at < len(data):
                data[at] ^= draw(st.integers(1, 255))
            case "delete":
                del data[at : at + draw(st.integers(1, 40))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=40))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 2000))]
            case "cut" if at > len(HELLO):
                del data[at:]
    return _cut(bytes(data), draw(st.lists(st.integers(0, 1 << 20), max_size=12)))


def _cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(each % (len(data) + 1) for each in at)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@EXAMPLES
@given(_mutated())
async def test_a_mutated_conversation_harms_no_one(reads: list[bytes]) -> None:
    await _survives(reads)


_STREAM_IDS = st.sampled_from((0, 1, 3, 5, 7, 2, 99, 0x7FFFFFFF))
_PAYLOADS = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(PATHS).map(block),
    st.sampled_from(WORDS).map(prefixed),
    st.integers(0, 0xFFFFFFFF).map(lambda number: number.to_bytes(4, "big")),
    st.tuples(st.integers(0, 9), st.integers(0, 0xFFFFFFFF)).map(
        lambda pair: pair[0].to_bytes(2, "big") + pair[1].to_bytes(4, "big")
    ),
)
_ANY_FRAME = st.builds(frame, st.integers(0, 20), st.integers(0, 255), _STREAM_IDS, _PAYLOADS)
_LIKELY_FRAME = st.one_of(
    st.builds(frame, st.just(HEADERS), st.sampled_from((4, 5)), _STREAM_IDS, st.sampled_from(PATHS).map(block)),
    st.builds(frame, st.just(DATA), st.sampled_from((0, 0, 1)), _STREAM_IDS, _PAYLOADS),
    st.builds(frame, st.just(RST_STREAM), st.just(0), _STREAM_IDS, st.just(bytes(4))),
    st.builds(frame, st.just(SETTINGS), st.just(0), st.just(0), st.just(bytes((0, 4, 0, 0, 0, 9)))),
)


@EXAMPLES
@given(
    st.lists(st.one_of(_LIKELY_FRAME, _LIKELY_FRAME, _ANY_FRAME), max_size=40),
    st.lists(st.integers(0, 1 << 20), max_size=8),
)
async def test_any_frames_in_any_order_harm_no_one(frames: list[bytes], cuts: list[int]) -> None:
    await _survives(_cut(HELLO + b"".join(frames), cuts))


@EXAMPLES
@given(st.lists(st.binary(max_size=200), max_size=8), st.booleans())
async def test_any_bytes_harm_no_one(reads: list[bytes], greets: bool) -> None:
    await _survives([HELLO, *reads] if greets else reads)


_STEPS = st.one_of(
    st.tuples(st.just("open"), st.sampled_from(PATHS), st.lists(st.sampled_from(WORDS), max_size=3)),
    st.tuples(st.just("say"), st.integers(0, 5), st.sampled_from((*WORDS, bytes(70_000)))),
    st.tuples(st.just("say"), st.integers(0, 5), st.sampled_from((*WORDS, bytes(70_000)))),
    st.tuples(st.sampled_from(("end", "reset")), st.integers(0, 5), st.none()),
    st.tuples(
        st.sampled_from(("let go", "stall", "read", "turn", "carry", "no window", "window")), st.none(), st.none()
    ),
)


@EXAMPLES
@given(st.lists(_STEPS, max_size=30))
async def test_any_order_of_legal_events_leaves_windows_whole_and_nothing_behind(steps: list[tuple[str, ...]]) -> None:
    before = asyncio.all_tasks()
    peer = Peer(limits=Limits(MESSAGE_LIMIT, gathered_bytes=1 << 22, queued_bytes=1 << 17))
    live: list[int] = []
    with no_error_of_ours(), Window.watched() as window:
        for step in steps:
            await _take(peer, live, step)
        peer.wires.stalled = False
        peer.h2.update_settings({4: 1 << 16})
        for _ in range(4):
            await peer.settle()
            peer.calls.let_go()
        for stream_id in live:
            peer.h2.reset_stream(stream_id)
        await peer.settle()
        assert not peer.server._streams
        assert peer.server._wire.gathered_bytes == 0
        assert not peer.server._wire.choked
        assert not peer.wires.closing
        assert peer.wires.reading
        assert not peer.server._h2.queued_body_size()
        assert window.received == window.acknowledged
        last = peer.open(BIDI, b"alive", bytes(1 << 20), b"done")
        await peer.settle()
        assert peer.heard[last].messages == [b"alive", bytes(1 << 20), b"done"]
    assert asyncio.all_tasks() == before


async def _take(peer: Peer, live: list[int], step: tuple[object, ...]) -> None:
    match step:
        case ("open", str() as path, list() as words):
            live.append(peer.open(path, *words))
        case ("reset", int() as index, _) if index < len(live):
            peer.h2.reset_stream(live.pop(index))
        case ("say" | "end" as what, int() as index, word) if index < len(live):
            with suppress(ngh2.StreamProtocolError):  # the stream is over, and the client's side knows
                peer.say(live[index], *([word] if isinstance(word, bytes) else []), ends=what == "end")
        case ("let go", *_):
            peer.calls.let_go()
        case ("stall", *_):
            peer.wires.stalled = True
        case ("read", *_):
            peer.wires.stalled = False
        case ("turn", *_):
            await asyncio.sleep(0)
        case ("carry", *_):
            peer.pump()
        case ("window", int() as size, _):
            peer.h2.update_settings({4: size})
