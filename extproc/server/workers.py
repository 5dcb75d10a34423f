"""`extproc serve`: the parent of all workers of one gateway, warmed up and then run as a `Pool`.

Between the command line and the pool. The surprising thing: workers read a copy of gateway.yaml, never the file itself,
so all of them see the same bytes however often someone saves. `extproc run` makes it, so that Envoy sees them too; an
`extproc serve` that runs by itself, for an Envoy elsewhere, makes its own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import assert_never

import uvloop

from extproc.config.secrets import SecretError, ledger_url
from extproc.config.snapshot import Snapshot
from extproc.config.source import format_problems, parse
from extproc.decide import vocabulary
from extproc.render.deployment import Deployment
from extproc.server.app import TransportName, WorkerPlan, serve
from extproc.server.board import Board
from extproc.server.pool import Pool, WorkerPipes, listen_at, listen_on
from extproc.server.transport import TcpAddress

WITHHELD = "withheld"

_log = logging.getLogger(__name__)


def load_copy(copy: Path, file: Path, environ: Mapping[str, str]) -> Snapshot:
    """The snapshot of a copy of `file`. Beside it stands which variables are set; their values are not needed here.

    Raises ValueError with the problems in words.
    """
    names = json.loads(names_file(copy).read_text())
    known = {**environ, **{name: environ.get(name, WITHHELD) for name in names}}
    loaded = parse(copy.read_bytes(), path=file, environ=known, require_secrets=False)
    if isinstance(loaded, Snapshot):
        return loaded
    raise ValueError(format_problems(loaded))


def names_file(copy: Path) -> Path:
    """Where the names of the variables that are set stand, beside a copy of gateway.yaml."""
    return copy.with_suffix(".names")


@dataclass(frozen=True, slots=True)
class Serving:
    """How many workers serve, over what, and where: at `address`, or where there is none on sockets of the run folder.

    grpcio takes no socket that listens already, so over TCP it is one worker: of several with a socket each on the one
    port (SO_REUSEPORT), a hung one would go on being given its share of the connections.
    """

    workers: int
    transport: TransportName
    address: TcpAddress | None = None

    def __post_init__(self) -> None:
        if self.address is not None and self.transport is TransportName.GRPC_AIO and self.workers > 1:
            raise ValueError("over TCP, grpc-aio has one worker: take --workers 1, or the transport ngh2")


def run_supervised(file: Path, copy: Path, run_dir: Path, environ: Mapping[str, str], serving: Serving) -> None:
    """Run workers for a supervisor, until SIGTERM or until standard input, where commands come from, ends.

    Raises ValueError where the copy is no good.
    """
    pool, deployment = _pool(file, copy, run_dir, environ, serving)
    pool.run()
    if pool.orphaned:
        asyncio.run(_clear_up(deployment))


def run_alone(file: Path, run_dir: Path | None, environ: Mapping[str, str], serving: Serving) -> None:
    """Run workers until SIGTERM; SIGHUP reloads `file`. Without a run folder they have one while they run.

    Raises ValueError where the file is no good, OSError where `run_dir`, the address or a file of its TLS can not be
    used.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something that can be reloaded
    os.umask(0o077)  # what a gateway writes is its owner's alone
    with ExitStack() as stack:
        if run_dir is None:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="extproc-", ignore_cleanup_errors=True))
            run_dir = Path(name)
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = _OwnCopy(file, run_dir / "gateway.yaml", environ)
        if serving.address is not None and serving.address.tls is not None:
            serving.address.tls.context()  # a bad file is told here, once, and not by each worker
        pool, _ = _pool(file, own.take(), run_dir, environ, serving, on_hangup=own.take)
        where = f"{serving.address.host}:{serving.address.port}" if serving.address else str(run_dir)
        _log.info("%d workers at %s", serving.workers, where)
        pool.run()


