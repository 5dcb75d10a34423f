"""What is measured: bare Envoy, the gateway, and an Envoy that runs the gateway's configuration with parts left out.

Started here, ended here. The surprising thing: a part is left out of what the gateway's own Envoy says that it runs
(`/config_dump`), not of what render makes, so this does not care how configuration reaches Envoy.
"""

from __future__ import annotations

import copy
import http.client
import json
import os
import re
import socket
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.bench.processes import ENVOY, WORKER, cpu_s, end, roles_of_gateway, rss_bytes
from tests.gateway import Gateway, config, digest, free_port, wait_for

BINARY = Path(sysconfig.get_paths()["purelib"]) / "envoy" / "_bin" / "envoy"
KEY = "sk-bench-{:05d}"
NUMBERED_MODEL = "bench-model-{:03d}"
RENAMED = "bench-renamed"
"""A model that the provider knows by another name, so that every body is changed."""
_START_TIMEOUT_S = 30.0
_HCM = "envoy.filters.network.http_connection_manager"
_ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
_HCM_TYPE = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """Something that takes chat requests on `port`. `roles` gives the processes to charge, by their part."""

    name: str
    port: int
    roles: Callable[[], dict[str, list[int]]]

    def cpu_s(self) -> dict[str, float]:
        """CPU so far, by part. Seconds."""
        return {role: cpu_s(pids) for role, pids in self.roles().items()}

    def rss_bytes(self) -> dict[str, int]:
        """Resident memory, by part."""
        return {role: rss_bytes(pids) for role, pids in self.roles().items()}


@contextmanager
def bare_envoy(upstream_port: int, concurrency: int) -> Iterator[Target]:
    """The same Envoy binary with a plain route to the upstream and nothing else."""
    with _envoy(_bare_config(free_port(), upstream_port), "bare Envoy", concurrency) as (port, pid):
        yield Target("bare Envoy", port, lambda: {ENVOY: [pid]})


@contextmanager
def gateway(
    upstream_port: int, *, keys: int = 10, models: int = 5, concurrency: int = 1, name: str = "gateway"
) -> Iterator[tuple[Target, Gateway]]:
    """`extproc run`, with `keys` keys `KEY` and `models` models `NUMBERED_MODEL` beside the two that are always there.

    `concurrency` goes to the supervisor as `EXTPROC_ENVOY_THREADS`.
    """
    sections = gateway_yaml(upstream_port, keys=keys, models=models)
    environ = {"EXTPROC_ENVOY_THREADS": str(concurrency)}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, Gateway(Path(folder), sections, environ) as running:
        roles = roles_of_gateway(running.pid)
        yield Target(name, running.port, lambda: roles), running


def gateway_yaml(upstream_port: int, *, keys: int, models: int) -> Config:
    """One provider, one team, prices; as a user's file would be."""
    target = {"provider": "upstream"}
    numbered = {NUMBERED_MODEL.format(number): {"targets": [target]} for number in range(models)}
    return config(
        providers={
            "upstream": {
                "kind": "openai",
                "endpoint": f"http://127.0.0.1:{upstream_port}/v1",
                "api_key": {"env": "PROVIDER_KEY"},
            }
        },
        models={
            "gpt-4o-mini": {"targets": [target]},
            RENAMED: {"targets": [{**target, "model": "gpt-4o-mini"}]},
            **numbered,
        },
        teams={
            "bench": {
                "models": ["gpt-*", "bench-*"],
                "keys": [
                    {"id": f"bench-{number}", "sha256": digest(KEY.format(number)), "project": "bench", "user": "ada"}
                    for number in range(keys)
                ],
            }
        },
        prices={"upstream/*": {"input": 0.15, "output": 0.6}},
    )


@contextmanager
def without(running: Gateway, change: Callable[[Config], None], name: str, concurrency: int = 1) -> Iterator[Target]:
    """A second Envoy before the workers of `running`, with `change` made to a copy of its configuration."""
    changed = running_config(running)
    change(changed)
    workers = roles_of_gateway(running.pid)[WORKER]
    with _envoy(changed, name, concurrency) as (port, pid):
        yield Target(name, port, lambda: {ENVOY: [pid], WORKER: workers})


