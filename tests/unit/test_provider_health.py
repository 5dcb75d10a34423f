"""Cooldowns and latencies: what record learns, what the board shares, and what routing makes of it."""

from __future__ import annotations

import multiprocessing
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest

from extproc.catalog import PriceBook, PriceOverride
from extproc.config.snapshot import Endpoint, Model, Order, Provider, Target, Timeouts
from extproc.decide import routing
from extproc.decision import Decision
from extproc.dialects.endpoints import CHAT
from extproc.errors import Dialect
from extproc.record.finished import AttemptMade, Ending, Finished
from extproc.record.health import FAILURES_BEFORE_COOLDOWN, FIRST_COOLDOWN_S, LONGEST_RETRY_AFTER_S, ProviderHealth
from extproc.server.board import Board


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(tmp_path: Path, clock: Clock) -> ProviderHealth:
    board = Board(tmp_path / "board")
    board.know(("a", "b"))
    return ProviderHealth(board, clock)


def finished(
    *attempts: AttemptMade, status: int = 200, ending: Ending = Ending.WHOLE, first_byte_s: float = 0.1
) -> Finished:
    decision = Decision(
        dialect=Dialect.OPENAI,
        endpoint="chat",
        providers=tuple(made.provider for made in attempts),
        models=tuple("m" for _ in attempts),
    )
    return Finished(
        request_id="r",
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        status=status,
        ending=ending,
        decision=decision,
        attempts=attempts,
        code="",
        usage=None,
        usage_whole=False,
        model_returned="",
        sent_upstream=True,
        first_byte_s=first_byte_s,
        duration_s=1.0,
        request_bytes=1,
        response_bytes=1,
    )


def test_a_provider_that_asks_to_be_left_alone_is(health: ProviderHealth, clock: Clock) -> None:
    health.learn(finished(AttemptMade("a", 429, 7.0), AttemptMade("b", 200)))
    assert health.is_cooling("a")
    assert not health.is_cooling("b")
    clock.now += 7.1
    assert not health.is_cooling("a")


def test_a_provider_can_not_ask_to_be_left_alone_for_ever(health: ProviderHealth, clock: Clock) -> None:
    health.learn(finished(AttemptMade("a", 503, 1e9)))
    clock.now += LONGEST_RETRY_AFTER_S + 1
    assert not health.is_cooling("a")


def test_failures_in_a_row_cool_a_provider_down_and_one_success_between_them_does_not(
    health: ProviderHealth, clock: Clock
) -> None:
    for _ in range(FAILURES_BEFORE_COOLDOWN - 1):
        health.learn(finished(AttemptMade("a", 500), status=503))
    health.learn(finished(AttemptMade("a", 200)))
    health.learn(finished(AttemptMade("a", None), status=503))
    assert not health.is_cooling("a")
    for _ in range(FAILURES_BEFORE_COOLDOWN):
        health.learn(finished(AttemptMade("a", None), status=503))
    assert health.is_cooling("a")
    clock.now += FIRST_COOLDOWN_S + 0.1
    assert not health.is_cooling("a")


def test_requests_under_way_when_it_began_to_fail_do_not_lengthen_a_cooldown(
    health: ProviderHealth, clock: Clock
) -> None:
    for _ in range(FAILURES_BEFORE_COOLDOWN + 50):
        health.learn(finished(AttemptMade("a", 500), status=503))
    clock.now += FIRST_COOLDOWN_S + 0.1
    assert not health.is_cooling("a")


def test_each_further_failure_doubles_the_cooldown(health: ProviderHealth, clock: Clock) -> None:
    for _ in range(FAILURES_BEFORE_COOLDOWN):
        health.learn(finished(AttemptMade("a", 500), status=503))
    clock.now += FIRST_COOLDOWN_S + 0.1
    health.learn(finished(AttemptMade("a", 500), status=503))
    clock.now += FIRST_COOLDOWN_S + 0.1
    assert health.is_cooling("a")
    clock.now += FIRST_COOLDOWN_S
    assert not health.is_cooling("a")


def test_a_client_that_did_not_wait_says_nothing_of_the_provider(health: ProviderHealth) -> None:
    for _ in range(FAILURES_BEFORE_COOLDOWN + 1):
        health.learn(finished(AttemptMade("a", None), status=0, ending=Ending.CLIENT_LEFT))
    assert not health.is_cooling("a")


def test_a_clients_own_mistakes_are_no_failures_of_the_provider(health: ProviderHealth) -> None:
    for _ in range(FAILURES_BEFORE_COOLDOWN + 1):
        health.learn(finished(AttemptMade("a", 400), status=400))
    assert not health.is_cooling("a")


def _cool(file: Path) -> None:
    board = Board(file)
    board.know(("a", "b"))
    board.cool("b", 5_000.0)


