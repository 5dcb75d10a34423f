"""The life of streams and connections on libnghttp2, in memory: resets, drains, silence, loss."""

from __future__ import annotations

import asyncio
import gc
import weakref

import ngh2
import pytest

from extproc.server.ngh2_stream import Limits
from tests.ngh2_peer import (
    ACK,
    DATA,
    END_STREAM,
    HEADERS,
    MESSAGE_LIMIT,
    PING,
    SETTINGS,
    Peer,
    frame,
    prefixed,
)
from tests.transports import BIDI, BROKEN, SHOUT

MB = 1 << 20


async def test_a_reset_cancels_what_waits_and_lets_its_session_go() -> None:
    peer = Peer()
    streams = [peer.open(BIDI, b"wait"), peer.open(SHOUT, b"wait"), peer.open(BIDI, b"count")]
    streams.append(peer.open(BIDI, b"spin"))
    await peer.settle()
    for _ in range(20):
        await asyncio.sleep(0.001)
        peer.pump()
    assert len(peer.calls.waiting) == 3
    for stream_id in streams:
        peer.h2.reset_stream(stream_id)
    await peer.settle()
    assert peer.calls.cancelled == 4
    assert not peer.server._streams
    assert peer.calls.finished == 0, "finish is for clients that ended their side"
    assert await peer.is_served()


@pytest.mark.parametrize("word", [b"cancel", b"late-cancel"])
async def test_a_session_whose_own_work_is_cancelled_is_an_internal_error(word: bytes) -> None:
    peer = Peer()
    stream_id = peer.open(BIDI, b"a", word, b"b")
    await peer.settle()
    assert peer.heard[stream_id].messages == [b"a"]
    assert peer.heard[stream_id].status == 13
    assert await peer.is_served()


async def test_a_lost_connection_cancels_what_waits_and_leaves_nothing() -> None:
    peer = Peer()
    before = asyncio.all_tasks()
    for _ in range(5):
        peer.open(BIDI, b"wait")
    peer.open(BIDI, b"count")
    await peer.settle()
    assert len(asyncio.all_tasks() - before) == 6
    peer.server.connection_lost(ConnectionResetError())
    peer.calls.let_go()
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before
    assert not peer.all
    assert not peer.server._streams
    assert peer.server.closed.done()


async def test_a_connection_that_is_lost_while_a_task_is_about_to_answer_is_left_alone() -> None:
    peer = Peer()
    peer.open(BIDI, b"wait")
    peer.open(BIDI, b"sleep")
    await peer.settle(2)
    peer.calls.let_go()
    peer.server.connection_lost(None)
    await asyncio.sleep(0.01)
    assert not peer.wires.closing


@pytest.mark.parametrize("path", [BIDI, SHOUT, "/unknown", BROKEN])
async def test_a_request_and_its_reset_in_one_read_harm_no_one(path: str) -> None:
    peer = Peer()
    for _ in range(5):
        stream_id = peer.open(path, b"a", b"done")
        first = peer.h2.data_to_send()
        peer.h2.reset_stream(stream_id)
        peer.server.data_received(first + peer.h2.data_to_send())
    peer.pump()
    assert not peer.server._streams
    assert await peer.is_served()


async def test_a_stream_reset_at_any_frame_leaves_the_connection_alive() -> None:
    for frames in range(1, 8):
        peer = Peer()
        stream_id = peer.open()
        for number, message in enumerate([b"a", b"sleep", b"many", b"wait", b"b", b"late-done", b"c"]):
            if number == frames:
                break
            peer.say(stream_id, message)
            await peer.settle(2)
        peer.h2.reset_stream(stream_id)
        await peer.settle()
        assert not peer.server._streams
        assert await peer.is_served()


async def test_a_drain_takes_the_streams_that_cross_its_notice_and_then_no_more() -> None:
    peer = Peer()
    open_ = peer.open(BIDI, b"wait")
    peer.pump()
    peer.server.shut_down()
    crossing = peer.open(SHOUT, b"crossing")
    peer.server.data_received(peer.h2.data_to_send())  # sent before the notice was read
    peer.pump()
    assert peer.heard[crossing].messages == [b"CROSSING"]
    notices = [event.last_stream_id for event in peer.events if isinstance(event, ngh2.GoAwayReceived)]
    assert notices == [(1 << 31) - 1, crossing]
    assert not peer.h2.can_send_request
    late = frame(HEADERS, 0x5, crossing + 2, bytes([0x83, 0x86, 0x84]))
    peer.server.data_received(late)
    assert list(peer.server._streams) == [open_, crossing]
    assert not peer.wires.closing
    peer.calls.let_go()
    peer.say(open_, ends=True)
    peer.say(crossing, ends=True)
    await peer.settle()
    assert peer.heard[open_].messages == [b"wait", b"finished"]
    assert peer.wires.closing
    assert not peer.all


