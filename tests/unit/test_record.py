"""From a finished request to its row: outcome, code, usage or estimate, cost, and what the estimates learn of it.

The surprising thing: only a request that was refused, or that every provider failed, costs nothing.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from extproc.catalog import Usage
from extproc.config.snapshot import Snapshot
from extproc.config.source import parse
from extproc.decide.estimate import LearnedRatios
from extproc.decision import Decision
from extproc.errors import Dialect
from extproc.record.finished import AttemptMade, Ending, Finished
from extproc.record.ledger import LedgerRow, Outcome
from extproc.record.pipeline import row_of

CONFIG = b"""
providers:
  vllm: {kind: openai, endpoint: "http://127.0.0.1:1/v1"}
  spare: {kind: openai, endpoint: "http://127.0.0.1:2/v1"}
  openai: {kind: openai, api_key: {env: K}}
  anthropic: {kind: anthropic, api_key: {env: K}}
models:
  m: {targets: [{provider: vllm}, {provider: spare}, {provider: openai}, {provider: anthropic}]}
prices:
  "vllm/big": {input: 2, output: 8}
"""
STARTED = datetime(2026, 11, 24, 8, 0, tzinfo=UTC)
TOLD = Usage(1000, 100)


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    compiled = parse(CONFIG, path=Path("/nowhere/gateway.yaml"), environ={"K": "k"}, require_secrets=True)
    assert isinstance(compiled, Snapshot)
    return compiled


CHAT = Decision(
    dialect=Dialect.OPENAI,
    endpoint="chat",
    request_id="r1",
    path="/v1/chat/completions",
    team="search",
    project="indexer",
    key_id="k1",
    alias="m",
    model_in_body="big",
    providers=("vllm", "spare"),
    models=("big", "small"),
    stream=True,
    input_tokens=77,
    text_bytes=300,
)
DONE = Finished(
    request_id="r1",
    started_at=STARTED,
    status=200,
    ending=Ending.WHOLE,
    decision=CHAT,
    attempts=(AttemptMade("vllm", 200),),
    code="",
    usage=TOLD,
    usage_whole=True,
    model_returned="big-2026",
    sent_upstream=True,
    first_byte_s=0.1,
    duration_s=1.5,
    request_bytes=400,
    response_bytes=18_000,
)


def row(snapshot: Snapshot, *, decided: dict[str, Any] | None = None, **changes: Any) -> LedgerRow:
    finished = replace(DONE, **changes)
    if decided is not None:
        finished = replace(finished, decision=msgspec.structs.replace(CHAT, **decided))
    return row_of(finished, snapshot, LearnedRatios())


def test_an_answered_request_is_told_whole(snapshot: Snapshot) -> None:
    assert row(snapshot) == LedgerRow(
        request_id="r1",
        started_at=STARTED,
        team="search",
        project="indexer",
        key_id="k1",
        dialect="openai",
        endpoint="chat",
        alias="m",
        provider="vllm",
        model_asked="big",
        model_returned="big-2026",
        usage=TOLD,
        cost_nusd=1000 * 2000 + 100 * 8000,
        price_source="override",
        status=200,
        outcome=Outcome.OK,
        attempts=1,
        tried="vllm:200",
        first_byte_s=0.1,
        duration_s=1.5,
        stream=True,
        estimated=False,
        request_bytes=400,
        response_bytes=18_000,
    )


LEFT, BROKEN = Ending.CLIENT_LEFT, Ending.BROKEN
ESTIMATE = Usage(77, 100)
"""What the prompt was counted at, and a streamed token for each 180 bytes."""


@pytest.mark.parametrize(
    ("changes", "outcome", "usage", "estimated"),
    [
        ({}, Outcome.OK, TOLD, False),
        ({"ending": LEFT}, Outcome.OK, TOLD, False),
        ({"ending": BROKEN}, Outcome.BROKEN, TOLD, False),
        ({"usage": None, "usage_whole": False}, Outcome.OK, ESTIMATE, True),
        ({"usage": Usage()}, Outcome.OK, ESTIMATE, True),
        ({"ending": LEFT, "usage": None, "usage_whole": False}, Outcome.CLIENT_LEFT, ESTIMATE, True),
        ({"ending": BROKEN, "usage": None, "usage_whole": False}, Outcome.BROKEN, ESTIMATE, True),
        ({"ending": LEFT, "usage": Usage(900, 1, 400, 50), "usage_whole": False}, Outcome.CLIENT_LEFT,
         Usage(900, 100, 400, 50), True),
        ({"ending": BROKEN, "usage": Usage(0, 700), "usage_whole": False}, Outcome.BROKEN, Usage(77, 700), True),
        ({"ending": LEFT, "usage": None, "usage_whole": False, "status": 0, "response_bytes": 0},
         Outcome.CLIENT_LEFT, Usage(77, 0), True),
        ({"ending": LEFT, "usage": None, "usage_whole": False, "sent_upstream": False, "attempts": ()},
         Outcome.CLIENT_LEFT, None, False),
        ({"status": 400}, Outcome.FAILED, None, False),
        ({"status": 503, "usage": None, "usage_whole": False}, Outcome.FAILED, None, False),
    ],
)  # fmt: skip
def test_usage_is_what_was_told_else_an_estimate_that_says_so(
    snapshot: Snapshot, changes: dict[str, Any], outcome: Outcome, usage: Usage | None, estimated: bool
) -> None:
    made = row(snapshot, **changes)
    assert (made.outcome, made.usage, made.estimated) == (outcome, usage, estimated)
    if usage is None:
        assert (made.cost_nusd, made.price_source) == (None, None)


@pytest.mark.parametrize(
    ("endpoint", "usage", "expected", "estimated"),
    [
        ("embeddings", None, Usage(77, 0), True),
        ("messages", None, Usage(77, 100), True),
        ("images", None, None, False),
        ("images", TOLD, TOLD, False),
        ("rerank", TOLD, TOLD, False),
        ("count_tokens", TOLD, None, False),
        ("input_tokens", TOLD, None, False),
        ("pass_through", TOLD, None, False),
        ("models", None, None, False),
    ],
)
def test_only_endpoints_that_count_tokens_are_charged(
    snapshot: Snapshot, endpoint: str, usage: Usage | None, expected: Usage | None, estimated: bool
) -> None:
    made = row(snapshot, decided={"endpoint": endpoint}, usage=usage, usage_whole=usage is not None)
    assert (made.usage, made.estimated) == (expected, estimated)


def test_a_later_attempt_is_charged_at_its_own_provider_and_model(snapshot: Snapshot) -> None:
    made = row(snapshot, attempts=(AttemptMade("vllm", None), AttemptMade("spare", 200)), model_returned="")
    assert (made.provider, made.model_asked, made.model_returned) == ("spare", "small", None)
    assert (made.tried, made.attempts, made.outcome) == ("vllm:none,spare:200", 2, Outcome.OK)
    assert (made.price_source, made.cost_nusd) == ("unpriced", None)


@pytest.mark.parametrize(
    ("provider", "asked", "returned", "source"),
    [
        ("vllm", "big", "whatever", "override"),
        ("vllm", "alias-of-big", "big", "override"),
        ("vllm", "gpt-4o", "gpt-4o", "unpriced"),  # list prices are the vendor's, not of every server
        ("openai", "gpt-4o", "", "genai-prices"),
        ("openai", "my-deployment", "gpt-4o-2024-11-20", "genai-prices"),
        ("openai", "no-such-model", "", "unpriced"),
        ("anthropic", "claude-sonnet-4-5", "", "genai-prices"),
    ],
)
def test_the_price_is_the_operators_else_the_vendors(
    snapshot: Snapshot, provider: str, asked: str, returned: str, source: str
) -> None:
    made = row(snapshot, attempts=(AttemptMade(provider, 200),), decided={"models": (asked,)}, model_returned=returned)
    assert made.price_source == source
    assert (made.cost_nusd is None) == (source == "unpriced")


def test_the_list_price_of_a_known_model_is_the_published_one(snapshot: Snapshot) -> None:
    made = row(snapshot, attempts=(AttemptMade("openai", 200),), decided={"models": ("gpt-4o",)}, model_returned="")
    assert made.cost_nusd == 1000 * Decimal("2500") + 100 * Decimal("10000")


@pytest.mark.parametrize(
    ("changes", "decided", "outcome", "code"),
    [
        ({"decision": None, "status": 413}, None, Outcome.REFUSED, "body_too_large"),
        ({"decision": None, "status": 400}, None, Outcome.REFUSED, "invalid_request"),
        ({"decision": None, "status": 503}, None, Outcome.REFUSED, "gateway_unavailable"),
        ({"decision": None, "status": 0, "ending": LEFT, "usage_whole": False}, None, Outcome.CLIENT_LEFT, None),
        ({"status": 401}, {"code": "invalid_api_key"}, Outcome.REFUSED, "invalid_api_key"),
        ({"status": 503, "code": "all_targets_failed"}, {}, Outcome.FAILED, "all_targets_failed"),
        ({"status": 404}, {}, Outcome.FAILED, None),
    ],
)
def test_what_was_turned_away_has_a_code_and_no_cost(
    snapshot: Snapshot, changes: dict[str, Any], decided: dict[str, Any] | None, outcome: Outcome, code: str | None
) -> None:
    made = row(snapshot, decided=decided, **{"attempts": (), "usage": None, **changes})
    assert (made.outcome, made.code, made.usage, made.cost_nusd, made.estimated) == (outcome, code, None, None, False)
    assert (made.provider, made.tried) == (None, None)


def test_a_provider_that_is_gone_from_the_config_leaves_the_usage(snapshot: Snapshot) -> None:
    made = row(snapshot, attempts=(AttemptMade("removed", 200),))
    assert (made.provider, made.usage, made.cost_nusd) == ("removed", TOLD, None)


def test_only_what_a_provider_told_teaches_the_estimates(snapshot: Snapshot) -> None:
    ratios = LearnedRatios()
    row_of(replace(DONE, usage=None, usage_whole=False), snapshot, ratios)
    assert len(ratios) == 0
    row_of(DONE, snapshot, ratios)
    assert ratios.estimate("k1", "big", 300).tokens == 1000
    assert ratios.estimate_output("big", "chat", stream=True, response_bytes=9000).tokens == 50
