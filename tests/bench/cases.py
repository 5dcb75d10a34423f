"""What is measured, case by case. Each gives rows: a figure of the gateway beside bare Envoy's in the same rounds.

The surprising thing: the cases hold no limits that they enforce. `aim` is what the project set itself, printed beside
what was found; docs/performance.md says what each figure means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tests.bench import rounds
from tests.bench.load import Run
from tests.bench.processes import LoadProcess, UpstreamProcess
from tests.bench.rounds import Outcomes, Ratio, Sample
from tests.bench.targets import (
    KEY,
    NUMBERED_MODEL,
    RENAMED,
    Config,
    Target,
    bare_envoy,
    connection_manager,
    gateway,
    without,
)
from tests.bench.traffic import HOLD, Chat
from tests.gateway import Gateway

FIRST_KEY = KEY.format(0)
BARE, WHOLE, DECIDING = "bare Envoy", "gateway", "deciding alone"
_RECORDING = ("answer", "usage", "json-usage", "mended")
_KIB = 1024
_STEADY_PER_S = 1000.0
_FEW = (10, 5)
_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `parts` says how a cost divides (Envoy, worker, supervisor), in the same unit."""

    case: str
    figure: str
    unit: str
    value: float
    bare: float | None = None
    ratio: Ratio | None = None
    parts: dict[str, float] | None = None
    aim: str = ""


@dataclass(frozen=True, slots=True)
class Size:
    """How long a run is."""

    rounds: int
    requests: int
    seconds: float
    streams: int
    chunks: tuple[int, int]
    idle_streams: int
    keys: int
    models: int


