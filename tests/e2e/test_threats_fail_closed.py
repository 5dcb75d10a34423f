"""The sidecar stopped or killed at the worst moment: 5xx for what is not yet decided, and not a byte to a provider.

The surprising thing: stopping one worker is not enough, because its pool replaces it within a second. To see the
gateway without a sidecar the pool is stopped too, and both go on later, workers first.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.raw_http import Answer, Connection, request_bytes
from tests.e2e.threats import BODY, CHAT, JSON, MESSAGES, World, bare, bearer, code_of, length, post, running
from tests.gateway import Gateway, wait_for
from tests.upstream import Reply

pytestmark = pytest.mark.e2e

MESSAGE_TIMEOUT_S = 5.0
SLACK_S = 1.5
STREAM = BODY[:-1] + b',"stream":true,"stream_options":{"include_usage":true}}'
HEAD = request_bytes("POST", CHAT, [("host", "gateway.test"), bearer(), JSON, length(BODY)])


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("fail-closed")) as world:
        yield world


@pytest.fixture
def world(started: World) -> World:
    started.forget()
    with started.rows(1):
        assert _settled(started)
    started.forget()
    return started


def _settled(world: World) -> bool:
    """A benign request passes: what the test before has done is over."""
    wait_for(world.gateway.ready, 20, "the gateway to be ready")
    return world.send(post()).status == 200


def pool_of(gateway: Gateway) -> list[int]:
    """Processes that have the workers as their children."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in gateway.children()}
    return [pid for pid, command in commands.items() if b"serve" in command]


@contextmanager
def stopped(gateway: Gateway) -> Iterator[None]:
    """The whole sidecar, stopped; it goes on at the end, workers first, or the pool would take them for hung."""
    pool, workers = pool_of(gateway), gateway.workers()
    assert pool
    assert workers
    for pid in (*pool, *workers):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.6)
        for pid in pool:
            os.kill(pid, signal.SIGCONT)


def assert_closed(answer: Answer, world: World) -> None:
    assert (answer.status, code_of(answer)) == (503, "gateway_unavailable")
    world.assert_untouched()


def test_while_the_sidecar_is_stopped_nothing_passes_and_then_it_does(world: World) -> None:
    world.alpha.clear()
    raws = [post(), post(MESSAGES), bare("/v1/models", bearer()), post(CHAT, BODY, auth=[])]
    with world.rows(len(raws) + 1):
        with stopped(world.gateway):
            connections = [Connection(world.gateway.port) for _ in raws]
            for connection, raw in zip(connections, raws, strict=True):
                connection.send(raw)
            answers = [connection.answer() for connection in connections]
            for answer in answers:
                assert_closed(answer, world)
                assert answer.elapsed_s < MESSAGE_TIMEOUT_S + SLACK_S
        assert _settled(world)
    for answer in answers:
        world.assert_row("", answer.header("x-request-id"), status=503, code="gateway_unavailable", outcome="refused")


def test_a_sidecar_stopped_between_headers_and_body_lets_no_body_through(world: World) -> None:
    with world.rows(2):
        with Connection(world.gateway.port) as connection:
            connection.send(HEAD + BODY[:10])
            time.sleep(0.3)
            with stopped(world.gateway):
                connection.send(BODY[10:])
                answer = connection.answer()
                assert_closed(answer, world)
        assert _settled(world)
    world.assert_row("", answer.header("x-request-id"), status=503, outcome="refused", attempts=0)


def test_a_stream_that_runs_is_not_cut_by_a_stopped_sidecar(world: World) -> None:
    world.alpha.behave(Reply(chunks=(b'data: {"choices":[{}]}\n\n',), endless=True, chunk_delay_s=0.02))
    with world.rows(1), Connection(world.gateway.port) as connection:
        connection.send(post(CHAT, STREAM))
        assert b"200 OK" in connection.read()
        with stopped(world.gateway):
            began, got = time.monotonic(), 0
            while time.monotonic() - began < MESSAGE_TIMEOUT_S + SLACK_S:
                got += len(connection.read())
        assert got > 50 * 24
        assert connection.read()


def test_a_worker_killed_while_it_decides_lets_nothing_through(world: World) -> None:
    with world.rows(2):
        workers = world.gateway.workers()
        with Connection(world.gateway.port) as connection, stopped(world.gateway):
            connection.send(post())
            time.sleep(0.3)
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            answer = connection.answer()
        assert_closed(answer, world)
        assert answer.elapsed_s < MESSAGE_TIMEOUT_S
        wait_for(lambda: set(world.gateway.workers()).isdisjoint(workers), 10, "another worker")
        assert _settled(world)
    world.assert_row("", answer.header("x-request-id"), status=503, code="gateway_unavailable", outcome="refused")


def test_a_worker_killed_while_a_body_is_uploaded_lets_nothing_through(world: World) -> None:
    with world.rows(2):
        workers = world.gateway.workers()
        with Connection(world.gateway.port) as connection:
            connection.send(HEAD + BODY[:10])
            time.sleep(0.3)
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            connection.send(BODY[10:])
            answer = connection.answer()
            assert_closed(answer, world)
        wait_for(lambda: set(world.gateway.workers()).isdisjoint(workers), 10, "another worker")
        assert _settled(world)
    world.assert_row("", answer.header("x-request-id"), status=503, code="gateway_unavailable", outcome="refused")


def test_a_sidecar_stopped_on_an_attempt_that_it_adapts_lets_no_wrong_body_through(world: World) -> None:
    body = BODY.replace(b"demo", b"adapted")
    world.alpha.behave(Reply(status=500, before_headers_s=1.5))
    with Connection(world.gateway.port) as connection:
        connection.send(post(CHAT, body))
        world.alpha.wait_for(lambda: len(world.alpha.requests) == 1)
        with stopped(world.gateway):
            answer = connection.answer()
    assert answer.status >= 500
    assert code_of(answer) in ("all_targets_failed", "gateway_unavailable")
    assert world.beta.requests == []
    assert world.beta.malformed == []


def test_a_replaced_worker_serves(world: World) -> None:
    for _ in range(2):
        workers = world.gateway.workers()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda old=workers: set(world.gateway.workers()).isdisjoint(old), 10, "another worker")  # type: ignore[misc]
        assert _settled(world)
