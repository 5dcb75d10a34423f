"""Hostile peers against the libnghttp2 transport: nothing is raised, nothing grows, no one else notices."""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import ngh2
import pytest

from extproc.server.ngh2_connection import Connection
from extproc.server.ngh2_stream import Limits
from tests.hostile import ATTACKS, HELLO, STRANGERS, rapid_reset
from tests.ngh2_peer import MESSAGE_LIMIT, Peer, Wires
from tests.transports import BIDI, SHOUT, Calls, bidi, unary

pytestmark = pytest.mark.slow

MB = 1 << 20
ATTACK_BYTES = 3 * MB
CLOSED = {
    "rapid_reset", "reset_inside_a_message", "settings", "pings", "empty_data", "continuations", "empty_continuations",
    "huge_headers", "many_headers", "hpack_bomb", "broken_hpack", "overflowing_window", "zero_window_update",
    "priorities", "priority_updates", "unknown_frames", "data_on_closed_streams", "more_than_the_window",
    "too_many_streams", "even_stream", "data_on_stream_zero", "data_on_idle_stream",
    "reset_of_idle_stream", "push_from_a_client", "oversized_frame", "bad_padding", "settings_out_of_range",
    "settings_of_odd_length", "acknowledged_settings_with_payload", "goaway_then_more", "wrong_content_length",
    "upper_case_headers",
}  # fmt: skip


class Victim:
    """A server connection in memory whose peer reads all, and says only what a test feeds."""

    def __init__(self) -> None:
        self.calls = Calls()
        self.all: set[Connection] = set()
        methods = {method.path.encode(): method for method in self.calls.methods()}
        self.connection = Connection(methods, Limits(MESSAGE_LIMIT, gathered_bytes=16 * MB), self.all)
        self.wires = Wires(self.connection)
        self.connection.connection_made(self.wires)
        self.written = 0

    def feed(self, data: bytes) -> bool:
        """False when the server has closed."""
        for start in range(0, len(data), 1 << 16):
            if self.wires.closing:
                return False
            self.connection.data_received(data[start : start + (1 << 16)])
            self.written += len(self.wires.take())
        return not self.wires.closing


