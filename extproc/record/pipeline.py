"""record: from one finished request to one row of the ledger, and what it teaches the estimates. Start at `row_of`.

Third moment of the path, after the client has its answer. The surprising thing: usage that nobody reported is charged
all the same, by estimate and marked so. A client that hangs up before the usage event would else talk for free.
"""

from __future__ import annotations

from typing import Protocol

from extproc.catalog import Cost, Usage
from extproc.config.snapshot import Provider, Snapshot
from extproc.decision import Decision
from extproc.errors import Code
from extproc.record.finished import Ending, Finished
from extproc.record.ledger import LedgerRow, Outcome

CHARGED_BY_TOKEN = frozenset(("chat", "completions", "responses", "messages", "embeddings"))
"""Endpoints whose usage is estimated when none is reported. Others may report usage, or have none."""
_WITHOUT_OUTPUT = frozenset(("embeddings",))
_FREE = frozenset(("models", "pass_through", "count_tokens", "input_tokens"))


class _Tokens(Protocol):
    @property
    def tokens(self) -> int: ...


class Ratios(Protocol):
    """What record teaches and asks: tokens per byte (`decide.estimate.LearnedRatios`)."""

    def observe(self, key_id: str, model: str, request_bytes: int, input_tokens: int) -> None: ...
    def observe_output(
        self, model: str, endpoint: str, *, stream: bool, response_bytes: int, output_tokens: int
    ) -> None: ...
    def estimate_output(self, model: str, endpoint: str, *, stream: bool, response_bytes: int) -> _Tokens: ...


def row_of(finished: Finished, snapshot: Snapshot, ratios: Ratios) -> LedgerRow:
    """The ledger's row of one finished request."""
    decision = finished.decision
    outcome = outcome_of(finished)
    provider = snapshot.providers.get(finished.attempts[-1].provider) if finished.attempts else None
    model_asked = decision.models[len(finished.attempts) - 1] if decision and finished.attempts else ""
    usage, estimated = _usage(finished, outcome, model_asked, ratios)
    if usage is not None and not estimated:
        _teach(finished, usage, model_asked, ratios)
    cost = None if usage is None else _cost(finished, usage, provider, model_asked, snapshot)
    return LedgerRow(
        request_id=finished.request_id,
        started_at=finished.started_at,
        team=_known(decision.team) if decision else None,
        project=_known(decision.project) if decision else None,
        user=_known(decision.user) if decision else None,
        agent=_known(decision.agent) if decision else None,
        key_id=_known(decision.key_id) if decision else None,
        dialect=decision.dialect.value if decision else None,
        endpoint=_known(decision.endpoint) if decision else None,
        alias=_known(decision.alias) if decision else None,
        provider=finished.attempts[-1].provider if finished.attempts else None,
        model_asked=_known(model_asked),
        model_returned=_known(finished.model_returned),
        usage=usage,
        cost_nusd=cost.amount_nusd if cost else None,
        price_source=cost.source if cost else None,
        status=finished.status,
        code=_known(_code(finished)),
        outcome=outcome,
        attempts=len(finished.attempts),
        tried=_known(",".join(f"{made.provider}:{made.status or 'none'}" for made in finished.attempts)),
        first_byte_s=finished.first_byte_s,
        duration_s=finished.duration_s,
        stream=decision.stream if decision else False,
        estimated=estimated,
        request_bytes=finished.request_bytes,
        response_bytes=finished.response_bytes,
    )


def outcome_of(finished: Finished) -> Outcome:
    """How the request ended, for the ledger and for who watches it pass."""
    if finished.ending is Ending.CLIENT_LEFT and not finished.usage_whole:
        return Outcome.CLIENT_LEFT  # one that left at the last event, as many do, has had its whole answer
    decided = finished.decision is not None and not finished.decision.code
    if not decided:
        return Outcome.REFUSED
    if finished.ending is Ending.BROKEN:
        return Outcome.BROKEN
    return Outcome.OK if 200 <= finished.status < 400 else Outcome.FAILED


def _code(finished: Finished) -> str:
    """The refusal's code: decide's own, what the way back made of it, or what Envoy's own refusal comes to."""
    if finished.code or (finished.decision and finished.decision.code):
        return finished.code or (finished.decision.code if finished.decision else "")
    if finished.decision is not None or finished.ending is Ending.CLIENT_LEFT:
        return ""
    if finished.status == 413:
        return Code.BODY_TOO_LARGE
    return Code.INVALID_REQUEST if finished.status < 500 else Code.GATEWAY_UNAVAILABLE


def _usage(finished: Finished, outcome: Outcome, model: str, ratios: Ratios) -> tuple[Usage | None, bool]:
    """What the request used, and whether that is an estimate."""
    decision = finished.decision
    if decision is None or decision.endpoint in _FREE or outcome in (Outcome.REFUSED, Outcome.FAILED):
        return None, False
    if finished.usage is not None and finished.usage_whole and not _says_nothing(finished.usage):
        return finished.usage, False  # also where the stream broke behind its last word
    if decision.endpoint not in CHARGED_BY_TOKEN:
        return finished.usage, finished.usage is not None
    if not finished.sent_upstream:
        return None, False
    return _estimated(finished, decision, model, ratios), True


def _says_nothing(usage: Usage) -> bool:
    """Some servers report zeros where they count nothing; no answer is made of no tokens."""
    return usage.input_tokens <= 0 and usage.output_tokens <= 0


def _estimated(finished: Finished, decision: Decision, model: str, ratios: Ratios) -> Usage:
    """At least what was reported before the end, and for the rest what the bytes that came back suggest."""
    reported = finished.usage or Usage()
    output_tokens = 0
    if decision.endpoint not in _WITHOUT_OUTPUT and finished.response_bytes:
        output_tokens = ratios.estimate_output(
            model, decision.endpoint, stream=decision.stream, response_bytes=finished.response_bytes
        ).tokens
    return Usage(
        input_tokens=reported.input_tokens or decision.input_tokens,
        output_tokens=max(reported.output_tokens, output_tokens),
        cached_tokens=reported.cached_tokens,
        cache_write_tokens=reported.cache_write_tokens,
        reasoning_tokens=reported.reasoning_tokens,
    )


def _teach(finished: Finished, usage: Usage, model: str, ratios: Ratios) -> None:
    decision = finished.decision
    if decision is None:
        return
    ratios.observe(decision.key_id, model, decision.text_bytes, usage.input_tokens)
    ratios.observe_output(
        model,
        decision.endpoint,
        stream=decision.stream,
        response_bytes=finished.response_bytes,
        output_tokens=usage.output_tokens,
    )


def _cost(finished: Finished, usage: Usage, provider: Provider | None, asked: str, snapshot: Snapshot) -> Cost | None:
    """The operator's own price for the name asked comes first; else the list price of the name that served."""
    if provider is None:
        return None
    best: Cost | None = None
    for model in dict.fromkeys((asked, finished.model_returned)):
        if not model:
            continue
        cost = snapshot.prices.cost(
            usage,
            provider=provider.name,
            kind=provider.kind,
            model=model,
            at=finished.started_at,
            vendor=provider.vendor,
        )
        if cost.source == "override":
            return cost
        if cost.amount_nusd is not None or best is None:
            best = cost
    return best


def _known(text: str) -> str | None:
    return text or None
