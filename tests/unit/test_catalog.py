"""Prices: overrides by glob, the vendors' own published prices exactly as the library computes them, never free."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal

import genai_prices
import pytest
from genai_prices.data import providers
from genai_prices.types import ConditionalPrice, ModelInfo, StartDateConstraint, TieredPrices
from hypothesis import given
from hypothesis import strategies as st

from extproc import catalog
from extproc.catalog import Cost, PriceBook, PriceOverride, Usage, Vendor

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
BUNDLED = PriceBook({})
VENDORS: tuple[Vendor, ...] = ("openai", "anthropic")
MODELS = [(vendor, model) for vendor in VENDORS for p in providers if p.id == vendor for model in p.models]


def vendor_cost(vendor: Vendor, model: str, usage: Usage, at: datetime = NOW) -> Cost:
    return BUNDLED.cost(usage, provider=vendor, kind=vendor, vendor=vendor, model=model, at=at)


def override_cost(usage: Usage, model: str, prices: dict[str, PriceOverride], kind: str = "openai") -> Cost:
    return PriceBook(prices).cost(usage, provider="vllm", kind=kind, vendor=None, model=model, at=NOW)


def library_nusd(vendor: Vendor, model: str, usage: Usage, at: datetime) -> int:
    counted = genai_prices.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cached_tokens,
        cache_write_tokens=usage.cache_write_tokens,
    )
    usd = genai_prices.calc_price(counted, model, provider_id=vendor, genai_request_timestamp=at).total_price
    return int((usd * 10**9).quantize(Decimal(1), rounding=ROUND_HALF_UP))


def entries(model: ModelInfo) -> list[ConditionalPrice]:
    return model.prices if isinstance(model.prices, list) else [ConditionalPrice(prices=model.prices)]


def names(vendor: Vendor, model: ModelInfo) -> list[str]:
    """Names that the library resolves to exactly this model: its id, unless an earlier entry matches it first."""
    provider = next(p for p in providers if p.id == vendor)
    return [name for name in {model.id, *literals(model.match)} if provider.find_model(name) is model]


def literals(clause: object) -> list[str]:
    found: list[str] = []
    for value in vars(clause).values():
        match value:
            case str():
                found.append(value)
            case list():
                found.extend(text for inner in value for text in literals(inner))
    return found


def moments(model: ModelInfo) -> list[datetime]:
    starts = [e.constraint.start_date for e in entries(model) if isinstance(e.constraint, StartDateConstraint)]
    return [NOW, datetime(2020, 1, 1, tzinfo=UTC), *(datetime(d.year, d.month, d.day, tzinfo=UTC) for d in starts)]


def usages(model: ModelInfo) -> list[Usage]:
    """Usages on both sides of every tier of the model, with and without tokens of the cache."""
    tiers = {
        tier.start
        for entry in entries(model)
        for unit in vars(entry.prices).values()
        if isinstance(unit, TieredPrices)
        for tier in unit.tiers
    }
    sizes = {0, 1, 7, 1_001, 123_457, 1_000_003} | {size for start in tiers for size in (start, start + 1)}
    plain = [Usage(size, 13) for size in sizes]
    return plain + [Usage(size, 977, size // 3, size // 5, 500) for size in sizes]


def priced_by_tokens(model: ModelInfo) -> bool:
    return all(e.prices.input_mtok is not None for e in entries(model))


def test_every_bundled_model_of_both_vendors_costs_what_the_library_says() -> None:
    compared = 0
    for vendor, model in MODELS:
        if not priced_by_tokens(model):
            continue
        for name in names(vendor, model):
            for at in moments(model):
                for usage in usages(model):
                    output_free = all(e.prices.output_mtok is None for e in entries(model))
                    counted = Usage(usage.input_tokens, 0, usage.cached_tokens) if output_free else usage
                    cost = vendor_cost(vendor, name, counted, at)
                    assert cost == Cost(library_nusd(vendor, name, counted, at), "genai-prices"), (name, at, counted)
                    compared += 1
    assert compared > 5_000


@given(
    index=st.integers(0, len(MODELS) - 1),
    fresh=st.integers(0, 2_000_000),
    cached=st.integers(0, 500_000),
    written=st.integers(0, 500_000),
    output=st.integers(1, 300_000),
)
def test_any_usage_costs_what_the_library_says(index: int, fresh: int, cached: int, written: int, output: int) -> None:
    vendor, model = MODELS[index]
    usage = Usage(fresh + cached + written, output, cached, written, output // 2)
    for name in names(vendor, model):
        cost = vendor_cost(vendor, name, usage)
        if priced_by_tokens(model) and all(e.prices.output_mtok is not None for e in entries(model)):
            assert cost == Cost(library_nusd(vendor, name, usage, NOW), "genai-prices")
        else:
            assert cost == Cost(None, "unpriced")


def test_models_priced_by_the_hour_or_not_at_all_are_unpriced_and_never_free() -> None:
    by_other_units = [(vendor, model) for vendor, model in MODELS if not priced_by_tokens(model)]
    assert {"whisper-1", "tts-1"} <= {model.id for _, model in by_other_units}
    for vendor, model in by_other_units:
        assert vendor_cost(vendor, model.id, Usage(1_000, 10)) == Cost(None, "unpriced")
        assert vendor_cost(vendor, model.id, Usage()) == Cost(None, "unpriced")


def test_output_of_a_model_that_prices_only_input_is_unpriced() -> None:
    assert vendor_cost("openai", "text-embedding-3-small", Usage(1_000_000)) == Cost(20_000_000, "genai-prices")
    assert vendor_cost("openai", "text-embedding-3-small", Usage(1_000, 1)) == Cost(None, "unpriced")


@pytest.mark.parametrize(
    ("vendor", "dated", "plain"),
    [
        ("openai", "gpt-4o-2024-08-06", "gpt-4o"),
        ("anthropic", "claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
        ("anthropic", "claude-3-5-haiku-20241022", "claude-3-5-haiku-latest"),
    ],
)
def test_dated_names_cost_what_their_alias_costs(vendor: Vendor, dated: str, plain: str) -> None:
    usage = Usage(12_345, 678, 1_000)
    assert vendor_cost(vendor, dated, usage).amount_nusd == vendor_cost(vendor, plain, usage).amount_nusd
    assert vendor_cost(vendor, dated, usage).amount_nusd is not None


def test_cached_and_cache_write_tokens_have_their_own_rates() -> None:
    # claude-sonnet-4-5: input 3, cache read 0.30, cache write 3.75, output 15 USD per million.
    cost = vendor_cost(
        "anthropic", "claude-sonnet-4-5", Usage(10_000, 100, cached_tokens=6_000, cache_write_tokens=1_000)
    )
    assert cost.amount_nusd == 3_000 * 3_000 + 6_000 * 300 + 1_000 * 3_750 + 100 * 15_000


def test_reasoning_tokens_are_part_of_the_output_and_not_charged_twice() -> None:
    assert vendor_cost("openai", "gpt-4o", Usage(0, 100, reasoning_tokens=90)).amount_nusd == 100 * 10_000


def test_bundled_prices_do_not_hold_for_a_compatible_server() -> None:
    cost = BUNDLED.cost(Usage(10, 10), provider="vllm", kind="openai", vendor=None, model="gpt-4o", at=NOW)
    assert cost == Cost(None, "unpriced")


def test_a_vendors_prices_do_not_hold_for_the_other_vendors_models() -> None:
    assert vendor_cost("anthropic", "gpt-4o", Usage(10, 10)) == Cost(None, "unpriced")


def test_the_demo_provider_costs_nothing_and_says_so() -> None:
    cost = BUNDLED.cost(Usage(10, 10), provider="demo", kind="demo", vendor=None, model="gpt-4o", at=NOW)
    assert cost == Cost(0, "demo")
    priced = override_cost(Usage(1, 0), "echo", {"*": PriceOverride(Decimal(1), Decimal(1))}, kind="demo")
    assert priced == Cost(1_000, "override")


def test_an_override_replaces_the_bundled_price() -> None:
    book = PriceBook({"openai/gpt-4o": PriceOverride(Decimal(1), Decimal(2))})
    cost = book.cost(Usage(10, 10), provider="openai", kind="openai", vendor="openai", model="gpt-4o", at=NOW)
    assert cost == Cost(10 * 1_000 + 10 * 2_000, "override")


def test_the_exact_override_wins_then_the_first_glob_of_the_file() -> None:
    prices = {
        "vllm/llama-*": PriceOverride(Decimal(1), Decimal(0)),
        "vllm/*": PriceOverride(Decimal(2), Decimal(0)),
        "vllm/llama-3": PriceOverride(Decimal(3), Decimal(0)),
    }
    assert override_cost(Usage(1), "llama-3", prices).amount_nusd == 3_000
    assert override_cost(Usage(1), "llama-4", prices).amount_nusd == 1_000
    assert override_cost(Usage(1), "qwen", prices).amount_nusd == 2_000


def test_override_globs_match_the_case_as_written() -> None:
    prices = {"vllm/Llama*": PriceOverride(Decimal(1), Decimal(0))}
    assert override_cost(Usage(1), "llama-3", prices) == Cost(None, "unpriced")


def test_a_model_name_with_glob_characters_or_line_breaks_is_still_matched_whole() -> None:
    prices = {"vllm/m[1]": PriceOverride(Decimal(1), Decimal(0))}
    assert override_cost(Usage(1), "m[1]", prices).amount_nusd == 1_000
    assert override_cost(Usage(1), "m1\n", prices) == Cost(None, "unpriced")


def test_cache_tokens_without_their_own_override_price_cost_the_input_price() -> None:
    plain = {"*": PriceOverride(Decimal(2), Decimal(0))}
    assert override_cost(Usage(10, 0, 4, 3), "m", plain).amount_nusd == 10 * 2_000
    own = {"*": PriceOverride(Decimal(2), Decimal(0), Decimal("0.5"), Decimal(4))}
    assert override_cost(Usage(10, 0, 4, 3), "m", own).amount_nusd == 3 * 2_000 + 4 * 500 + 3 * 4_000


def test_a_cost_is_rounded_half_up_once_for_the_whole_request() -> None:
    halves = {"*": PriceOverride(Decimal("0.0005"), Decimal("0.0005"))}
    assert override_cost(Usage(1, 0), "m", halves).amount_nusd == 1
    assert override_cost(Usage(1, 1), "m", halves).amount_nusd == 1
    finest = {"*": PriceOverride(Decimal("0.000000000000000000000000000000000049"), Decimal(0))}
    assert override_cost(Usage(10**6), "m", finest).amount_nusd == 0


@pytest.mark.parametrize("usage", [Usage(5, 0, 9, 9), Usage(-5, -5, -5, -5), Usage(0, -1), Usage(-(10**9), 1)])
def test_a_provider_that_reports_nonsense_never_earns_money(usage: Usage) -> None:
    cost = vendor_cost("anthropic", "claude-sonnet-4-5", usage)
    assert cost.amount_nusd is not None
    assert cost.amount_nusd >= 0


def test_names_that_clients_invent_do_not_grow_the_memory() -> None:
    book = PriceBook({"vllm/*": PriceOverride(Decimal(1), Decimal(1))})
    vendor: Literal["openai"] = "openai"
    for number in range(catalog.REMEMBERED_MODELS + 50):
        book.cost(Usage(1), provider="vllm", kind="openai", vendor=None, model=f"m{number}", at=NOW)
    for number in range(200):
        vendor_cost(vendor, f"no-such-model-{number}", Usage(1))
    assert book._override_for.cache_info().currsize == catalog.REMEMBERED_MODELS
    assert catalog._bundled.cache_info().maxsize == catalog.REMEMBERED_MODELS
    assert not [key for key in genai_prices.data_snapshot.get_snapshot()._provider_cache if "no-such" in str(key)]


def test_prices_never_come_from_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a price was looked up over the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    catalog._bundled.cache_clear()
    assert vendor_cost("openai", "gpt-4o-mini", Usage(1_000_000)).amount_nusd == 150_000_000