def test_all_processes_see_one_board(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    board.know(("a", "b"))
    other = multiprocessing.get_context("spawn").Process(target=_cool, args=(tmp_path / "board",))
    other.start()
    other.join(60)
    assert other.exitcode == 0
    assert (board.until("a"), board.until("b")) == (0.0, 5_000.0)


def test_an_earlier_end_never_shortens_a_cooldown_and_unknown_names_have_none(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    board.know(("a",))
    board.cool("a", 50.0)
    board.cool("a", 20.0)
    board.cool("nobody", 50.0)
    assert (board.until("a"), board.until("nobody")) == (50.0, 0.0)
    board.clear("a")
    assert board.until("a") == 0.0


def test_thousands_of_names_have_a_row_of_their_own(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    names = [f"provider-{number}" for number in range(4096)]
    board.know(names)
    for number, name in enumerate(names):
        board.cool(name, float(number + 1))
    assert [board.until(name) for name in names] == [float(number + 1) for number in range(4096)]
    with pytest.raises(ValueError, match="more than"):
        board.know(("one too many",))


# What routing makes of it


class Catalog:
    """The part of a snapshot that routing reads."""

    def __init__(self, prices: dict[str, PriceOverride] | None = None) -> None:
        endpoint = Endpoint("http", "127.0.0.1", 80, "/v1")
        self.providers = {
            name: Provider(name, "openai", endpoint, None, (), None, Timeouts(60, 300), stream_usage=True)
            for name in ("a", "b", "c")
        }
        self.prices = PriceBook(prices or {})


class Known:
    """A health that is said, not learnt."""

    def __init__(self, cooling: set[str], first_byte_s: dict[str, float]) -> None:
        self._cooling = cooling
        self._first_byte_s = first_byte_s

    def is_cooling(self, provider: str) -> bool:
        return provider in self._cooling

    def first_byte_s(self, provider: str, model: str) -> float | None:
        assert model == "m"
        return self._first_byte_s.get(provider)


def order(model: Model, health: routing.Health, catalog: Catalog | None = None, seed: int = 1) -> list[str]:
    found = routing.attempts(model, "m", CHAT, catalog or Catalog(), Random(seed), health=health)  # type: ignore[arg-type]
    return [attempt.provider.name for attempt in found]


def chain(*targets: Target, order: Order = "weight") -> Model:
    return Model("m", targets, None, order)


def test_a_provider_that_cools_down_goes_to_the_end_and_is_never_left_out() -> None:
    model = chain(Target("a", None, 0, 1), Target("b", None, 1, 1), Target("c", None, 2, 1))
    assert order(model, Known({"a"}, {})) == ["b", "c", "a"]
    assert order(model, Known({"a", "b", "c"}, {})) == ["a", "b", "c"]


def test_the_fastest_comes_first_inside_a_priority_and_priorities_still_hold() -> None:
    model = chain(Target("a", None, 0, 1), Target("b", None, 0, 1), Target("c", None, 1, 1), order="latency")
    assert order(model, Known(set(), {"a": 0.9, "b": 0.2, "c": 0.01})) == ["b", "a", "c"]


def test_a_target_whose_latency_nobody_knows_is_tried() -> None:
    model = chain(Target("a", None, 0, 1), Target("b", None, 0, 1), order="latency")
    assert order(model, Known(set(), {"a": 0.1})) == ["b", "a"]


def test_now_and_then_a_slower_target_is_tried_again() -> None:
    model = chain(Target("a", None, 0, 1), Target("b", None, 0, 1), order="latency")
    firsts = [order(model, Known(set(), {"a": 0.1, "b": 9.0}), seed=seed)[0] for seed in range(400)]
    assert 0 < firsts.count("b") < 40


def test_the_cheapest_comes_first_and_the_unpriced_last() -> None:
    prices = {
        "a/m": PriceOverride(input=10, output=10),  # type: ignore[arg-type]
        "b/m": PriceOverride(input=1, output=1),  # type: ignore[arg-type]
    }
    model = chain(Target("c", None, 0, 1), Target("a", None, 0, 1), Target("b", None, 0, 1), order="cost")
    assert order(model, routing.NothingKnown(), Catalog(prices)) == ["b", "a", "c"]


def test_latency_is_an_average_that_follows(health: ProviderHealth) -> None:
    health.learn(finished(AttemptMade("a", 200), first_byte_s=1.0))
    assert health.first_byte_s("a", "m") == 1.0
    for _ in range(40):
        health.learn(finished(AttemptMade("a", 200), first_byte_s=0.1))
    latest = health.first_byte_s("a", "m")
    assert latest is not None
    assert latest < 0.11
    assert health.first_byte_s("b", "m") is None
