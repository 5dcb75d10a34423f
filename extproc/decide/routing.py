"""Where a request may go, in which order: targets of a model become the failover chain.

A late step of decide. The surprising thing: weights are drawn here and not by Envoy. The chain then names one cluster
for each attempt, so that attempt k is target k for adapt, for record and for Envoy alike, and a target that lost the
draw still is the next to be tried before a lower priority.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import groupby
from math import inf
from random import Random
from typing import Protocol, assert_never

import msgspec

from extproc.catalog import Usage
from extproc.config.snapshot import Model, Provider, Snapshot, Target, Timeouts
from extproc.dialects.endpoints import Endpoint
from extproc.errors import Dialect
from extproc.providers.kinds import KINDS

_EXPLORED = 0.05
"""How often a request ignores what is known of latency, so that a provider which has become faster is found."""
_TYPICAL = Usage(input_tokens=1000, output_tokens=300)
"""What prices are compared by: a request of average shape."""
_ANY_TIME = datetime(2026, 1, 1, tzinfo=UTC)
"""Prices by time of day do not order targets."""


class Attempt(msgspec.Struct, frozen=True):
    """One target with the provider's own name of the model filled in."""

    provider: Provider
    model: str


class Health(Protocol):
    """What is known of the providers, from what record saw of earlier requests."""

    def is_cooling(self, provider: str) -> bool:
        """Whether the provider asked to be left alone, or keeps failing."""
        ...

    def first_byte_s(self, provider: str, model: str) -> float | None:
        """How long answers have taken to begin lately; None where none is remembered."""
        ...


class NothingKnown:
    """The health of providers before anything has happened."""

    def is_cooling(self, provider: str) -> bool:
        return False

    def first_byte_s(self, provider: str, model: str) -> float | None:
        return None


def attempts(
    model: Model,
    name: str,
    endpoint: Endpoint,
    snapshot: Snapshot,
    draw: Random,
    *,
    health: Health = NothingKnown(),  # noqa: B008  (immutable)
) -> tuple[Attempt, ...]:
    """The targets of `model` that speak the endpoint's dialect, in the order they are to be tried.

    Nobody is left out: a provider that cools down goes to the end, so that a request all of whose providers are in
    trouble still tries them all.
    """
    speaking = [target for target in model.targets if speaks(snapshot.providers[target.provider], endpoint.dialect)]
    if len(speaking) > 1:
        speaking = _ordered(speaking, _rank(model, name, snapshot, draw, health))
        speaking.sort(key=lambda target: health.is_cooling(target.provider))  # stable
    return tuple(Attempt(snapshot.providers[target.provider], target.model or name) for target in speaking)


def speaks(provider: Provider, dialect: Dialect) -> bool:
    """Whether the provider takes this dialect as it is."""
    return dialect in KINDS[provider.kind].dialects


def _ordered(targets: Sequence[Target], rank: Callable[[Target], float]) -> list[Target]:
    """Lowest priority number first; inside one, lowest rank first."""
    ordered: list[Target] = []
    for _, group in groupby(targets, key=lambda target: target.priority):
        ordered += sorted(group, key=rank)
    return ordered


def _rank(model: Model, name: str, snapshot: Snapshot, draw: Random, health: Health) -> Callable[[Target], float]:
    """The rank of a target inside its priority."""

    def weighted(target: Target) -> float:
        """A weighted draw without replacement (Efraimidis and Spirakis)."""
        return -float(draw.random() ** (1 / target.weight))

    def latency(target: Target) -> float:
        """A target that nobody has tried yet comes first: else it would never be known."""
        return health.first_byte_s(target.provider, target.model or name) or 0.0

    def cost(target: Target) -> float:
        return _price_nusd(snapshot, target, name)

    match model.order:
        case "weight":
            return weighted
        case "latency":
            return weighted if draw.random() < _EXPLORED else latency
        case "cost":
            return cost
        case _ as never:
            assert_never(never)


def _price_nusd(snapshot: Snapshot, target: Target, name: str) -> float:
    """What a typical request costs at the target; more than anything where its price is not known."""
    provider = snapshot.providers[target.provider]
    cost = snapshot.prices.cost(
        _TYPICAL,
        provider=provider.name,
        kind=provider.kind,
        model=target.model or name,
        at=_ANY_TIME,
        vendor=provider.vendor,
    )
    return inf if cost.amount_nusd is None else cost.amount_nusd


def cluster_of(attempt: Attempt, model_in_body: str) -> str:
    """The provider's plain cluster, or the one with adapt where the body must name another model."""
    return attempt.provider.name if attempt.model == model_in_body else f"{attempt.provider.name}/adapt"


def timeouts_of(model: Model | None, first: Provider) -> Timeouts:
    """A request has one pair of timeouts: the model's own, else those of the first provider tried."""
    return first.timeouts if model is None else model.timeouts_at(first)


_BETWEEN_ATTEMPTS_S = 0.5
"""For the pause before a retry (0.25 s at most), and to let the time to first byte run out first."""


def idle_s(timeouts: Timeouts, attempts: int) -> float:
    """How long a request may pass without a byte: `stream_idle_s`, but no less than all attempts may wait for headers.

    Envoy 1.40 has one such time for a request, before and after its headers. (It has one for each attempt too, but
    stops watching it once the time to first byte is over, also where that was met.)
    """
    return max(timeouts.stream_idle_s, attempts * (timeouts.first_byte_s + _BETWEEN_ATTEMPTS_S))
