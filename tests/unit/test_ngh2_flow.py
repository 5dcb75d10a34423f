"""Flow control on libnghttp2, in memory: what a peer may send, and what it does not read."""

from __future__ import annotations

import asyncio

import ngh2
import pytest

from extproc.server.ngh2_stream import Limits
from tests.ngh2_peer import (
    MESSAGE_LIMIT,
    Peer,
    prefixed,
    request_headers,
)
from tests.transports import BIDI, BROKEN

MB = 1 << 20


# What the peer may send


async def test_the_window_of_a_stream_closes_while_its_session_waits_and_opens_again_once() -> None:
    peer = Peer()
    stream_id = peer.open(BIDI, b"wait", ends=False)
    await peer.settle()
    peer.say(stream_id, *[bytes(64 * 1024)] * 40, ends=True)
    await peer.settle()
    assert peer.h2.stream_remote_window_size(stream_id) == 0
    assert 0 < peer.h2.queued_body_size(stream_id) < 40 * 64 * 1024
    peer.calls.let_go()
    await peer.settle()
    assert peer.heard[stream_id].messages == [b"wait", *[bytes(64 * 1024)] * 40, b"finished"]
    assert peer.h2.queued_body_size() == 0


@pytest.mark.parametrize("ending", ["reset", "refuse", "late error", "too much"])
async def test_bytes_held_for_a_stream_that_ends_early_leave_the_connections_window_whole(ending: str) -> None:
    """A hundred and fifty megabytes through a window of sixty-four: held bytes that were lost would stop it."""
    limits = Limits(MESSAGE_LIMIT, gathered_bytes=MB // 2) if ending == "too much" else None
    peer = Peer(limits=limits)
    for _ in range(150):
        stream_id = peer.open(BIDI, b"late-break" if ending == "late error" else b"wait")
        peer.pump()
        peer.say(stream_id, bytes(MB - 4096))
        peer.pump()
        if ending != "too much":
            assert peer.h2.queued_body_size(stream_id) == 0, "the window of the connection is used up"
        if ending == "refuse":
            peer.h2.send_data(stream_id, b"\1\0\0\0\0")
            peer.calls.let_go()
        if ending == "late error":
            await asyncio.sleep(0.0012)
        else:
            await peer.settle(2)
        peer.h2.reset_stream(stream_id, ngh2.ErrorCode.CANCEL)
        peer.pump()
    await peer.settle()
    assert not peer.server._streams
    assert peer.server._wire.gathered_bytes == 0
    assert await peer.is_served()
    after = peer.open(BIDI, *[bytes(MB // 4)] * 12, b"done")
    await peer.settle()
    assert peer.heard[after].messages == [*[bytes(MB // 4)] * 12, b"done"]


async def test_data_of_a_stream_that_was_answered_leaves_the_connections_window_whole() -> None:
    peer = Peer()
    for word in (b"done", b"refuse"):
        stream_id = peer.open(BIDI, word)
        peer.pump()
        for _ in range(80):
            peer.say(stream_id, bytes(MB))
            peer.pump()
        assert peer.h2.queued_body_size() == 0
    broken = peer.open(BROKEN, *[bytes(MB)] * 80)
    peer.pump()
    assert peer.heard[broken].status == 13
    assert await peer.is_served()


async def test_messages_that_never_become_whole_fail_beyond_the_limit_and_free_what_they_held() -> None:
    peer = Peer(limits=Limits(MESSAGE_LIMIT, gathered_bytes=8 * MB))
    streams = [peer.open() for _ in range(12)]
    for stream_id in streams:
        peer.h2.send_data(stream_id, prefixed(bytes(MB))[:-1])
        peer.pump()
    failed = [stream_id for stream_id in streams if peer.heard[stream_id].status == 8]
    assert len(failed) == 5, "the first seven of almost a megabyte fit, and freed bytes can be used again"
    assert peer.server._wire.gathered_bytes <= 8 * MB
    for stream_id in set(streams) - set(failed):
        peer.h2.send_data(stream_id, b"\0", end_stream=True)
    await peer.settle()
    assert all(peer.heard[stream_id].status == 0 for stream_id in set(streams) - set(failed))
    assert peer.server._wire.gathered_bytes == 0


# What the peer does not read


async def test_answers_that_no_one_reads_close_the_peers_windows_and_open_them_when_read() -> None:
    peer = Peer(limits=Limits(MESSAGE_LIMIT, queued_bytes=4 * MB), settings={4: 0})
    streams = [peer.open(BIDI, *[bytes(MB // 2)] * 8, b"done") for _ in range(8)]
    await peer.settle()
    queued = peer.server._h2.queued_body_size()
    assert 4 * MB < queued <= 4 * MB + 8 * 1.5 * MB
    assert peer.h2.queued_body_size() > 0, "the peer still wants to send"
    peer.h2.update_settings({4: 1 << 20})
    await peer.settle()
    assert all(peer.heard[stream_id].messages == [*[bytes(MB // 2)] * 8, b"done"] for stream_id in streams)
    assert peer.server._h2.queued_body_size() == 0
    assert await peer.is_served()


async def test_many_small_answers_count_by_their_number() -> None:
    peer = Peer(limits=Limits(MESSAGE_LIMIT, queued_pieces=100), settings={4: 0})
    stream_id = peer.open(BIDI, *[b"small"] * 90)
    peer.pump()
    assert not peer.server._wire.choked
    peer.say(stream_id, *[b"small"] * 90)
    peer.pump()
    assert peer.server._wire.choked
    peer.h2.update_settings({4: 1 << 16})
    peer.pump()
    assert not peer.server._wire.choked
    assert peer.heard[stream_id].messages == [b"small"] * 180


async def _choked(peer: Peer) -> int:
    """A stream whose answer the peer takes no part of."""
    peer.h2.update_settings({4: 0})
    stream_id = peer.open(BIDI, bytes(MB // 4))
    peer.pump()
    assert peer.server._wire.choked
    return stream_id


async def test_a_session_that_waited_opens_no_window_while_answers_are_not_read() -> None:
    peer = Peer(limits=Limits(MESSAGE_LIMIT, queued_bytes=MB // 8))
    waits = peer.open(BIDI, b"wait")
    peer.pump()
    stuck = await _choked(peer)
    peer.say(waits, bytes(700_000))
    peer.pump()
    peer.calls.let_go()
    await peer.settle()
    assert peer.h2.stream_remote_window_size(waits) < MB // 2
    peer.h2.update_settings({4: MB})
    await peer.settle()
    assert peer.h2.stream_remote_window_size(waits) > MB // 2
    assert peer.heard[waits].messages == [b"wait", bytes(700_000)]
    assert peer.heard[stuck].messages == [bytes(MB // 4)]


async def test_windows_are_opened_the_moment_that_answers_are_read() -> None:
    peer = Peer(limits=Limits(MESSAGE_LIMIT, queued_bytes=MB // 8), auto_window_update=False)
    peer.h2.set_local_window_size(1 << 30)
    other = peer.open(BIDI)
    peer.pump()
    await _choked(peer)
    peer.say(other, *[bytes(1000)] * 700)
    peer.pump()
    held = peer.h2.stream_remote_window_size(other)
    peer.h2.update_settings({4: 1 << 30})
    peer.server.data_received(peer.h2.data_to_send())
    peer.h2.receive_data(peer.wires.take())
    assert peer.h2.stream_remote_window_size(other) > held


async def test_bytes_of_a_stream_that_broke_the_rules_are_given_back_at_once() -> None:
    peer = Peer()
    declared = request_headers(BIDI, (b"content-length", b"%d" % (700_000 + 9)))
    streams = [peer.open(BIDI, b"wait", headers=declared) for _ in range(60)]
    peer.pump()
    for stream_id in streams:
        peer.h2.send_data(stream_id, bytes(700_000))
    peer.pump()
    assert peer.h2.remote_window_size < 32 * MB
    for stream_id in streams:
        peer.h2.send_data(stream_id, b"one more")
    peer.server.data_received(peer.h2.data_to_send())
    peer.h2.receive_data(peer.wires.take())
    assert peer.h2.remote_window_size > 32 * MB
    await peer.settle()
    assert peer.calls.cancelled == 60


async def test_a_full_socket_stops_reading_and_an_empty_one_begins_again() -> None:
    peer = Peer(settings={4: (1 << 31) - 1})
    peer.h2.set_local_window_size((1 << 31) - 1)
    peer.pump()
    peer.wires.stalled = True
    streams = [peer.open(BIDI, bytes(MB // 2), b"done") for _ in range(30)]
    await peer.settle()
    assert not peer.wires.reading
    assert len(peer.wires.written) < 2 * MB
    peer.wires.stalled = False
    await peer.settle()
    assert peer.wires.reading
    assert all(peer.heard[stream_id].messages == [bytes(MB // 2), b"done"] for stream_id in streams)


async def test_a_task_that_answers_while_the_socket_is_full_is_heard_later() -> None:
    peer = Peer(settings={4: (1 << 31) - 1})
    peer.h2.set_local_window_size((1 << 31) - 1)
    waits = peer.open(BIDI, b"wait")
    peer.pump()
    peer.wires.stalled = True
    full = [peer.open(BIDI, *[bytes(MB // 4)] * 8, ends=True) for _ in range(3)]
    await peer.settle()
    assert not peer.wires.reading
    peer.calls.let_go()
    await peer.settle()
    assert peer.heard[waits].messages == []
    peer.wires.stalled = False
    peer.say(waits, ends=True)
    await peer.settle()
    assert peer.heard[waits].messages == [b"wait", b"finished"]
    assert [len(peer.heard[stream_id].messages) for stream_id in full] == [9] * 3


async def test_an_answer_no_one_takes_is_given_up_after_two_ticks() -> None:
    peer = Peer(limits=Limits(MESSAGE_LIMIT, ping_every_s=0.02), settings={4: 0})
    stuck = [peer.open(BIDI, bytes(MB), b"done") for _ in range(3)]
    open_ = peer.open(BIDI, b"wait")
    for _ in range(40):
        await asyncio.sleep(0.005)
        peer.pump()
    assert [peer.heard[stream_id].reset_code for stream_id in stuck] == [ngh2.ErrorCode.CANCEL] * 3
    assert peer.heard[open_].reset_code is None
    assert list(peer.server._streams) == [open_]
    assert peer.server._h2.queued_body_size() == 0


async def test_a_stream_whose_client_never_ends_its_side_is_given_up_too() -> None:
    peer = Peer(limits=Limits(MESSAGE_LIMIT, ping_every_s=0.02))
    streams = [peer.open(BIDI, b"done"), peer.open("/unknown"), peer.open(BIDI, b"refuse")]
    for _ in range(40):
        await asyncio.sleep(0.005)
        peer.pump()
    assert not peer.server._streams
    assert [peer.heard[stream_id].status for stream_id in streams] == [0, 12, 5]
    assert await peer.is_served()
