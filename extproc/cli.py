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
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, NoReturn

import typer
import uvloop
from rich.console import Console

from extproc.config.snapshot import Snapshot
from extproc.config.source import format_problems, load

app = typer.Typer(
    help="One AI gateway: Envoy moves the bytes, extproc decides.", no_args_is_help=True, pretty_exceptions_enable=False
)
keys_app = typer.Typer(help="Virtual keys of gateway.yaml.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

File = Annotated[Path, typer.Argument(help="The gateway.yaml to use.", show_default=True)]
_DEFAULT_FILE = Path("gateway.yaml")


@app.command()
def run(file: File = _DEFAULT_FILE) -> None:
    """Start Envoy, the sidecar and all that FILE needs, and show requests as they pass."""
    from extproc.server.children import ChildFailedError  # noqa: PLC0415  (each command imports only what it needs)
    from extproc.server.screen import Screen  # noqa: PLC0415
    from extproc.server.supervisor import Supervisor  # noqa: PLC0415

    _log_to_stderr()
    snapshot = _load(file, require_secrets=True)
    supervisor = Supervisor(file.absolute(), snapshot, os.environ, Screen(Console()))
    try:
        uvloop.run(supervisor.run())
    except ChildFailedError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error} (is another gateway using its ports?)")


@app.command(hidden=True)
def serve(file: File, socket: Annotated[Path, typer.Option(help="Unix socket to listen on.")]) -> None:
    """Run one worker: decide, adapt and record for the Envoy that calls its socket."""
    from extproc.config.secrets import SecretError  # noqa: PLC0415
    from extproc.server.app import serve as serve_worker  # noqa: PLC0415
    from extproc.stores.sql import StoreError  # noqa: PLC0415

    _log_to_stderr()
    snapshot = _load(file, require_secrets=False)
    try:
        uvloop.run(serve_worker(snapshot, socket, os.environ))
    except (StoreError, SecretError) as error:
        _fail(str(error))


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
    run_dir: Annotated[str, typer.Option(help="Where sockets and secret files will be.")] = "/run/extproc",
    ca_bundle: Annotated[str, typer.Option(help="Envoy's file of public CAs.")] = "/etc/ssl/certs/ca-certificates.crt",
    workers: Annotated[int, typer.Option(min=1, help="Sidecar processes that Envoy balances over.")] = 1,
) -> None:
    """Print the Envoy configuration of FILE. It names secret files and holds no secret."""
    from extproc.render.bootstrap import render as render_bootstrap  # noqa: PLC0415
    from extproc.render.deployment import Deployment  # noqa: PLC0415

    deployment = Deployment(PurePosixPath(run_dir), PurePosixPath(ca_bundle), workers)
    typer.echo(render_bootstrap(_load(file, require_secrets=False), deployment), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of gateway.yaml, for editors."""
    from extproc.config.schema import json_schema  # noqa: PLC0415

    typer.echo(json.dumps(json_schema(), indent=2))


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
        typer.echo(showback.render_json(lines, by=columns))
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
