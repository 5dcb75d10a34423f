"""Other gateways beside ours, same upstream and load: `python -m tests.bench.peers` (`make bench-peers`).

Each comes from its package, at a fixed version, into an environment of its own under the cache folder. The surprising
thing: a peer that can not be installed or started is a line of the table, never a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tests.bench import report, rounds
from tests.bench.cases import BARE, FIRST_KEY, FULL, QUICK, WHOLE, Size
from tests.bench.load import Run
from tests.bench.processes import LoadProcess, UpstreamProcess, allow_many_files, end, tree
from tests.bench.rounds import Outcomes, Sample
from tests.bench.targets import Target, bare_envoy, gateway, listens
from tests.bench.traffic import Chat
from tests.gateway import free_port, wait_for

_INSTALL_TIMEOUT_S = 900.0
_START_TIMEOUT_S = 90.0
_SLOW_REQUESTS = 300
_KEY = "fgw_0123456789abcdef0123456789abcdef"
"""Of the form that ferrogw wants of a master key; the others take any."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A gateway from a package. `requests` is how many a round sends, if not as many as for the others.

    `command` gets the folder it is installed in, a folder of its own, its port and the upstream's; it returns the
    command line and the variables to set.
    """

    name: str
    package: str
    install: Callable[[Path, str], None]
    command: Callable[[Path, Path, int, int], tuple[list[str], dict[str, str]]]
    requests: int | None = None
    headers: Callable[[int], tuple[str, ...]] = lambda _: ()


def _from_pypi(folder: Path, package: str) -> None:
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    _call([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", package])


def _from_npm(folder: Path, package: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    _call([npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), package])


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    if done.returncode:
        raise OSError((done.stderr or done.stdout).strip()[-300:] or f"exit code {done.returncode}")


def _litellm(environment: Path, folder: Path, port: int, upstream: int) -> tuple[list[str], dict[str, str]]:
    provider = {"model": "openai/gpt-4o-mini", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
    file = folder / "litellm.yaml"
    settings = {
        "model_list": [{"model_name": "gpt-4o-mini", "litellm_params": provider}],
        "general_settings": {"master_key": _litellm_key()},
        "litellm_settings": {"telemetry": False},
    }
    file.write_text(json.dumps(settings))
    program = str(environment / "bin" / "litellm")
    command = [program, "--config", str(file), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    return command, {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}


def _litellm_key() -> str:
    return f"sk-{_KEY}"  # its keys begin with sk-


def _portkey(environment: Path, folder: Path, port: int, upstream: int) -> tuple[list[str], dict[str, str]]:
    node = shutil.which("node")
    if node is None:
        raise OSError("node is not installed")
    server = environment / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    return [node, str(server), f"--port={port}", "--headless"], {"NODE_ENV": "production"}


def _portkey_headers(upstream: int) -> tuple[str, ...]:
    return ("x-portkey-provider: openai", f"x-portkey-custom-host: http://127.0.0.1:{upstream}/v1")


def _ferrogw(environment: Path, folder: Path, port: int, upstream: int) -> tuple[list[str], dict[str, str]]:
    file = folder / "ferrogw.yaml"
    file.write_text("strategy: {mode: single}\ntargets:\n- virtual_key: openai\n")
    nowhere = "http://127.0.0.1:1/"  # its catalogue of models would come from the internet; it has one of its own
    variables = {
        "GATEWAY_CONFIG": str(file),
        "PORT": str(port),
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": f"http://127.0.0.1:{upstream}/v1",
        "MASTER_KEY": _KEY,
        "RATE_LIMIT_RPS": "0",
        "LOG_LEVEL": "warn",
        "FERRO_MODEL_CATALOG_URL": nowhere,
    }
    return [str(environment / "bin" / "ferrogw"), "serve"], variables


PEERS = (
    Peer("ferrogw", "ferrogw==1.5.10", _from_pypi, _ferrogw),
    Peer("Portkey", "@portkey-ai/gateway@1.15.2", _from_npm, _portkey, 1000, _portkey_headers),
    # Not 1.107.0, which is reported to be a compromised release.
    Peer("LiteLLM", "litellm[proxy]==1.106.2", _from_pypi, _litellm, _SLOW_REQUESTS),
)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Short rounds; writes no document.")] = False,
    cache: Annotated[Path, typer.Option(help="Where the peers are installed, and stay.")] = Path(".bench"),
    only: Annotated[list[str] | None, typer.Option(help="A peer's name; may be repeated.")] = None,
) -> None:
    """Install the peers and measure them, the gateway and bare Envoy in one run."""
    allow_many_files()
    console = Console(width=None if Console().is_terminal else 140)
    about = report.machine()
    wanted = [peer for peer in PEERS if not only or peer.name in only]
    missing: dict[str, str] = {}
    for peer in wanted:
        console.print(f"[dim]installing {peer.package} ...")
        try:
            peer.install(_environment(cache, peer), peer.package)
        except (OSError, subprocess.SubprocessError) as error:
            missing[peer.name] = f"not installed: {error}"
    installed = [peer for peer in wanted if peer.name not in missing]
    lines, outcomes = _measure(installed, cache, QUICK if quick else FULL, missing)
    lines += [(name, why.replace("\n", " ")[:160], "", "", "") for name, why in missing.items()]
    headers = ("gateway", "CPU a request", "against bare Envoy", "requests a second", "resident")
    report.show(console, lines, headers)
    remark = report.outcomes_remark(outcomes)
    console.print(remark, markup=False)
    if not quick and not only:
        packages = "Packages: " + ", ".join(f"`{peer.package}`" for peer in PEERS) + "."
        report.write("peers", report.section(about, report.markdown(lines, headers), [packages, remark]))


def _environment(cache: Path, peer: Peer) -> Path:
    return cache.absolute() / peer.package.replace("/", "_").replace("[proxy]", "").replace("@", "_")


def _measure(
    peers: list[Peer], cache: Path, size: Size, missing: dict[str, str]
) -> tuple[list[tuple[str, ...]], Outcomes]:
    outcomes = Outcomes()
    with ExitStack() as stack:
        upstream = stack.enter_context(UpstreamProcess())
        load = stack.enter_context(LoadProcess())
        targets: dict[str, tuple[Target, Chat, int]] = {}
        bare = stack.enter_context(bare_envoy(upstream.port, 1))
        whole, _ = stack.enter_context(gateway(upstream.port))
        for target in (bare, whole):
            targets[target.name] = (target, Chat(FIRST_KEY), size.requests)
        for peer in peers:
            try:
                target = stack.enter_context(_running(peer, _environment(cache, peer), upstream.port))
            except (OSError, RuntimeError, TimeoutError) as error:
                missing[peer.name] = f"not started: {error}"
                continue
            key = _litellm_key() if peer.command is _litellm else _KEY
            chat = Chat(key, headers=peer.headers(upstream.port))
            targets[peer.name] = (target, chat, min(size.requests, peer.requests or size.requests))

        def take(name: str) -> Sample:
            target, chat, requests = targets[name]
            run = Run("closed", target.port, chat, requests=requests, timeout_s=120)
            return rounds.measure(load, target, run, outcomes)

        for name in targets:
            take(name)
        found = rounds.interleaved(list(targets), size.rounds, take)
        resident = {name: sum(target.rss_bytes().values()) / 1024**2 for name, (target, _, _) in targets.items()}
    return [_line(name, found, resident[name]) for name in found], outcomes


def _line(name: str, found: Mapping[str, list[Sample]], resident_mib: float) -> tuple[str, ...]:
    cost_us = rounds.middle(found[name], lambda sample: sample.total_us)
    per_s = rounds.middle(found[name], lambda sample: sample.per_s)
    against = rounds.ratio(found[name], found[BARE], lambda sample: sample.total_us)
    shown = f"{WHOLE} (this project)" if name == WHOLE else name
    return (shown, f"{cost_us:,.0f} us", str(against), f"{per_s:,.0f}", f"{resident_mib:,.0f} MiB")


@contextmanager
def _running(peer: Peer, environment: Path, upstream_port: int) -> Iterator[Target]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        command, variables = peer.command(environment, folder, port, upstream_port)
        environ = {each: os.environ[each] for each in ("PATH", "LANG") if each in os.environ}
        log = folder / "log"
        with log.open("wb") as written:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**environ, "HOME": name, **variables},
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
            )
        try:
            wait_for(lambda: listens(port) or process.poll() is not None, _START_TIMEOUT_S, f"{peer.name} to listen")
            if process.poll() is not None:
                raise RuntimeError(log.read_text(errors="replace")[-300:])
            pids = tree(process.pid)
            yield Target(peer.name, port, lambda: {"peer": pids})
        finally:
            end(process)


if __name__ == "__main__":
    typer.run(main)
