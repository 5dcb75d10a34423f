"""What each part of Envoy's configuration costs: `python -m tests.bench.shares`, for whoever makes it cheaper.

One Envoy for each part left out (or set otherwise), all before the same workers, in turn. With `--profile` also what
the worker does with its time, by py-spy where that is installed. The surprising thing: parts are found in the running
configuration by name, so a filter that did not exist when this was written is measured too.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from tests.bench import report, rounds
from tests.bench.cases import FIRST_KEY, FULL, QUICK, WHOLE, Bench, bench, decide_alone
from tests.bench.load import Run
from tests.bench.processes import ENVOY, WORKER, allow_many_files, cpu_s, roles_of_gateway
from tests.bench.rounds import Ratio, Sample
from tests.bench.targets import Config, Target, connection_manager, running_config, without
from tests.bench.traffic import Chat
from tests.gateway import Gateway

Change = Callable[[Config], None]
AS_IT_IS = "as it is"
_KEPT = ("decide", "envoy.filters.http.router", "codec", "adapt")
_PROFILE_S = 10
_SHOWN = 25
_WAITING = "_worker (concurrent/futures/thread.py"
"""A thread that waits for work; py-spy takes it for busy."""
_IS_OURS = "extproc/"
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_PROVIDER = "upstream"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Short rounds.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Profile the worker with py-spy too.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Parts of names of the parts to measure.")] = None,
) -> None:
    """Show what each part of Envoy's configuration costs per request and per streamed chunk."""
    allow_many_files()
    console = Console(width=None if Console().is_terminal else 160)
    with bench(QUICK if quick else FULL, 1) as (made, running), ExitStack() as stack:
        changes = {AS_IT_IS: _nothing, **changes_of(running)}
        if only:
            changes = {name: how for name, how in changes.items() if name == AS_IT_IS or any(p in name for p in only)}
        targets, refused = _start(stack, running, changes)
        made.targets.update(targets)
        found = _by_request(made, list(targets))
        streams = _by_chunk(made, list(targets))
        headers = ("part", "Envoy a request", "saves", "worker", "Envoy a chunk", "saves")
        report.show(console, [_line(name, found, streams) for name in targets], headers)
        for name, why in refused.items():
            console.print(f"{name}: {why}", markup=False)
        console.print(report.outcomes_remark(made.outcomes), markup=False)
        if profile:
            _profile(console, made, running)


def _nothing(_: Config) -> None:
    pass


def changes_of(running: Gateway) -> dict[str, Change]:
    """Every part that can be left out of the gateway's configuration, and some that can be set otherwise."""
    config = running_config(running)
    changes: dict[str, Change] = {}
    for each in connection_manager(config)["http_filters"]:
        if each["name"] not in _KEPT:
            changes[f"without filter {each['name']}"] = _without_filter(each["name"])
    for each in _provider_filters(config, _PROVIDER):
        if each["name"] not in _KEPT:
            changes[f"without provider filter {each['name']}"] = _without_provider_filter(each["name"])
    for log in connection_manager(config)["access_log"]:
        changes[f"without access log {log['name']}"] = _without_log(log["name"])
    for name in ("access_log", "early_header_mutation_extensions", "local_reply_config"):
        if name in connection_manager(config):
            changes[f"without {name}"] = _without_setting(name)
    changes["access log in batches of 1 MiB"] = _large_batches
    changes["access log over its own connection"] = _own_connection
    changes["HTTP/2 windows of 8 MiB to the workers"] = _large_windows
    changes["without retry policy"] = _without_retries
    changes["without header removal of the virtual host"] = _without_removal
    changes["without provider filters"] = _without_all_provider_filters
    changes["without usage, answers and record"] = decide_alone
    changes["decide alone, before a plain route"] = _decide_before_plain_route
    changes["without anything of Python"] = _without_python
    changes["without statistics"] = _without_statistics
    changes["the other HTTP/2 codec (oghttp2 off)"] = _runtime(
        "envoy.reloadable_features.http2_use_oghttp2", value=False
    )
    changes["the other HTTP/2 codec (oghttp2 on)"] = _runtime("envoy.reloadable_features.http2_use_oghttp2", value=True)
    return changes


