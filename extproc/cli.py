"""The `extproc` command: run, check, render, schema, keys, spend; and `serve`, which `run` starts for itself.

Outermost layer. The surprising thing: every command loads gateway.yaml through the same `load`, so what `check` accepts
is what `run` runs.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, NamedTuple, NoReturn
from urllib.parse import urlsplit

import typer
import uvloop
from rich.console import Console

from extproc.config.snapshot import Snapshot
from extproc.config.source import format_problems, load

if TYPE_CHECKING:
    from extproc.server.supervisor import Supervisor

app = typer.Typer(
    help="One AI gateway: Envoy moves the bytes, extproc decides.", no_args_is_help=True, pretty_exceptions_enable=False
)
keys_app = typer.Typer(help="Virtual keys of gateway.yaml.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

File = Annotated[Path, typer.Argument(help="The gateway.yaml to use.", show_default=True)]
Workers = Annotated[int, typer.Option(min=0, help="Worker processes; 0: one for each core.", envvar="EXTPROC_WORKERS")]
EnvoyThreads = Annotated[
    int, typer.Option(min=0, help="Envoy's threads; 0: one for each core.", envvar="EXTPROC_ENVOY_THREADS")
]
Pem = Annotated[Path | None, typer.Option(help="PEM file.", show_default=False)]
_DEFAULT_FILE = Path("gateway.yaml")


@app.command()
def run(file: File = _DEFAULT_FILE, workers: Workers = 0, envoy_threads: EnvoyThreads = 0) -> None:
    """Start Envoy, the sidecar and all that FILE needs; show requests as they pass. A save, or SIGHUP, reloads FILE."""
    from extproc.server.children import ChildFailedError  # noqa: PLC0415  (each command imports only what it needs)
    from extproc.server.reload import BadConfigError, read_config  # noqa: PLC0415
    from extproc.server.screen import Screen  # noqa: PLC0415
    from extproc.server.supervisor import Size, Supervisor  # noqa: PLC0415

    _log_to_stderr()
    try:
        loaded = read_config(file.absolute(), os.environ)
        size = Size(workers or _cores(), envoy_threads or _cores())
        uvloop.run(_supervise(lambda: Supervisor(file.absolute(), loaded, os.environ, Screen(Console()), size)))
    except (BadConfigError, ChildFailedError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error} (is another gateway using its ports?)")


async def _supervise(make: Callable[[], Supervisor]) -> None:
    await make().run()


@app.command()
def serve(
    file: File = _DEFAULT_FILE,
    *,
    copy: Annotated[
        Path | None,
        typer.Option(help="Passed by `run`: the copy of FILE to begin with; commands then come on standard input."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the workers' sockets are; else in a folder that is removed at the end.")
    ] = None,
    workers: Workers = 0,
    transport: Annotated[str, typer.Option(help="ngh2 or grpc-aio.", envvar="EXTPROC_TRANSPORT")] = "ngh2",
    listen: Annotated[str, typer.Option(help="HOST:PORT, for an Envoy on another machine.")] = "",
    tls_certificate: Pem = None,
    tls_key: Pem = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM file: who may connect.", show_default=False)] = None,
) -> None:
    """Run the workers alone, for an Envoy that something else starts (`run` starts both). SIGHUP reloads FILE."""
    from extproc.server.app import TransportName  # noqa: PLC0415
    from extproc.server.transport import MutualTls, TcpAddress  # noqa: PLC0415
    from extproc.server.workers import Serving, run_alone, run_supervised  # noqa: PLC0415

    pem = {"--tls-certificate": tls_certificate, "--tls-key": tls_key, "--tls-client-ca": tls_client_ca}
    tcp = _tcp("--listen", listen, pem)
    address = tcp and TcpAddress(tcp.host, tcp.port, MutualTls(*tcp.pem) if tcp.pem else None)
    _log_to_stderr()
    try:
        name = TransportName(transport)
        only_one = address is not None and name is TransportName.GRPC_AIO
        serving = Serving(workers or (1 if only_one else _cores()), name, address)
        if copy is None:
            _load(file, require_secrets=False)
            run_alone(file, run_dir, os.environ, serving)
        elif run_dir is None:
            _fail("--copy, which `run` passes, goes with --run-dir")
        else:
            run_supervised(file, copy, run_dir, os.environ, serving)
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'extproc serve'}: {error.strerror}" if error.strerror else str(error))


class _Tcp(NamedTuple):
    host: str
    port: int
    pem: tuple[Path, ...]


def _tcp(option: str, where: str, pem: Mapping[str, Path | None]) -> _Tcp | None:
    """Where workers are found over TCP, with all files of mutual TLS, or on loopback with none."""
    names = ", ".join(pem)
    files = tuple(file for file in pem.values() if file is not None)
    if not where:
        if files:
            _fail(f"{names} go with {option} HOST:PORT")
        return None
    try:
        parts = urlsplit(f"//{where}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or where not in (f"{host}:{port}", f"[{host}]:{port}"):
        _fail(f"{option} takes HOST:PORT in lower case, such as 10.0.0.7:9000 or [::1]:9000")
    if files and len(files) < len(pem):
        missing = ", ".join(name for name, file in pem.items() if file is None)
        _fail(f"{option} takes all of {names}; missing: {missing}")
    if not files and not _is_loopback(host):
        _fail(f"{option} {where} needs {names}: without TLS, workers listen on a loopback address alone")
    return _Tcp(host, port, files)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _cores() -> int:
    return os.cpu_count() or 1


@app.command()
def check(file: File = _DEFAULT_FILE) -> None:
    """Print every mistake in FILE with its line and how to mend it; exit code 1 if there is one."""
    snapshot = _load(file, require_secrets=True)
    typer.echo(
        f"{file}: good (revision {snapshot.revision}: {len(snapshot.providers)} providers, "
        f"{len(snapshot.models) + len(snapshot.globs)} models, {len(snapshot.keys)} keys)"
    )


@app.command()
def render(
    file: File = _DEFAULT_FILE,
    *,
    run_dir: Annotated[str, typer.Option(help="Where sockets and secret files will be.")] = "/run/extproc",
    ca_bundle: Annotated[str, typer.Option(help="Envoy's file of public CAs.")] = "/etc/ssl/certs/ca-certificates.crt",
    workers: Annotated[int, typer.Option(min=1, help="Sidecar processes that Envoy balances over.")] = 1,
    sidecar: Annotated[str, typer.Option(help="HOST:PORT of an `extproc serve --listen`, in place of sockets.")] = "",
    sidecar_ca: Pem = None,
    sidecar_certificate: Pem = None,
    sidecar_key: Pem = None,
) -> None:
    """Print the Envoy configuration of FILE. It names secret files and holds no secret."""
    from extproc.render.bootstrap import render as render_bootstrap  # noqa: PLC0415
    from extproc.render.deployment import ClientTls, Deployment, RemoteSidecar  # noqa: PLC0415

    pem = {"--sidecar-ca": sidecar_ca, "--sidecar-certificate": sidecar_certificate, "--sidecar-key": sidecar_key}
    tcp = _tcp("--sidecar", sidecar, pem)
    tls = ClientTls(*map(PurePosixPath, tcp.pem)) if tcp and tcp.pem else None
    remote = tcp and RemoteSidecar(tcp.host, tcp.port, tls)
    deployment = Deployment(PurePosixPath(run_dir), PurePosixPath(ca_bundle), workers, sidecar=remote)
    typer.echo(render_bootstrap(_load(file, require_secrets=False), deployment), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of gateway.yaml, for editors."""
    from extproc.config.schema import json_schema  # noqa: PLC0415

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def status(file: File = _DEFAULT_FILE, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:  # noqa: FBT002
    """Show what the gateway that runs FILE is doing: workers, configuration, providers and their last errors."""
    from extproc.server.status import StatusUnavailableError, fetch, render_status  # noqa: PLC0415

    snapshot = _load(file, require_secrets=False)
    try:
        found = fetch(snapshot.admin)
    except StatusUnavailableError as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for each in render_status(found):
            Console().print(each)


@keys_app.command("hash")
def hash_key(
    key: Annotated[str, typer.Argument(help="The key; asked for, or read from standard input, when left out.")] = "",
) -> None:
    """Print the sha256 that gateway.yaml holds for a key."""
    if not key:
        key = getpass.getpass("Key: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    if not key:
        _fail("no key was given")
    typer.echo(hashlib.sha256(key.encode()).hexdigest())


@app.command()
def spend(
    file: File = _DEFAULT_FILE,
    by: Annotated[str, typer.Option(help="Columns to group by, such as team,model.")] = "team,model",
    since: Annotated[str, typer.Option(help="7d, 24h, 30m or a date.")] = "7d",
    as_json: Annotated[bool, typer.Option("--json", help="JSON.")] = False,  # noqa: FBT002
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV.")] = False,  # noqa: FBT002
) -> None:
    """Show who spent what: requests, tokens and cost from the ledger of FILE."""
    from extproc.config.secrets import SecretError, ledger_url  # noqa: PLC0415
    from extproc.stores import showback  # noqa: PLC0415
    from extproc.stores.sql import StoreError, open_ledger  # noqa: PLC0415

    snapshot = _load(file, require_secrets=False)
    try:
        columns = showback.parse_by(by)
        start = showback.parse_since(since, now=datetime.now(UTC))
        ledger = open_ledger(ledger_url(snapshot, os.environ), snapshot.folder)
        lines = showback.spend(ledger, by=columns, since=start, until=None)
    except (ValueError, StoreError, SecretError) as error:
        _fail(str(error))
    if as_json:
        typer.echo(showback.render_json(lines, by=columns, since=start))
    elif as_csv:
        typer.echo(showback.render_csv(lines, by=columns), nl=False)
    else:
        console = Console()
        console.print(showback.render_table(lines, by=columns, width=console.width))


def _load(file: Path, *, require_secrets: bool) -> Snapshot:
    loaded = load(file, environ=os.environ, require_secrets=require_secrets)
    if isinstance(loaded, Snapshot):
        return loaded
    typer.echo(format_problems(loaded), err=True)
    raise typer.Exit(1)


def _fail(message: str) -> NoReturn:
    typer.echo(f"extproc: {message}", err=True)
    raise typer.Exit(1)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def main() -> None:
    """The console script."""
    app()
