"""The failover chain: dialects, priorities, weights and cooldowns become one order, and each attempt its cluster.

The surprising thing: nobody who speaks the dialect is ever left out of a chain, however little is hoped of them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.config.snapshot import Model, Snapshot, Target, Timeouts
from extproc.config.source import parse
from extproc.decide.routing import Attempt, NothingKnown, attempts, cluster_of, idle_s, timeouts_of
from extproc.dialects import endpoints

CONFIG = b"""
timeouts: {first_byte_s: 60, stream_idle_s: 300}
providers:
  a: {kind: openai, endpoint: "http://127.0.0.1:1/v1"}
  b: {kind: openai, endpoint: "http://127.0.0.1:2/v1", timeouts: {first_byte_s: 5}}
  c: {kind: anthropic, endpoint: "http://127.0.0.1:3", api_key: {env: K}}
  d: {kind: demo}
models:
  m: {targets: [{provider: a}]}
  quick: {targets: [{provider: a}], timeouts: {first_byte_s: 2}}
"""
NAMES = ("a", "b", "c", "d")


def _snapshot() -> Snapshot:
    compiled = parse(CONFIG, path=Path("/nowhere/gateway.yaml"), environ={"K": "k"}, require_secrets=True)
    assert isinstance(compiled, Snapshot)
    return compiled


SNAPSHOT = _snapshot()


def model(*targets: Target) -> Model:
    return Model("m", tuple(sorted(targets, key=lambda target: target.priority)), None)


def target(provider: str, *, priority: int = 0, weight: int = 1, name: str | None = None) -> Target:
    return Target(provider, name, priority, weight)


def chain(*targets: Target, endpoint: endpoints.Endpoint = endpoints.CHAT, seed: int = 0) -> list[str]:
    made = attempts(model(*targets), "asked", endpoint, SNAPSHOT, Random(seed))
    return [attempt.provider.name for attempt in made]


def test_the_lowest_priority_number_comes_first() -> None:
    assert chain(target("d", priority=2), target("a", priority=1), target("b", priority=0)) == ["b", "a", "d"]


def test_only_targets_that_speak_the_dialect_are_tried() -> None:
    everyone = [target(name, priority=number) for number, name in enumerate(NAMES)]
    assert chain(*everyone) == ["a", "b", "d"]
    assert chain(*everyone, endpoint=endpoints.MESSAGES) == ["c", "d"]
    assert chain(target("c")) == []


def test_a_target_without_a_name_of_its_own_is_sent_the_one_asked_for() -> None:
    made = attempts(
        model(target("a", name="at-a"), target("b", priority=1)), "asked", endpoints.CHAT, SNAPSHOT, Random(0)
    )
    assert [attempt.model for attempt in made] == ["at-a", "asked"]
    assert [cluster_of(attempt, "at-a") for attempt in made] == ["a", "b/adapt"]
    assert [cluster_of(attempt, "asked") for attempt in made] == ["a/adapt", "b"]


@pytest.mark.parametrize(("weights", "share"), [((3, 1), 0.75), ((1, 1), 0.5), ((10_000, 1), 0.9999)])
def test_the_first_place_is_drawn_by_weight(weights: tuple[int, int], share: float) -> None:
    draw, number = Random(7), 4000
    targets = model(target("a", weight=weights[0]), target("b", weight=weights[1]))
    firsts = Counter(attempts(targets, "m", endpoints.CHAT, SNAPSHOT, draw)[0].provider.name for _ in range(number))
    assert abs(firsts["a"] / number - share) < 4 * (share * (1 - share) / number) ** 0.5


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 3), st.integers(1, 10_000)), max_size=8),
    st.integers(0, 2**32),
)
def test_each_speaking_target_is_tried_once_and_in_order_of_priority(
    drawn: list[tuple[str, int, int]], seed: int
) -> None:
    targets = [target(name, priority=priority, weight=weight) for name, priority, weight in drawn]
    named = [Target(it.provider, f"{number}", it.priority, it.weight) for number, it in enumerate(targets)]
    made = attempts(model(*named), "m", endpoints.CHAT, SNAPSHOT, Random(seed))
    places = [int(attempt.model) for attempt in made]
    assert sorted(places) == [number for number, it in enumerate(named) if it.provider != "c"]
    assert [named[place].priority for place in places] == sorted(named[place].priority for place in places)


class _Cooling(NothingKnown):
    def is_cooling(self, provider: str) -> bool:
        return provider in ("a", "d")


def test_a_provider_that_cools_down_is_tried_last_and_not_left_out() -> None:
    targets = model(target("d"), target("a", priority=1), target("b", priority=2))
    made = attempts(targets, "m", endpoints.CHAT, SNAPSHOT, Random(0), health=_Cooling())
    assert [attempt.provider.name for attempt in made] == ["b", "d", "a"]


def test_timeouts_are_the_models_else_the_first_providers() -> None:
    a, b = SNAPSHOT.providers["a"], SNAPSHOT.providers["b"]
    assert timeouts_of(SNAPSHOT.models["quick"], a) == Timeouts(first_byte_s=2, stream_idle_s=300)
    assert timeouts_of(SNAPSHOT.models["m"], b) == Timeouts(first_byte_s=5, stream_idle_s=300)
    assert timeouts_of(None, b) == b.timeouts


def test_a_request_may_be_silent_for_stream_idle_s_and_for_all_its_first_bytes() -> None:
    assert idle_s(Timeouts(first_byte_s=60, stream_idle_s=300), 4) == 300
    assert idle_s(Timeouts(first_byte_s=60, stream_idle_s=20), 3) > 180


def test_an_attempt_is_a_value() -> None:
    a = SNAPSHOT.providers["a"]
    assert Attempt(a, "m") == Attempt(a, "m")