def _without_filter(name: str) -> Change:
    def change(config: Config) -> None:
        connections = connection_manager(config)
        connections["http_filters"] = [each for each in connections["http_filters"] if each["name"] != name]
        for route in _routes(config):
            route.get("typed_per_filter_config", {}).pop(name, None)

    return change


def _without_setting(name: str) -> Change:
    return lambda config: connection_manager(config).pop(name)


def _without_log(name: str) -> Change:
    def change(config: Config) -> None:
        connections = connection_manager(config)
        connections["access_log"] = [log for log in connections["access_log"] if log["name"] != name]

    return change


def _without_provider_filter(name: str) -> Change:
    def change(config: Config) -> None:
        filters = _provider_filters(config, _PROVIDER)
        filters[:] = [each for each in filters if each["name"] != name]

    return change


def _without_all_provider_filters(config: Config) -> None:
    filters = _provider_filters(config, _PROVIDER)
    filters[:] = [each for each in filters if each["name"] == "codec"]


def _without_retries(config: Config) -> None:
    for route in _routes(config):
        route["route"].pop("retry_policy", None)


def _without_removal(config: Config) -> None:
    for host in connection_manager(config)["route_config"]["virtual_hosts"]:
        host.pop("request_headers_to_remove", None)


def _without_python(config: Config) -> None:
    """A plain route to the provider; the rest of the listener as it is."""
    _decide_before_plain_route(config)
    _without_filter("decide")(config)


def _decide_before_plain_route(config: Config) -> None:
    """What asking costs: the worker decides, and Envoy does not go by what it says."""
    decide_alone(config)
    _without_all_provider_filters(config)
    for host in connection_manager(config)["route_config"]["virtual_hosts"]:
        host["routes"] = [{"match": {"prefix": "/"}, "route": {"cluster": _PROVIDER}}]


def _large_batches(config: Config) -> None:
    for log in _grpc_logs(config):
        log["buffer_size_bytes"] = 1 << 20


def _own_connection(config: Config) -> None:
    for log in _grpc_logs(config):
        service = log["grpc_service"]["envoy_grpc"]
        clusters = config["static_resources"]["clusters"]
        own = copy.deepcopy(next(each for each in clusters if each["name"] == service["cluster_name"]))
        own["name"] = own["load_assignment"]["cluster_name"] = service["cluster_name"] = "record-of-its-own"
        clusters.append(own)


def _grpc_logs(config: Config) -> list[Config]:
    logs = (log["typed_config"] for log in connection_manager(config)["access_log"])
    return [log["common_config"] for log in logs if "common_config" in log]


def _large_windows(config: Config) -> None:
    options = _cluster(config, "extproc")["typed_extension_protocol_options"][_HTTP_OPTIONS]
    options["explicit_http_config"]["http2_protocol_options"] = {
        "initial_stream_window_size": 8 << 20,
        "initial_connection_window_size": 64 << 20,
    }


def _without_statistics(config: Config) -> None:
    config["stats_config"] = {"stats_matcher": {"reject_all": True}}


def _runtime(flag: str, *, value: bool) -> Change:
    def change(config: Config) -> None:
        layers = config.setdefault("layered_runtime", {}).setdefault("layers", [])
        layers.append({"name": "bench", "static_layer": {flag: value}})

    return change


def _routes(config: Config) -> Iterator[Config]:
    for host in connection_manager(config)["route_config"]["virtual_hosts"]:
        yield from host["routes"]


def _cluster(config: Config, name: str) -> Config:
    found: Config = next(each for each in config["static_resources"]["clusters"] if each["name"] == name)
    return found


