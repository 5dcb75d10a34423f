"""Rounds: each target in turn, again and again, and what the rounds agree on.

The surprising thing: a ratio is taken inside each round, where both sides met the same machine, and the median of those
is the figure. A ratio of two medians would mix a quiet minute with a busy one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from tests.bench.load import Result, Run
from tests.bench.processes import LoadProcess
from tests.bench.targets import Target
from tests.bench.traffic import Chat


@dataclass(frozen=True, slots=True)
class Sample:
    """One target in one round. `cost_us` is CPU per request by part; `per_s` requests a second."""

    cost_us: dict[str, float]
    per_s: float
    latencies_us: Sequence[int] = ()

    @property
    def total_us(self) -> float:
        return sum(self.cost_us.values())


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median over the rounds, the lowest and the highest."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(slots=True)
class Outcomes:
    """What became of all requests of a run of the bench. `seen` holds each target's first failure."""

    sent: int = 0
    failed: int = 0
    completed: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)

    def note(self, target: str, result: Result) -> None:
        """Add a run's outcome."""
        self.sent += result.completed + result.failed + result.unfinished
        self.failed += result.failed + result.unfinished
        self.completed[target] += result.completed
        if result.failed or result.unfinished:
            self.seen.setdefault(target, result.first_failure or f"{result.unfinished} without an answer in time")


def interleaved(names: Sequence[str], rounds: int, take: Callable[[str], Sample]) -> dict[str, list[Sample]]:
    """`rounds` samples of each, all of one round beside each other; who goes first changes from round to round."""
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            samples[name].append(take(name))
    return samples


def measure(load: LoadProcess, target: Target, run: Run, outcomes: Outcomes) -> Sample:
    """Carry out `run` and charge what the target's processes used to its requests."""
    before = target.cpu_s()
    result = load.run(run)
    after = target.cpu_s()
    outcomes.note(target.name, result)
    done = max(1, result.completed)
    cost_us = {role: (after[role] - before[role]) / done * 1e6 for role in after}
    return Sample(cost_us, result.completed / max(result.seconds, 1e-9), result.latencies_us)


def slope(
    load: LoadProcess, target: Target, port: int, key: str, *, streams: int, chunks: tuple[int, int], outcomes: Outcomes
) -> Sample:
    """CPU per chunk: what long streams cost more than as many short ones, over the chunks that they have more."""
    short, long = (
        measure(
            load,
            target,
            Run("closed", port, Chat(key, chunks=number), requests=streams, connections=min(streams, 32)),
            outcomes,
        )
        for number in chunks
    )
    more = chunks[1] - chunks[0]
    return Sample({role: (long.cost_us[role] - short.cost_us[role]) / more for role in long.cost_us}, 0.0)


def middle(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    """The median of one figure over the rounds."""
    return median(of(sample) for sample in samples)


def ratio(samples: Sequence[Sample], base: Sequence[Sample], of: Callable[[Sample], float]) -> Ratio:
    """One figure against the base's, round by round."""
    each = [of(one) / of(other) for one, other in zip(samples, base, strict=True) if of(other) > 0]
    return Ratio(median(each), min(each), max(each)) if each else Ratio(0.0, 0.0, 0.0)


def parts(samples: Sequence[Sample]) -> dict[str, float]:
    """The median CPU of each part."""
    return {role: median(sample.cost_us[role] for sample in samples) for role in samples[0].cost_us}


def percentile_us(samples: Sequence[Sample], share: float) -> float:
    """Of the latencies of all rounds together."""
    together = sorted(latency for sample in samples for latency in sample.latencies_us)
    if not together:
        return 0.0
    return float(together[min(len(together) - 1, int(share * len(together)))])
