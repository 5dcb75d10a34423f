"""Workers die, hang and are replaced: what fails is what was in flight, and nothing is lost from the ledger."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.gateway import KEY, TEAMS, Gateway, config, wait_for
from tests.upstream import RecordingUpstream

pytestmark = pytest.mark.e2e

HEADERS = {"authorization": f"Bearer {KEY}"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def upstream() -> Iterator[RecordingUpstream]:
    with RecordingUpstream() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: RecordingUpstream) -> Iterator[Gateway]:
    sections = config(
        providers={"up": {"kind": "openai", "endpoint": f"{upstream.url}/v1", "api_key": {"env": "PROVIDER_KEY"}}},
        models={"m": {"targets": [{"provider": "up"}]}, "counted": {"targets": [{"provider": "up", "model": "m"}]}},
        teams={"search": TEAMS["search"]},
    )
    with Gateway(tmp_path_factory.mktemp("workers"), sections, {"EXTPROC_WORKERS": "3"}) as running:
        yield running


def chat(gateway: Gateway, timeout_s: float = 10.0) -> httpx.Response:
    return httpx.post(f"{gateway.url}/v1/chat/completions", headers=HEADERS, json=CHAT, timeout=timeout_s)


def test_as_many_workers_run_as_were_asked_for(gateway: Gateway) -> None:
    assert len(gateway.workers()) == 3
    assert chat(gateway).status_code == 200


def test_a_killed_worker_is_replaced_and_none_is_missed(gateway: Gateway) -> None:
    before = gateway.workers()
    os.kill(before[0], signal.SIGKILL)
    answers = [chat(gateway).status_code for _ in range(20)]
    wait_for(lambda: len(set(gateway.workers()) - set(before)) == 1, 5, "a new worker")
    assert answers == [200] * 20


def test_a_worker_that_hangs_is_replaced(gateway: Gateway) -> None:
    before = gateway.workers()
    os.kill(before[1], signal.SIGSTOP)
    wait_for(lambda: before[1] not in gateway.workers() and len(gateway.workers()) == 3, 5, "the hung worker to go")
    assert [chat(gateway).status_code for _ in range(20)] == [200] * 20


def test_the_pool_itself_is_started_again(gateway: Gateway) -> None:
    (pool,) = gateway.pools()
    os.kill(pool, signal.SIGKILL)
    wait_for(lambda: gateway.pools() not in ([pool], []) and gateway.ready(), 30, "a new pool")
    assert chat(gateway).status_code == 200


def test_under_random_kills_only_what_was_in_flight_fails_and_the_ledger_agrees_with_the_clients(
    gateway: Gateway, upstream: RecordingUpstream
) -> None:
    """Clients count what they were answered, the upstream what it served, the ledger what was recorded."""
    wait_for(lambda: chat(gateway).status_code == 200, 10, "the gateway")
    upstream.clear()
    told: list[tuple[str, int]] = []
    ends = threading.Event()
    threads = [threading.Thread(target=_ask_until, args=(gateway, ends, told)) for _ in range(6)]
    for thread in threads:
        thread.start()
    draw = random.Random(7)
    for _ in range(5):
        time.sleep(0.9)
        os.kill(draw.choice(gateway.workers()), draw.choice((signal.SIGKILL, signal.SIGSTOP)))
    time.sleep(1.5)
    ends.set()
    for thread in threads:
        thread.join()
    answered = {request_id for request_id, status in told if status == 200}
    refused = {request_id for request_id, status in told if status != 200}
    assert len(answered) > 100
    assert {status for _, status in told} <= {200, 503, 504}
    assert len(refused) < len(answered) / 4

    def recorded() -> dict[str, int]:
        return {row["request_id"]: row["status"] for row in gateway.rows("alias = 'counted' or alias is null")}

    wait_for(lambda: recorded().keys() >= answered | refused, 20, "the ledger to have every request")
    assert {request_id for request_id, status in recorded().items() if status == 200} == answered
    served = sum(1 for request in upstream.requests if request.completed)
    assert len(answered) <= served <= len(answered) + len(refused)


def _ask_until(gateway: Gateway, ends: threading.Event, told: list[tuple[str, int]]) -> None:
    with httpx.Client(timeout=15, headers=HEADERS) as client:
        while not ends.is_set():
            answer = client.post(f"{gateway.url}/v1/chat/completions", json={**CHAT, "model": "counted"})
            told.append((answer.headers["x-request-id"], answer.status_code))


def test_what_a_crash_left_in_the_journal_is_in_the_ledger_after_the_next_start(tmp_path: Path) -> None:
    """All of a gateway is killed at once, right after it has answered: only Envoy's journal knows of the request."""
    with RecordingUpstream() as upstream:
        sections = config(
            providers={"up": {"kind": "openai", "endpoint": f"{upstream.url}/v1"}},
            models={"m": {"targets": [{"provider": "up"}]}},
            teams={"search": TEAMS["search"]},
        )
        with Gateway(tmp_path, sections) as first:
            for worker in first.workers():
                os.kill(worker, signal.SIGSTOP)
            time.sleep(0.05)
            # The pool replaces them; this request is answered by the new ones.
            wait_for(lambda: chat(first).status_code == 200, 10, "an answer")
            asked = chat(first).headers["x-request-id"]
            journal = tmp_path / "extproc-journal"
            wait_for(lambda: any(asked in file.read_text() for file in journal.rglob("*.jsonl")), 5, "the journal")
            everyone = [first.pid, *first.pools(), *first.workers()]
            for process in everyone:
                os.kill(process, signal.SIGKILL)
        (tmp_path / "ledger.db").unlink()
        for leftover in ("ledger.db-wal", "ledger.db-shm"):
            (tmp_path / leftover).unlink(missing_ok=True)
        with Gateway(tmp_path, sections) as second:
            second.wait_for_rows(1, f"request_id = '{asked}' and status = 200 and input_tokens > 0", timeout_s=20)
            wait_for(lambda: len(list((tmp_path / "extproc-journal").iterdir())) == 1, 10, "the old journal to go")
        assert not (tmp_path / "extproc-journal").exists()
