"""`extproc serve`: the parent of all workers of one gateway, warmed up and then run as a `Pool`.

Between the command line and the pool. The surprising thing: it reads a copy of gateway.yaml that the supervisor made,
never the file itself, so Envoy and workers always see the same bytes however often someone saves.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import uvloop

from extproc.config.snapshot import Snapshot
from extproc.config.source import format_problems, parse
from extproc.decide import vocabulary
from extproc.render.deployment import Deployment
from extproc.server.app import TransportName, WorkerPlan, serve
from extproc.server.board import Board
from extproc.server.pool import Pool, WorkerPipes

WITHHELD = "withheld"


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


def run_workers(
    file: Path, copy: Path, run_dir: Path, environ: Mapping[str, str], *, workers: int, transport: TransportName
) -> None:
    """Run workers until SIGTERM, or until standard input ends. Raises ValueError where the copy is no good."""
    snapshot = load_copy(copy, file, environ)
    deployment = Deployment(PurePosixPath(run_dir), PurePosixPath(), workers)
    board = Board(Path(deployment.board))
    board.know(snapshot.providers)
    plan = WorkerPlan(
        snapshot=snapshot,
        load=lambda other: load_copy(other, file, environ),
        environ=environ,
        transport=transport,
        socket=Path(),
        board=board,
    )
    sockets = [Path(deployment.worker_socket(number)) for number in range(workers)]
    vocabulary.preload()
    gc.collect()
    gc.freeze()
    warm = _Warm(plan, sockets)
    pool = Pool(sockets, warm.work, warm.load, _say, bind=transport is TransportName.NGH2)
    pool.run()
    if pool.orphaned:
        asyncio.run(_clear_up(deployment))


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