def _reads(attack: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
    """The attack in pieces of what a socket gives at once."""
    pending = bytearray(HELLO)
    for piece in attack():
        pending += piece
        if len(pending) >= 1 << 16:
            yield bytes(pending)
            pending.clear()
    yield bytes(pending)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_an_attack_raises_nothing_and_leaves_nothing(attack: Callable[[], Iterator[bytes]]) -> None:
    tasks = asyncio.all_tasks()
    victim = Victim()
    sent = 0
    for data in _reads(attack):
        sent += len(data)
        if not victim.feed(data) or sent > ATTACK_BYTES:
            break
        await asyncio.sleep(0)
    assert victim.wires.closing == (attack.__name__ in CLOSED), "closed" if victim.wires.closing else "not closed"
    connection = victim.connection
    assert len(connection._streams) <= 10_000
    assert connection._wire.gathered_bytes <= 16 * MB
    assert connection._h2.queued_body_size() <= 65 * MB
    assert victim.written < 2 * sent + 100_000, "no answer is much larger than what asked for it"
    connection.connection_lost(None)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == tasks
    assert not victim.all


@pytest.mark.parametrize("name", STRANGERS)
async def test_whoever_does_not_speak_http2_is_closed(name: str) -> None:
    for size in (len(STRANGERS[name]), 7):
        victim = Victim()
        data = STRANGERS[name]
        for start in range(0, len(data), size):
            if not victim.feed(data[start : start + size]):
                break
        assert victim.wires.closing
        assert not victim.connection._streams


async def test_a_flood_of_resets_is_told_to_calm_down_after_a_thousand() -> None:
    victim = Victim()
    victim.connection.data_received(HELLO)
    sent = 0
    for piece in rapid_reset():
        if victim.wires.closing:
            break
        victim.connection.data_received(piece)
        sent += 1
    assert 1_000 <= sent < 1_200
    assert victim.wires.take().endswith(ngh2.ErrorCode.ENHANCE_YOUR_CALM.to_bytes(4, "big"))


async def test_resets_of_streams_that_were_answered_are_no_flood() -> None:
    """Envoy ends each ext_proc stream this way: twenty thousand, in well under a second."""
    peer = Peer()
    for _ in range(200):
        streams = [peer.open(BIDI, b"headers", b"done" if number % 2 else b"body") for number in range(100)]
        peer.pump()
        for stream_id in streams:
            peer.h2.reset_stream(stream_id, ngh2.ErrorCode.NO_ERROR)
        peer.pump()
        peer.heard.clear()
        peer.events.clear()
    assert not peer.wires.closing
    assert not peer.server._streams


async def test_resets_of_streams_whose_session_still_waits_are_no_flood() -> None:
    """A thousand clients and more that leave at once."""
    peer = Peer()
    for _ in range(30):
        streams = [peer.open(BIDI, b"wait") for _ in range(100)]
        peer.pump()
        for stream_id in streams:
            peer.h2.reset_stream(stream_id)
        await peer.settle(2)
    assert not peer.wires.closing
    assert peer.calls.cancelled == 3_000


# Against a process


class Process:
    """The transport in a process of its own, so that its memory can be seen."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = folder / "t.sock"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serve_transport", kind, str(self.path)],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def memory_mb(self) -> float:
        told = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, check=True)
        return int(told.stdout) / 1024

    def descriptors(self) -> int:
        with grpc.insecure_channel(f"unix:{self.path}") as channel:
            return int(unary(channel, "/test.Process/Descriptors")(b"", timeout=10, wait_for_ready=True))

    def attack(self, data: Iterator[bytes], seconds: float) -> None:
        """Send until the server has had enough, or time is up; read nothing."""
        until = time.monotonic() + seconds
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            raw.connect(str(self.path))
            raw.settimeout(0.2)
            try:
                for piece in data:
                    if time.monotonic() > until:
                        return
                    raw.sendall(piece)
            except OSError:  # closed, or it reads no more
                return


@pytest.fixture(params=["ngh2-uvloop", "ngh2-asyncio"])
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Process]:
    running = Process(tmp_path, request.param)
    yield running
    assert running.process.stdin is not None
    running.process.stdin.close()
    assert running.process.wait(10) == 0


def test_under_every_attack_others_are_served_and_memory_and_descriptors_stay(process: Process) -> None:
    stop = threading.Event()
    served, failures, slowest_s = 0, [], 0.0

    def call_on() -> None:
        nonlocal served, slowest_s
        with grpc.insecure_channel(f"unix:{process.path}") as channel:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    assert list(bidi(channel)(iter([b"a", b"sleep", b"done"]), timeout=10)) == [b"a", b"sleep", b"done"]
                except grpc.RpcError as error:
                    failures.append(error)
                served += 1
                slowest_s = max(slowest_s, time.monotonic() - began)
                time.sleep(0.005)

    caller = threading.Thread(target=call_on)
    caller.start()
    _round_of_attacks(process)
    warm_mb, warm_descriptors = process.memory_mb(), process.descriptors()
    for _ in range(2):
        _round_of_attacks(process)
    stop.set()
    caller.join()
    assert failures == []
    assert served > 50
    assert slowest_s < 5
    until = time.monotonic() + 10
    while process.descriptors() > warm_descriptors + 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert process.descriptors() <= warm_descriptors + 2
    assert process.memory_mb() < warm_mb + 40


def _round_of_attacks(process: Process) -> None:
    for attack in ATTACKS:
        process.attack(itertools.chain(_reads(attack)), 0.15)
    for data in STRANGERS.values():
        process.attack(iter([data]), 0.1)


def test_thousands_of_connections_that_come_and_go_leave_no_descriptor(process: Process) -> None:
    before = process.descriptors()
    for number in range(2_000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            raw.connect(str(process.path))
            raw.sendall(HELLO[: number % len(HELLO)])
    until = time.monotonic() + 10
    while process.descriptors() > before and time.monotonic() < until:
        time.sleep(0.02)
    assert process.descriptors() <= before


def test_a_client_is_answered_after_it_was_refused(process: Process) -> None:
    with grpc.insecure_channel(f"unix:{process.path}") as channel:
        for _ in range(50):
            with pytest.raises(grpc.RpcError):
                unary(channel, "/no/such")(b"", timeout=5)
        assert unary(channel, SHOUT)(b"a") == b"A"
