"""The catalog's money: what a request's tokens cost, in whole nano-USD.

The record moment asks it once for each finished request. Prices come from `prices:` in gateway.yaml first, then, for
the vendors' own services, from the data inside PyPI `genai-prices`, which is read from the wheel and never refreshed
over the network. The surprising thing: a model without a price costs None, is reported and is never free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from fnmatch import translate
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import Literal

from genai_prices.data_snapshot import find_provider_by_id, get_snapshot
from genai_prices.types import ConditionalPrice, ModelPrice, StartDateConstraint, TieredPrices, TimeOfDateConstraint

Vendor = Literal["openai", "anthropic"]
PriceSource = Literal["override", "genai-prices", "demo", "unpriced"]

REMEMBERED_MODELS = 4096
"""Bound of each memo of prices: a client can name any model that a glob serves, and must not make it grow."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. Input includes cached and cache-write tokens; output includes reasoning tokens."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PriceOverride:
    """An entry of `prices:`, in USD per million tokens, none of them negative.

    Tokens read from or written to a cache without a price of their own are charged at the input price.
    """

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request cost, in nano-USD (1e-9 USD), rounded half up once. None when no price is known."""

    amount_nusd: int | None
    source: PriceSource


_UNPRICED = Cost(None, "unpriced")


@dataclass(frozen=True, slots=True)
class _Rates:
    """Prices as integers: nano-USD per token, times `scale` so that the finest of them is whole. None: no price."""

    scale: int
    input: int | None
    output: int | None
    cached: int | None
    cache_write: int | None

    def amount_nusd(self, usage: Usage) -> int | None:
        """Cost in nano-USD, rounded half up; None when tokens were used for which this model has no price."""
        cached, written = usage.cached_tokens, usage.cache_write_tokens
        total = 0
        for tokens, rate in (
            (usage.input_tokens - cached - written, self.input),
            (cached, self.cached),
            (written, self.cache_write),
            (usage.output_tokens, self.output),
        ):
            # A provider may report more cached tokens than input, or negative ones: a request never earns money.
            if tokens <= 0:
                continue
            if rate is None:
                return None
            total += tokens * rate
        return (2 * total + self.scale) // (2 * self.scale)


@dataclass(frozen=True, slots=True)
class _Tariff:
    """A model's prices by size of the input: (`above`, rates) ascending; the last with input tokens > `above` holds for
    all tokens of the request, as vendors bill it. The first band holds for any size.
    """

    bands: tuple[tuple[int, _Rates], ...]

    def amount_nusd(self, usage: Usage) -> int | None:
        rates = self.bands[0][1]
        for above, higher in self.bands[1:]:
            if usage.input_tokens <= above:
                break
            rates = higher
        return rates.amount_nusd(usage)


_Constraint = StartDateConstraint | TimeOfDateConstraint | None


@dataclass(frozen=True, slots=True)
class _Bundled:
    """A model of the bundled data: its first tariff, and those that replace it at some times, the last one first."""

    first: _Tariff
    later: tuple[tuple[_Constraint, _Tariff], ...]

    def at(self, moment: datetime) -> _Tariff:
        for constraint, tariff in self.later:
            if constraint is None or constraint.active(moment):
                return tariff
        return self.first


class PriceBook:
    """Prices by provider and model: the overrides first, then the bundled prices of the vendor itself.

    Override keys are `provider/model` or globs over it, in the case they are written. An exact key wins, then the first
    glob in the file's order.
    """

    __slots__ = ("_exact", "_globs", "_override_for", "overrides")

    def __init__(self, overrides: Mapping[str, PriceOverride]) -> None:
        self.overrides: Mapping[str, PriceOverride] = dict(overrides)
        tariffs = {key: _override_tariff(price) for key, price in overrides.items()}
        self._exact = tariffs
        self._globs: tuple[tuple[re.Pattern[str], _Tariff], ...] = tuple(
            (re.compile(translate(key)), tariff) for key, tariff in tariffs.items()
        )
        self._override_for = lru_cache(maxsize=REMEMBERED_MODELS)(self._find_override)

    def cost(
        self, usage: Usage, *, provider: str, kind: str, model: str, at: datetime, vendor: Vendor | None = None
    ) -> Cost:
        """What `usage` of `model` (the provider's own name for it) cost at `at` (aware; when the request started).

        `provider` is the name in gateway.yaml and `kind` its kind. `vendor` says whose published prices hold: None for
        a compatible server, whose prices only an override can know. The demo provider costs 0 without an override.
        """
        override = self._override_for(provider, model) if self._exact else None
        if override is not None:
            return Cost(override.amount_nusd(usage), "override")
        if kind == "demo":
            return Cost(0, "demo")
        bundled = None if vendor is None else _bundled(vendor, model)
        amount_nusd = None if bundled is None else bundled.at(at).amount_nusd(usage)
        return _UNPRICED if amount_nusd is None else Cost(amount_nusd, "genai-prices")

    def _find_override(self, provider: str, model: str) -> _Tariff | None:
        name = f"{provider}/{model}"
        exact = self._exact.get(name)
        if exact is not None:
            return exact
        return next((tariff for pattern, tariff in self._globs if pattern.match(name)), None)


def _override_tariff(price: PriceOverride) -> _Tariff:
    cached = price.input if price.cached_input is None else price.cached_input
    cache_write = price.input if price.cache_write is None else price.cache_write
    return _Tariff(((-1, _rates(price.input, price.output, cached, cache_write)),))


@lru_cache(maxsize=REMEMBERED_MODELS)
def _bundled(vendor: Vendor, model: str) -> _Bundled | None:
    """The bundled prices of a model, None when it is unknown or not priced by tokens (speech by the hour).

    It asks the vendor's entry, not `calc_price`, because the library remembers every name it is asked for.
    """
    provider = find_provider_by_id(get_snapshot().providers, vendor)
    found = provider.find_model(model) if provider is not None else None
    if found is None:
        return None
    prices = found.prices if isinstance(found.prices, list) else [ConditionalPrice(prices=found.prices)]
    if not prices:
        return None
    if any(price.prices.input_mtok is None and price.prices.output_mtok is None for price in prices):
        return None
    later = tuple((price.constraint, _tariff(price.prices)) for price in reversed(prices))
    return _Bundled(_tariff(prices[0].prices), later)


def _tariff(price: ModelPrice) -> _Tariff:
    units = [price.input_mtok, price.output_mtok, price.cache_read_mtok, price.cache_write_mtok]
    thresholds = {tier.start for unit in units if isinstance(unit, TieredPrices) for tier in unit.tiers}
    return _Tariff(tuple((above, _band(units, above)) for above in (-1, *sorted(thresholds))))


def _band(units: list[Decimal | TieredPrices | None], above: int) -> _Rates:
    fresh, output, cached, cache_write = (_price_above(unit, above) for unit in units)
    # Without a price of their own, tokens of the cache are input tokens as any other: so does the library.
    return _rates(fresh, output, fresh if cached is None else cached, fresh if cache_write is None else cache_write)


def _price_above(unit: Decimal | TieredPrices | None, above: int) -> Decimal | None:
    if not isinstance(unit, TieredPrices):
        return unit
    return next((tier.price for tier in reversed(unit.tiers) if above >= tier.start), unit.base)


def _rates(*usd_per_mtok: Decimal | None) -> _Rates:
    """Rates of (input, output, cached, cache write) from USD per million tokens: 1 USD/Mtok is 1,000 nano-USD/token."""
    nusd_per_token = [None if price is None else Fraction(price) * 1000 for price in usd_per_mtok]
    scale = lcm(*(rate.denominator for rate in nusd_per_token if rate is not None))
    fresh, output, cached, cache_write = (None if rate is None else int(rate * scale) for rate in nusd_per_token)
    return _Rates(scale, fresh, output, cached, cache_write)
