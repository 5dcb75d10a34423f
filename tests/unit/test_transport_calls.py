"""What a real grpcio client sees, on both transports and both event loops."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.transports import (
    AWKWARD,
    BROKEN,
    KINDS,
    MAX_BODY_BYTES,
    META,
    REFUSED,
    Served,
    bidi,
    client_stream,
    served,
    unary,
)

LARGE = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(request.param, tmp_path_factory.mktemp("s") / "t.sock") as running:
        yield running


@pytest.fixture
def channel(server: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target, options=LARGE) as opened:
        yield opened


def until(fact: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.005)


class Conversation:
    """A bidi call whose client says one thing at a time."""

    def __init__(self, channel: grpc.Channel, **options: Any) -> None:
        self._said: queue.Queue[bytes | None] = queue.Queue()
        self.call = bidi(channel)(iter(self._said.get, None), **options)

    def say(self, *messages: bytes) -> None:
        for message in messages:
            self._said.put(message)

    def end(self) -> None:
        self._said.put(None)


def fails(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str | None]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_unary_client_stream_and_bidi_are_answered(channel: grpc.Channel) -> None:
    assert unary(channel)(b"hello") == b"HELLO"
    assert client_stream(channel)(iter([b"a", b"", b"sleep", b"ccc"])) == b"4 9"
    assert list(bidi(channel)(iter([b"a", b"", b"many", b"silent", b"b"]))) == [
        *(b"a", b"", b"1", b"2", b"3", b"b", b"finished"),
    ]


async def test_the_asyncio_client_is_answered_too(server: Served) -> None:
    async with grpc.aio.insecure_channel(server.target) as channel:
        assert await unary(channel)(b"hello") == b"HELLO"
        call = bidi(channel)()
        for message in (b"one", b"sleep two", b"at-once three"):
            await call.write(message)
            assert await call.read() == message
        await call.done_writing()
        assert await call.read() == b"finished"
        assert await call.code() is grpc.StatusCode.OK


def test_metadata_is_read(channel: grpc.Channel) -> None:
    assert unary(channel, META)(b"", metadata=(("x-one", "two words"),)) == b"two words True"


def test_answers_keep_the_order_of_messages_while_a_session_waits(channel: grpc.Channel) -> None:
    said = [b"sleep 1", b"2", b"mend 3", b"at-once 4", b"sleep 5", b"6"]
    assert list(bidi(channel)(iter(said))) == [*said, b"finished"]


def test_finish_is_called_after_the_answer_that_was_awaited(server: Served, channel: grpc.Channel) -> None:
    call = bidi(channel)(iter([b"wait"]))
    until(lambda: bool(server.calls.waiting))
    server.let_go()
    assert list(call) == [b"wait", b"finished"]


def test_a_session_that_is_done_ends_the_stream_though_the_client_has_not(channel: grpc.Channel) -> None:
    for last in (b"done", b"late-done"):
        talk = Conversation(channel)
        talk.say(b"hello", last)
        assert list(talk.call) == [b"hello", last]
        assert talk.call.code() is grpc.StatusCode.OK
    endless = (b"done" for _ in iter(int, 1))
    assert client_stream(channel)(endless) == b"1 4"


@pytest.mark.parametrize("word", [b"refuse", b"late-refuse"])
def test_a_status_reaches_the_client_with_its_message_and_the_connection_lives(
    channel: grpc.Channel, word: bytes
) -> None:
    assert fails(lambda: list(bidi(channel)(iter([b"a", word])))) == (grpc.StatusCode.NOT_FOUND, AWKWARD)
    assert unary(channel)(b"alive") == b"ALIVE"


def test_a_unary_session_and_one_that_is_not_opened_give_their_status(channel: grpc.Channel) -> None:
    assert fails(lambda: unary(channel)(b"refuse")) == (grpc.StatusCode.UNAVAILABLE, AWKWARD)
    assert fails(lambda: list(bidi(channel, REFUSED)(iter([b"a"])))) == (grpc.StatusCode.NOT_FOUND, AWKWARD)


def test_an_error_of_ours_is_internal_and_tells_nothing(channel: grpc.Channel) -> None:
    internal = (grpc.StatusCode.INTERNAL, "internal error")
    assert fails(lambda: list(bidi(channel)(iter([b"break"])))) == internal
    assert fails(lambda: list(bidi(channel)(iter([b"late-break"])))) == internal
    assert fails(lambda: client_stream(channel)(iter([b"break"]))) == internal
    assert fails(lambda: list(bidi(channel, BROKEN)(iter([b"a"])))) == internal
    assert unary(channel)(b"alive") == b"ALIVE"


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    assert fails(lambda: unary(channel, "/test.Calls/Nothing")(b""))[0] is grpc.StatusCode.UNIMPLEMENTED
    assert fails(lambda: unary(channel, "/")(b""))[0] is grpc.StatusCode.UNIMPLEMENTED
    assert unary(channel)(b"alive") == b"ALIVE"


def test_a_message_above_the_limit_is_refused_and_one_at_the_limit_is_not(channel: grpc.Channel) -> None:
    limit = MAX_BODY_BYTES + (1 << 20)
    assert fails(lambda: list(bidi(channel)(iter([bytes(limit + 1)]))))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(next(bidi(channel)(iter([bytes(limit)])))) == limit


@pytest.mark.parametrize(("count", "megabytes"), [(24, 1), (6, 8), (1, 32)])
def test_large_messages_come_back_intact(channel: grpc.Channel, count: int, megabytes: int) -> None:
    def round_trip(number: int) -> bool:
        sent: bytes = hashlib.shake_128(b"%d" % number).digest(1 << 20) * megabytes
        call = bidi(channel)(iter([sent, sent[::-1]]), timeout=60)
        return [next(call), next(call)] == [sent, sent[::-1]]

    with ThreadPoolExecutor(count) as pool:
        assert all(pool.map(round_trip, range(count)))


def test_many_messages_on_one_stream_pass_every_window(channel: grpc.Channel) -> None:
    sent = [bytes(size) for size in (0, 1, 16_379, 16_380, 65_535, 300_000)] * 60
    assert sum(map(len, bidi(channel)(iter(sent)))) == sum(map(len, sent)) + len(b"finished")


def test_a_client_that_leaves_cancels_the_session_that_waits(server: Served, channel: grpc.Channel) -> None:
    before = server.calls.cancelled
    talk = Conversation(channel)
    talk.say(b"wait")
    until(lambda: bool(server.calls.waiting))
    talk.call.cancel()
    talk.end()
    until(lambda: server.calls.cancelled == before + 1)
    server.let_go()
    assert unary(channel)(b"alive") == b"ALIVE"


def test_a_deadline_ends_the_call_and_cancels_its_session(server: Served, channel: grpc.Channel) -> None:
    before = server.calls.cancelled
    assert fails(lambda: unary(channel)(b"wait", timeout=0.1))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: server.calls.cancelled == before + 1)
    server.let_go()


def test_an_iterator_answers_as_it_goes(server: Served, channel: grpc.Channel) -> None:
    call = bidi(channel)(iter([b"count"]))
    assert [next(call) for _ in range(3)] == [b"0", b"1", b"2"]
    until(lambda: bool(server.calls.waiting))
    server.let_go()
    assert list(call) == [b"end"]


def test_an_iterator_is_cancelled_when_the_client_leaves(server: Served, channel: grpc.Channel) -> None:
    before = server.calls.cancelled
    call = bidi(channel)(iter([b"count"]))
    assert next(call) == b"0"
    until(lambda: bool(server.calls.waiting))
    call.cancel()
    until(lambda: server.calls.cancelled == before + 1)
    server.let_go()


def test_a_thousand_calls_at_once_are_all_answered(server: Served) -> None:
    async def calls() -> list[list[bytes]]:
        async with grpc.aio.insecure_channel(server.target) as channel:

            async def one(number: int) -> list[bytes]:
                said = [b"%d" % number, b"sleep" if number % 3 else b"x", b"done"]
                call = bidi(channel)(iter(said))
                return [message async for message in call]

            return await asyncio.gather(*(one(number) for number in range(1000)))

    answers = asyncio.run(calls())
    assert [answer[0] for answer in answers] == [b"%d" % number for number in range(1000)]
    assert all(answer[2] == b"done" for answer in answers)


def test_the_socket_is_for_its_owner_alone(server: Served) -> None:
    assert Path(server.target.removeprefix("unix:")).stat().st_mode & 0o777 == 0o600