class _OwnCopy:
    """The copy that an `extproc serve` without a supervisor makes of gateway.yaml, at start and at each SIGHUP."""

    def __init__(self, file: Path, copy: Path, environ: Mapping[str, str]) -> None:
        self._file = file
        self._copy = copy
        self._environ = environ
        self._snapshot: Snapshot | None = None

    def take(self) -> Path:
        """Raises ValueError where the file is no good, or asks for what takes a restart."""
        try:
            raw = self._file.read_bytes()
        except OSError as error:
            raise ValueError(f"{self._file}: {error.strerror or error}") from None
        snapshot = parse(raw, path=self._file, environ=self._environ, require_secrets=False)
        if not isinstance(snapshot, Snapshot):
            raise ValueError(format_problems(snapshot))
        try:
            ledger_url(snapshot, self._environ)
        except SecretError as error:
            raise ValueError(f"state.sql: {error}") from None
        if self._snapshot is not None:
            _refuse_what_takes_a_restart(self._snapshot, snapshot)
        self._snapshot = snapshot
        names_file(self._copy).write_text("[]")  # there is no variable that is set elsewhere only
        self._copy.write_bytes(raw)
        return self._copy


def _refuse_what_takes_a_restart(old: Snapshot, new: Snapshot) -> None:
    if (old.sql_url, old.sql_secret) != (new.sql_url, new.sql_secret):
        raise ValueError("state.sql has changed, which takes a restart")
    if old.listen.max_body_bytes != new.listen.max_body_bytes:
        raise ValueError("listen.max_body_bytes has changed, which takes a restart")


def _pool(
    file: Path,
    copy: Path,
    run_dir: Path,
    environ: Mapping[str, str],
    serving: Serving,
    *,
    on_hangup: Callable[[], Path] | None = None,
) -> tuple[Pool, Deployment]:
    snapshot = load_copy(copy, file, environ)
    deployment = Deployment(PurePosixPath(run_dir), PurePosixPath(), serving.workers)
    board = Board(Path(deployment.board))
    board.know(snapshot.providers)
    plan = WorkerPlan(
        snapshot=snapshot,
        load=lambda other: load_copy(other, file, environ),
        environ=environ,
        transport=serving.transport,
        socket=Path(),
        board=board,
        address=serving.address,
    )
    sockets = [Path(deployment.worker_socket(number)) for number in range(serving.workers)]
    listeners = _listeners(serving, sockets)
    vocabulary.preload()
    gc.collect()
    gc.freeze()
    warm = _Warm(plan, sockets)
    return Pool(listeners, warm.work, warm.load, _say, on_hangup=on_hangup), deployment


def _listeners(serving: Serving, sockets: Sequence[Path]) -> list[socket.socket | None]:
    match serving.transport, serving.address:
        case TransportName.GRPC_AIO, _:
            return [None] * len(sockets)
        case TransportName.NGH2, None:
            return [listen_at(path) for path in sockets]
        case TransportName.NGH2, TcpAddress(host, port, _):
            return [listen_on(host, port)] * len(sockets)
        case _ as never:
            assert_never(never)


class _Warm:
    """What the next fork begins with."""

    def __init__(self, plan: WorkerPlan, sockets: list[Path]) -> None:
        self._plan = plan
        self._sockets = sockets

    def load(self, file: Path) -> str:
        snapshot = self._plan.load(file)
        self._plan.board.know(snapshot.providers)
        self._plan = replace(self._plan, snapshot=snapshot)
        return snapshot.revision

    def work(self, pipes: WorkerPipes) -> None:
        uvloop.run(serve(replace(self._plan, socket=self._sockets[pipes.number]), pipes))


async def _clear_up(deployment: Deployment) -> None:
    """The supervisor was killed: end its Envoy (on Linux it has ended already), remove its files, secrets included."""
    from extproc.server.envoy_admin import EnvoyAdmin  # noqa: PLC0415  (10 MB that workers else never need)

    await EnvoyAdmin(Path(deployment.admin_socket)).quit()
    shutil.rmtree(deployment.run_dir, ignore_errors=True)


def _say(line: str) -> None:
    try:
        os.write(sys.stdout.fileno(), line.encode() + b"\n")
    except OSError:
        return
