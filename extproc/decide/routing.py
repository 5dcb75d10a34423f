"""Where a request may go, in which order: targets of a model become the failover chain.

A late step of decide. The surprising thing: weights are drawn here and not by Envoy. The chain then names one cluster
for each attempt, so that attempt k is target k for adapt, for record and for Envoy alike, and a target that lost the
draw still is the next to be tried before a lower priority.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random

from extproc.config.snapshot import Model, Provider, Snapshot, Target, Timeouts
from extproc.dialects.endpoints import Endpoint
from extproc.errors import Dialect
from extproc.providers.kinds import KINDS


@dataclass(frozen=True, slots=True)
class Attempt:
    """One target with the provider's own name of the model filled in."""

    provider: Provider
    model: str


def attempts(model: Model, name: str, endpoint: Endpoint, snapshot: Snapshot, draw: Random) -> tuple[Attempt, ...]:
    """The targets of `model` that speak the endpoint's dialect, in the order they are to be tried."""
    speaking = [target for target in model.targets if speaks(snapshot.providers[target.provider], endpoint.dialect)]
    return tuple(
        Attempt(snapshot.providers[target.provider], target.model or name) for target in _ordered(speaking, draw)
    )


def speaks(provider: Provider, dialect: Dialect) -> bool:
    """Whether the provider takes this dialect as it is."""
    return dialect in KINDS[provider.kind].dialects


def _ordered(targets: Sequence[Target], draw: Random) -> list[Target]:
    """Lowest priority number first; inside one, a weighted draw without replacement (Efraimidis and Spirakis)."""
    if len(targets) < 2:
        return list(targets)
    ordered: list[Target] = []
    for _, group in groupby(targets, key=lambda target: target.priority):
        ordered += sorted(group, key=lambda target: draw.random() ** (1 / target.weight), reverse=True)
    return ordered


def cluster_of(attempt: Attempt, model_in_body: str) -> str:
    """The provider's plain cluster, or the one with adapt where the body must name another model."""
    return attempt.provider.name if attempt.model == model_in_body else f"{attempt.provider.name}/adapt"


def timeouts_of(model: Model | None, first: Provider) -> Timeouts:
    """A request has one pair of timeouts: the model's own, else those of the first provider tried."""
    return first.timeouts if model is None else model.timeouts_at(first)


def idle_s(timeouts: Timeouts, *, stream: bool) -> float:
    """How long an attempt may be silent. A whole answer is silent until it is made, so it has the longer of both."""
    return timeouts.stream_idle_s if stream else max(timeouts.first_byte_s, timeouts.stream_idle_s)