def running_config(running: Gateway) -> Config:
    """What the gateway's Envoy runs, as a bootstrap that stands alone and listens on a free port."""
    started_with = _config_file(running)
    dump = _get_json(_admin_socket(started_with), "/config_dump")
    parts: dict[str, Config] = {part["@type"].rpartition(".")[2]: part for part in dump["configs"]}
    bootstrap: Config = copy.deepcopy(parts["BootstrapConfigDump"]["bootstrap"])
    for foreign in ("admin", "dynamic_resources"):
        bootstrap.pop(foreign, None)
    fixed = bootstrap.setdefault("static_resources", {})
    clusters, listeners = fixed.setdefault("clusters", []), fixed.setdefault("listeners", [])
    for dynamic in parts.get("ClustersConfigDump", {}).get("dynamic_active_clusters", []):
        clusters.append(_untyped(dynamic["cluster"]))
    for dynamic in parts.get("ListenersConfigDump", {}).get("dynamic_listeners", []):
        listeners.append(_untyped(dynamic["active_state"]["listener"]))
    routes = parts.get("RoutesConfigDump", {}).get("dynamic_route_configs", [])
    connections = connection_manager(bootstrap)
    if "rds" in connections:
        name = connections.pop("rds")["route_config_name"]
        found = (_untyped(each["route_config"]) for each in routes)
        connections["route_config"] = next(each for each in found if each["name"] == name)
    listeners[0]["address"]["socket_address"]["port_value"] = free_port()
    return bootstrap


def connection_manager(bootstrap: Config) -> Config:
    """The HTTP settings of the first listener: its filters, routes and access log."""
    listener: Config = bootstrap["static_resources"]["listeners"][0]
    filters = listener["filter_chains"][0]["filters"]
    found: Config = next(each["typed_config"] for each in filters if each["name"] == _HCM)
    return found


def _untyped(message: Config) -> Config:
    return {name: value for name, value in message.items() if name != "@type"}


def _config_file(running: Gateway) -> Path:
    envoy = roles_of_gateway(running.pid)[ENVOY][0]
    command = psutil.Process(envoy).cmdline()
    return Path(command[command.index("-c") + 1])


def _admin_socket(config_file: Path) -> str:
    path: str = json.loads(config_file.read_text())["admin"]["address"]["pipe"]["path"]
    return path


def _get_json(admin_socket: str, path: str) -> Any:
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(admin_socket)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


@contextmanager
def _envoy(bootstrap: Config, name: str, concurrency: int) -> Iterator[tuple[int, int]]:
    """Port and process id. Envoy ends with the thread that started it: enter this in the main one."""
    port: int = bootstrap["static_resources"]["listeners"][0]["address"]["socket_address"]["port_value"]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file, log = Path(folder) / "envoy.json", Path(folder) / "envoy.log"
        file.write_text(json.dumps(bootstrap))
        command = [str(BINARY), "-c", str(file), "--log-level", "error", "--use-dynamic-base-id"]
        with log.open("wb") as written:
            process = subprocess.Popen(
                [*command, "--concurrency", str(concurrency)], stdin=subprocess.DEVNULL, stdout=written, stderr=written
            )
        try:
            wait_for(lambda: listens(port) or process.poll() is not None, _START_TIMEOUT_S, f"{name} to listen")
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended:\n{log.read_text()[-2000:]}")
            yield port, process.pid
        finally:
            end(process)


def listens(port: int) -> bool:
    """Whether something accepts connections on the port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _bare_config(port: int, upstream_port: int) -> Config:
    route = {"match": {"prefix": "/"}, "route": {"cluster": "upstream", "timeout": "0s"}}
    connections = {
        "@type": _HCM_TYPE,
        "stat_prefix": "bare",
        "route_config": {"name": "bare", "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": _ROUTER}}],
    }
    thresholds = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 1_000_000)
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "bare",
                    "address": _address(port),
                    "filter_chains": [{"filters": [{"name": _HCM, "typed_config": connections}]}],
                }
            ],
            "clusters": [
                {
                    "name": "upstream",
                    "type": "STATIC",
                    "connect_timeout": "5s",
                    "circuit_breakers": {"thresholds": [thresholds]},
                    "load_assignment": {
                        "cluster_name": "upstream",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(upstream_port)}}]}],
                    },
                }
            ],
        }
    }


def _address(port: int) -> Config:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def envoy_version() -> str:
    """Such as `1.40.0`."""
    said = subprocess.run([str(BINARY), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"/(\d+\.\d+\.\d+)/", said)
    return found[1] if found else "unknown"


def cores() -> int:
    """Cores of this machine."""
    return os.cpu_count() or 1