def _provider_filters(config: Config, name: str) -> list[Any]:
    filters: list[Any] = _cluster(config, name)["typed_extension_protocol_options"][_HTTP_OPTIONS]["http_filters"]
    return filters


def _start(stack: ExitStack, running: Gateway, changes: dict[str, Change]) -> tuple[dict[str, Target], dict[str, str]]:
    started: dict[str, Target] = {}
    refused: dict[str, str] = {}
    for name, change in changes.items():
        try:
            started[name] = stack.enter_context(without(running, change, name))
        except (RuntimeError, KeyError, StopIteration) as error:
            refused[name] = str(error).strip().splitlines()[-1][:300]
    return started, refused


def _by_request(made: Bench, names: list[str]) -> dict[str, list[Sample]]:
    for name in names:
        made.sample(name, Chat(FIRST_KEY), 200)
    return rounds.interleaved(
        names, made.size.rounds, lambda name: made.sample(name, Chat(FIRST_KEY), made.size.requests)
    )


def _by_chunk(made: Bench, names: list[str]) -> dict[str, list[Sample]]:
    def take(name: str) -> Sample:
        return rounds.slope(
            made.load,
            made.targets[name],
            made.targets[name].port,
            FIRST_KEY,
            streams=made.size.streams,
            chunks=made.size.chunks,
            outcomes=made.outcomes,
        )

    return rounds.interleaved(names, max(3, made.size.rounds // 3), take)


def _envoy(sample: Sample) -> float:
    return sample.cost_us[ENVOY]


def _line(name: str, found: dict[str, list[Sample]], streams: dict[str, list[Sample]]) -> tuple[str, ...]:
    per_request, per_chunk = (rounds.middle(each[name], _envoy) for each in (found, streams))
    saved = [str(_saved(each[AS_IT_IS], each[name])) for each in (found, streams)]
    worker = rounds.middle(found[name], lambda sample: sample.cost_us[WORKER])
    return (name, f"{per_request:.0f} us", saved[0], f"{worker:.0f} us", f"{per_chunk:.1f} us", saved[1])


def _saved(whole: list[Sample], part: list[Sample]) -> Ratio:
    """Microseconds, round by round."""
    each = [_envoy(one) - _envoy(other) for one, other in zip(whole, part, strict=True)]
    return Ratio(median(each), min(each), max(each))


def _profile(console: Console, made: Bench, running: Gateway) -> None:
    """py-spy on the busiest worker, under load: functions by the time spent in themselves."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        console.print("py-spy is not installed, so there is no profile of the worker")
        return
    target = made.targets[WHOLE]
    workers = roles_of_gateway(running.pid)[WORKER]
    before = {pid: cpu_s([pid]) for pid in workers}
    made.load.run(Run("closed", target.port, Chat(FIRST_KEY), requests=1000))
    busiest = max(workers, key=lambda pid: cpu_s([pid]) - before[pid])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stacks"
        command = [spy, "record", "--pid", str(busiest), "--duration", str(_PROFILE_S), "--rate", "500", "--function"]
        recording = subprocess.Popen(
            [*command, "--format", "raw", "--output", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while recording.poll() is None:
            made.load.run(Run("closed", target.port, Chat(FIRST_KEY), requests=1000))
        stacks = file.read_text().splitlines() if file.is_file() else []
    _show_profile(console, stacks)


def _show_profile(console: Console, stacks: list[str]) -> None:
    itself: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for line in stacks:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if frames[-1].startswith(_WAITING):
            continue
        itself[frames[-1]] += int(count)
        for frame in {frame for frame in frames if _IS_OURS in frame}:
            within[frame] += int(count)
    every = max(1, itself.total())
    for title, counted in (("by own time", itself), ("with what they call", within)):
        lines = [(name, f"{count / every:.1%}") for name, count in counted.most_common(_SHOWN)]
        report.show(console, lines, (f"worker, {title}", "share"))


if __name__ == "__main__":
    typer.run(main)