async def test_a_peers_goaway_lets_its_streams_end() -> None:
    peer = Peer()
    stream_id = peer.open(BIDI, b"wait")
    peer.pump()
    peer.h2.send_goaway()
    peer.pump()
    peer.calls.let_go()
    peer.say(stream_id, ends=True)
    await peer.settle()
    assert peer.heard[stream_id].messages == [b"wait", b"finished"]
    assert peer.wires.closing


async def test_a_peer_that_answers_no_ping_is_cut_and_one_that_does_is_not() -> None:
    limits = Limits(MESSAGE_LIMIT, ping_every_s=0.02)
    mute, lively = Peer(limits=limits), Peer(limits=limits)
    for _ in range(30):
        await asyncio.sleep(0.005)
        lively.pump()
    assert mute.wires.closing
    assert not mute.all
    assert not lively.wires.closing
    assert await lively.is_served()


async def test_a_peer_that_is_told_goodbye_and_reads_nothing_is_cut() -> None:
    peer = Peer(limits=Limits(MESSAGE_LIMIT, ping_every_s=0.02))
    aborted = []
    peer.wires.close = lambda: None  # type: ignore[method-assign]  # what is written is never read
    peer.wires.abort = lambda: aborted.append(1)  # type: ignore[method-assign]
    peer.feed(b"nonsense" * 10)
    await asyncio.sleep(0.05)
    assert aborted
    peer.server.connection_lost(None)


async def test_streams_leave_no_garbage_cycles_behind() -> None:
    peer = Peer()
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            peer.open(BIDI, b"a", b"done", ends=True)
            peer.open(SHOUT, b"a", ends=True)
            peer.open("/unknown", b"a", ends=True)
        peer.pump()
        peer.heard.clear()
        peer.events.clear()
        assert gc.collect() < 20
    finally:
        gc.enable()


async def test_a_closed_connection_is_freed_without_the_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        peer = Peer()
        peer.open(BIDI, b"wait")
        peer.open(BIDI, b"count")
        peer.open(BIDI, b"a")
        await peer.settle()
        gone = weakref.ref(peer.server)
        peer.server.connection_lost(None)
        await asyncio.sleep(0.01)
        del peer
        assert gone() is None
    finally:
        gc.enable()


# The bytes themselves


async def test_settings_and_pings_are_answered_and_windows_are_opened_at_once() -> None:
    peer = Peer(methods=[])
    assert peer.h2.remote_settings[ngh2.Setting.INITIAL_WINDOW_SIZE] == MB
    assert peer.h2.remote_settings[ngh2.Setting.MAX_CONCURRENT_STREAMS] == 10_000
    assert peer.h2.remote_window_size == 64 * MB
    raw = Peer()
    raw.server.data_received(frame(PING, 0, 0, b"12345678") + frame(SETTINGS, 0, 0))
    written = raw.wires.take()
    assert frame(PING, ACK, 0, b"12345678") in written
    assert frame(SETTINGS, ACK, 0) in written


async def test_a_padded_message_is_whole_and_its_padding_acknowledged() -> None:
    peer = Peer()
    stream_id = peer.open()
    peer.pump()
    body = prefixed(b"padded")
    for _ in range(20):
        peer.server.data_received(frame(DATA, 0x8, stream_id, bytes([200]) + body + bytes(200)))
    peer.server.data_received(frame(DATA, END_STREAM, stream_id))
    peer.pump()
    assert peer.heard[stream_id].messages == [*[b"padded"] * 20, b"finished"]


async def test_trailers_of_a_client_end_its_side() -> None:
    peer = Peer()
    stream_id = peer.open(BIDI, b"a")
    peer.h2.send_trailers(stream_id, [(b"x-checksum", b"1")])
    peer.pump()
    assert peer.heard[stream_id].messages == [b"a", b"finished"]
