"""The books agree: after 2,000 mixed requests the ledger's totals are the upstreams' own count, on both databases.

Every kind of answer, failovers, streams that break and clients that leave, 32 at a time. The surprising thing: nothing
is compared by sampling. Each row is matched with what the upstreams themselves wrote down for that very request.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from extproc.stores.sql import LEDGER
from tests.gateway import KEY, TEAMS, Gateway, config, wait_for
from tests.upstream import NOTHING, Recorded, RecordingUpstream, Reply, Usage

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

REQUESTS = 2_000
AT_ONCE = 32
MARKER = "x-test-marker"
CHAT = {"messages": [{"role": "user", "content": "how are you?"}]}
ASKED = {"stream": True, "stream_options": {"include_usage": True}}
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"model": "m", **CHAT}),
    ("/v1/chat/completions", {"model": "m", **CHAT, "stream": True}),
    ("/v1/chat/completions", {"model": "renamed", **CHAT, **ASKED}),
    ("/v1/responses", {"model": "m", "input": "hi"}),
    ("/v1/responses", {"model": "renamed", "input": "hi", "stream": True}),
    ("/v1/messages", {"model": "claude", "max_tokens": 9, **CHAT}),
    ("/v1/messages", {"model": "claude", "max_tokens": 9, **CHAT, "stream": True}),
    ("/v1/embeddings", {"model": "m", "input": ["a", "b"]}),
    ("/v1/completions", {"model": "m", "prompt": "hi"}),
    ("/v1/completions", {"model": "m", "prompt": "hi", "stream": True}),
    ("/v1/chat/completions", {"model": "renamed", **CHAT}),
)
"""Eleven kinds: a prime, so that each meets each of the fates below."""
PRICE = {"input": 2, "output": 8, "cached_input": 0.5, "cache_write": 2.5}
PROVIDERS = ("first", "second", "first_anthropic", "second_anthropic")


@dataclass(frozen=True)
class Fate:
    """What is to happen to request `number`."""

    number: int

    @property
    def kind(self) -> tuple[str, dict[str, Any]]:
        return KINDS[self.number % len(KINDS)]

    @property
    def streams(self) -> bool:
        return self.kind[1].get("stream") is True

    @property
    def leaves(self) -> bool:
        return self.streams and self.number % 20 == 9

    @property
    def breaks(self) -> bool:
        return self.streams and self.number % 20 == 13

    @property
    def first_errs(self) -> bool:
        return self.number % 10 == 4

    @property
    def first_resets(self) -> bool:
        return self.number % 10 == 6


def fate_of(request: Recorded) -> Fate:
    return Fate(int(request.header(MARKER) or 0))


def spent(request: Recorded) -> Usage:
    """What the upstream counts: another number for nearly every request, in the fields its dialect can tell."""
    number, path = fate_of(request).number, request.path
    return Usage(
        input_tokens=20 + number % 997,
        output_tokens=8 + number % 89,
        cached_tokens=number % 11,
        cache_write_tokens=number % 7 if path.endswith(("responses", "messages")) else 0,
        reasoning_tokens=0 if path.endswith("messages") else number % 5,
    )


@pytest.fixture
def upstreams() -> Iterator[tuple[RecordingUpstream, RecordingUpstream]]:
    with RecordingUpstream(usage=spent) as first, RecordingUpstream(usage=spent) as second:
        first.behave(Reply(status=500), where=lambda it: fate_of(it).first_errs)
        first.behave(Reply(reset_before_headers=True), where=lambda it: fate_of(it).first_resets)
        for upstream in (first, second):
            upstream.behave(Reply(stall_after=3), where=lambda it: fate_of(it).leaves)
            upstream.behave(Reply(reset_after=4, chunk_delay_s=0.005), where=lambda it: fate_of(it).breaks)
        yield first, second


def sections(first: str, second: str, sql: object) -> dict[str, Any]:
    both: list[dict[str, Any]] = [{"provider": "first"}, {"provider": "second", "priority": 1}]
    renamed = [{**target, "model": f"at-{target['provider']}"} for target in both]
    claude = [{"provider": "first_anthropic"}, {"provider": "second_anthropic", "priority": 1}]
    return config(
        providers={
            "first": {"kind": "openai", "endpoint": f"{first}/v1"},
            "second": {"kind": "openai", "endpoint": f"{second}/v1"},
            "first_anthropic": {"kind": "anthropic", "endpoint": first},
            "second_anthropic": {"kind": "anthropic", "endpoint": second},
        },
        models={"m": {"targets": both}, "renamed": {"targets": renamed}, "claude": {"targets": claude}},
        prices={f"{name}/*": PRICE for name in PROVIDERS},
        teams={"search": TEAMS["search"]},
        timeouts={"first_byte_s": 20, "stream_idle_s": 60},
        state={"sql": sql},
    )


async def send_all(url: str) -> dict[str, Fate]:
    """Send every request, and give the id that each answer told."""
    ids: dict[str, Fate] = {}
    numbers = iter(range(1, REQUESTS + 1))
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)

    async def worker(http: httpx.AsyncClient) -> None:
        for number in numbers:
            answer = await send(http, Fate(number))
            ids[answer.headers["x-request-id"]] = Fate(number)

    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, limits=limits) as http:
        await asyncio.gather(*(worker(http) for _ in range(AT_ONCE)))
    return ids


async def send(http: httpx.AsyncClient, fate: Fate) -> httpx.Response:
    path, body = fate.kind
    async with http.stream("POST", path, json=body, headers={MARKER: str(fate.number)}) as answer:
        assert answer.status_code == 200
        received = answer.aiter_raw()
        if fate.leaves:
            assert await anext(received)
        elif fate.breaks:
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in received:
                    pass
        else:
            async for _ in received:
                pass
    return answer


def rows_of(url: str) -> list[dict[str, Any]]:
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            return [dict(row) for row in connection.execute(sa.select(LEDGER)).mappings()]
    finally:
        engine.dispose()


def used(row: dict[str, Any]) -> Usage:
    names = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
    return Usage(*(row[name] for name in names))


def cost_nusd(usage: Usage) -> int:
    fresh = usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens
    halves = 4 * fresh + usage.cached_tokens + 5 * usage.cache_write_tokens + 16 * usage.output_tokens
    return halves * 500


def agree(rows: list[dict[str, Any]], ids: dict[str, Fate], upstreams: tuple[RecordingUpstream, ...]) -> None:
    """Rows, answers and the upstreams' own books are the same story."""
    assert len(ids) == REQUESTS
    assert Counter(row["request_id"] for row in rows) == Counter(dict.fromkeys(ids, 1))
    served = {
        line.marker: line.usage
        for upstream in upstreams
        for line in upstream.ledger()
        if line.completed and line.usage is not None
    }
    for row in rows:
        fate = ids[row["request_id"]]
        flagged = "client_left" if fate.leaves else "broken" if fate.breaks else "ok"
        assert (row["outcome"], bool(row["estimated"])) == (flagged, flagged != "ok"), (fate, row)
        assert row["cost_nusd"] == cost_nusd(used(row)), (fate, row)
        if flagged == "ok":
            assert used(row) == served[str(fate.number)], (fate, row)
        else:
            assert str(fate.number) not in served
            assert row["input_tokens"] > 0
    exact = [row for row in rows if not row["estimated"]]
    total = sum((upstream.usage_total() for upstream in upstreams), start=NOTHING)
    assert sum((used(row) for row in exact), start=NOTHING) == total
    assert sum(row["cost_nusd"] for row in exact) == cost_nusd(total)
    assert sum(row["attempts"] for row in rows) == sum(len(upstream.requests) for upstream in upstreams)


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_totals_equal_the_upstreams_own_count(
    store: str, upstreams: tuple[RecordingUpstream, RecordingUpstream], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if store == "sqlite":
        sql: object = "sqlite:///ledger.db"
        url, environ = f"sqlite:///{tmp_path / 'ledger.db'}", dict[str, str]()
    else:
        fresh: str = request.getfixturevalue("fresh_postgres_url")
        sql, environ = {"env": "LEDGER_URL"}, {"LEDGER_URL": fresh}
        url = fresh.replace("postgresql://", "postgresql+psycopg://", 1)
    first, second = upstreams
    with Gateway(tmp_path, sections(first.url, second.url, sql), environ) as gateway:
        ids = asyncio.run(send_all(gateway.url))
        wait_for(lambda: len(rows_of(url)) >= REQUESTS, 30.0, "all rows")
        rows = rows_of(url)
        agree(rows, ids, upstreams)
        assert {row["attempts"] for row in rows} == {1, 2}
        assert sum(fate.leaves for fate in ids.values()) >= REQUESTS // 50
        assert sum(fate.breaks for fate in ids.values()) >= REQUESTS // 50
    # What was still under way when it ended is not lost, and nothing is written twice.
    assert len(rows_of(url)) == REQUESTS
    assert not [value for value in environ.values() if value in gateway.log()]