FULL = Size(9, 4000, 5.0, 96, (10, 160), 2000, 10_000, 500)
QUICK = Size(3, 1500, 2.0, 32, (10, 110), 300, 2_000, 100)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every case works with: the targets, all running, and the load that goes to one of them at a time."""

    size: Size
    upstream_port: int
    concurrency: int
    load: LoadProcess
    targets: dict[str, Target]
    outcomes: Outcomes

    def sample(self, name: str, chat: Chat, requests: int, connections: int = 32) -> Sample:
        """One closed-loop round on a target."""
        target = self.targets[name]
        run = Run("closed", target.port, chat, requests=requests, connections=connections)
        return rounds.measure(self.load, target, run, self.outcomes)

    def open_loop(self, name: str, rate_per_s: float) -> Sample:
        """One round of `size.seconds` at a rate that does not depend on the answers."""
        target = self.targets[name]
        requests = int(rate_per_s * self.size.seconds)
        run = Run("open", target.port, Chat(FIRST_KEY), requests=requests, connections=16, rate_per_s=rate_per_s)
        return rounds.measure(self.load, target, run, self.outcomes)


@contextmanager
def bench(size: Size, concurrency: int) -> Iterator[tuple[Bench, Gateway]]:
    """Start upstream, load, bare Envoy, the gateway, and the Envoy that has decide but neither usage nor record."""
    with ExitStack() as stack:
        upstream = stack.enter_context(UpstreamProcess())
        load = stack.enter_context(LoadProcess())
        bare = stack.enter_context(bare_envoy(upstream.port, concurrency))
        whole, running = stack.enter_context(gateway(upstream.port, concurrency=concurrency))
        deciding = stack.enter_context(without(running, decide_alone, DECIDING, concurrency))
        targets = {target.name: target for target in (bare, whole, deciding)}
        made = Bench(size, upstream.port, concurrency, load, targets, Outcomes())
        for name in targets:
            made.sample(name, Chat(FIRST_KEY), 500)  # connections, caches and learned ratios are there from here on
        yield made, running


def decide_alone(config: Config) -> None:
    """Leave out all that reads answers or records: what is left is key, policy, estimate, routing and the attempt."""
    connections = connection_manager(config)
    connections.pop("access_log", None)
    connections["http_filters"] = [each for each in connections["http_filters"] if each["name"] not in _RECORDING]
    for host in connections["route_config"]["virtual_hosts"]:
        for route in host["routes"]:
            overrides = route.get("typed_per_filter_config", {})
            for name in _RECORDING:
                overrides.pop(name, None)


def _total(sample: Sample) -> float:
    return sample.total_us


def _per_s(sample: Sample) -> float:
    return sample.per_s


def _cost_row(case: str, figure: str, samples: list[Sample], base: list[Sample], aim: str = "") -> Row:
    return Row(
        case,
        figure,
        "us",
        rounds.middle(samples, _total),
        rounds.middle(base, _total),
        rounds.ratio(samples, base, _total),
        rounds.parts(samples),
        aim,
    )


def saturation(bench: Bench) -> list[Row]:
    """CPU per request and requests a second, 2 KB, as fast as it goes."""
    chats = {
        BARE: (BARE, Chat(FIRST_KEY)),
        DECIDING: (DECIDING, Chat(FIRST_KEY)),
        WHOLE: (WHOLE, Chat(FIRST_KEY)),
        "renamed": (WHOLE, Chat(FIRST_KEY, model=RENAMED)),
    }
    found = rounds.interleaved(
        list(chats), bench.size.rounds, lambda name: bench.sample(*chats[name], bench.size.requests)
    )
    base, whole = found[BARE], found[WHOLE]
    return [
        _cost_row("request", "CPU, deciding alone", found[DECIDING], base, "at most 3.2"),
        _cost_row("request", "CPU, whole path", whole, base, "at most 4.5, better 3.6"),
        _cost_row("request", "CPU, whole path, model renamed", found["renamed"], base),
        Row(
            "request",
            "requests a second at saturation",
            "1/s",
            rounds.middle(whole, _per_s),
            rounds.middle(base, _per_s),
            rounds.ratio(whole, base, _per_s),
        ),
    ]


def steady(bench: Bench) -> list[Row]:
    """CPU per request where all meet the same 1,000 requests a second, which none is saturated by."""
    found = rounds.interleaved(
        (BARE, DECIDING, WHOLE), bench.size.rounds, lambda name: bench.open_loop(name, _STEADY_PER_S)
    )
    return [
        _cost_row("steady", "CPU at 1,000/s, deciding alone", found[DECIDING], found[BARE], "at most 3.2"),
        _cost_row("steady", "CPU at 1,000/s, whole path", found[WHOLE], found[BARE], "at most 4.5, better 3.6"),
    ]


def latency(bench: Bench) -> list[Row]:
    """What the gateway adds at 100 requests a second, sent whatever comes back."""
    found = rounds.interleaved((BARE, WHOLE), bench.size.rounds, lambda name: bench.open_loop(name, 100.0))
    rows = []
    for share, name, aim in ((0.5, "p50", "at most 1 ms"), (0.99, "p99", "")):
        base, whole = (rounds.percentile_us(found[target], share) / 1000 for target in (BARE, WHOLE))
        per_round = [
            (rounds.percentile_us([one], share) - rounds.percentile_us([other], share)) / 1000
            for one, other in zip(found[WHOLE], found[BARE], strict=True)
        ]
        figure = f"added {name} at 100/s (rounds {min(per_round):.2f} to {max(per_round):.2f})"
        rows.append(Row("latency", figure, "ms", whole - base, base, aim=aim))
        rows.append(Row("latency", f"{name} at 100/s", "ms", whole, base))
    return rows


def chunks(bench: Bench) -> list[Row]:
    """CPU per streamed chunk."""

    def take(name: str) -> Sample:
        target = bench.targets[name]
        return rounds.slope(
            bench.load,
            target,
            target.port,
            FIRST_KEY,
            streams=bench.size.streams,
            chunks=bench.size.chunks,
            outcomes=bench.outcomes,
        )

    found = rounds.interleaved((BARE, WHOLE), bench.size.rounds, take)
    return [_cost_row("stream", "CPU, a streamed chunk", found[WHOLE], found[BARE], "at most 1.35")]


def memory(bench: Bench) -> list[Row]:
    """Resident memory of idle streams: opened, one chunk received, then silence. In processes that are new."""
    with ExitStack() as stack:
        bare = stack.enter_context(bare_envoy(bench.upstream_port, bench.concurrency))
        whole, _ = stack.enter_context(gateway(bench.upstream_port, concurrency=bench.concurrency, name="memory"))
        grown = [_grown_kib(bench, target) for target in (bare, whole)]
        left = [{role: size / _KIB**2 for role, size in target.rss_bytes().items()} for target in (bare, whole)]
    base, mine = (sum(each.values()) for each in grown)
    one = mine / base if base > 0 else 0.0
    figure = f"an idle stream, of {bench.size.idle_streams:,}"
    return [
        Row("memory", figure, "KiB", mine, base, Ratio(one, one, one), grown[1]),
        Row("memory", "resident after they closed", "MiB", sum(left[1].values()), sum(left[0].values()), parts=left[1]),
    ]


def _grown_kib(bench: Bench, target: Target) -> dict[str, float]:
    """What each idle stream adds, by part."""
    streams = bench.size.idle_streams
    warm = Run("closed", target.port, Chat(FIRST_KEY), requests=500)
    held = Run("hold", target.port, Chat(FIRST_KEY, chunks=HOLD), connections=streams, timeout_s=120)
    for run in (warm, held):
        before = target.rss_bytes()
        bench.outcomes.note(target.name, bench.load.run(run))
    time.sleep(_SETTLE_S)
    during = target.rss_bytes()
    bench.load.run(Run("release", target.port, Chat(FIRST_KEY)))
    time.sleep(_SETTLE_S)
    return {role: (during[role] - before[role]) / streams / _KIB for role in during}


def bodies(bench: Bench) -> list[Row]:
    """CPU per request by the size of the request's body."""
    sizes = ((2, 1, ""), (20, 1, ""), (200, 4, "at most 4.5"), (2000, 40, ""))
    rows = []
    for kilobytes, fewer, aim in sizes:
        chat = Chat(FIRST_KEY, body_bytes=kilobytes * 1000)
        requests = max(20, bench.size.requests // fewer // 2)
        connections = 32 if kilobytes < 1000 else 4

        def take(name: str, chat: Chat = chat, requests: int = requests, connections: int = connections) -> Sample:
            return bench.sample(name, chat, requests, connections)

        found = rounds.interleaved((BARE, WHOLE), bench.size.rounds, take)
        rows.append(_cost_row("body", f"CPU, body of {kilobytes} KB", found[WHOLE], found[BARE], aim))
    return rows


def scale(bench: Bench) -> list[Row]:
    """Few keys and models against many, in two gateways: the same number of them in use, and all of them in use."""
    keys, models = bench.size.keys, bench.size.models
    small, large = (f"{number:,} keys, {of} models" for number, of in (_FEW, (keys, models)))
    in_use = Chat(KEY, NUMBERED_MODEL, keys=_FEW[0], models=_FEW[1])
    spread = replace(in_use, key_stride=keys // _FEW[0], model_stride=models // _FEW[1])
    every = Chat(KEY, NUMBERED_MODEL, keys=keys, models=models)
    sides = {small: (small, in_use), large: (large, spread), "all": (large, every)}
    with ExitStack() as stack:
        started: dict[str, Target] = {}
        for name, (number, of) in ((small, _FEW), (large, (keys, models))):
            made = gateway(bench.upstream_port, keys=number, models=of, concurrency=bench.concurrency, name=name)
            started[name], _ = stack.enter_context(made)

        def take(name: str) -> Sample:
            target, chat = started[sides[name][0]], sides[name][1]
            run = Run("closed", target.port, chat, requests=bench.size.requests)
            return rounds.measure(bench.load, target, run, bench.outcomes)

        for name in (small, large):
            take(name)
        found = rounds.interleaved(list(sides), bench.size.rounds, take)
    aim = f"1.0 (noise {_noise(found[small]):.0%})"
    return [
        _cost_row("scale", f"CPU, {large} against {small}", found[large], found[small], aim),
        _cost_row("scale", "the same, a key and model new to each request", found["all"], found[small]),
    ]


def _noise(samples: list[Sample]) -> float:
    """Half the span of one side's own rounds, as a share of their median."""
    totals = [sample.total_us for sample in samples]
    return (max(totals) - min(totals)) / 2 / rounds.middle(samples, _total)


CASES: dict[str, Callable[[Bench], list[Row]]] = {
    "saturation": saturation,
    "steady": steady,
    "latency": latency,
    "chunks": chunks,
    "memory": memory,
    "bodies": bodies,
    "scale": scale,
}


def as_json(row: Row) -> dict[str, Any]:
    """A row for machines."""
    ratio = row.ratio
    return {
        "case": row.case,
        "figure": row.figure,
        "unit": row.unit,
        "value": row.value,
        "bare": row.bare,
        "ratio": None if ratio is None else {"median": ratio.middle, "low": ratio.low, "high": ratio.high},
        "parts": row.parts,
        "aim": row.aim,
    }
