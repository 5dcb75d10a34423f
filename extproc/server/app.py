"""A worker, put together: one process that decides, adapts and records for the Envoy that calls its socket.

The composition root of the data path; `pool` forks it. The surprising thing: it never learns a provider's secret. Those
go from gateway.yaml into Envoy's own files, and Envoy adds them on the way out.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from random import Random
from typing import assert_never

from extproc.config.secrets import ledger_url
from extproc.config.snapshot import Snapshot
from extproc.decide.estimate import LearnedRatios
from extproc.decide.meter import Meter
from extproc.decide.pipeline import Decider
from extproc.decide.tokens import TokenCounter
from extproc.record.finished import Finished
from extproc.record.health import ProviderHealth
from extproc.record.journal import read_journal
from extproc.record.ledger import Ledger, LedgerRow
from extproc.record.pipeline import row_of
from extproc.record.writer import BatchWriter
from extproc.server import accesslog, processor
from extproc.server.board import Board
from extproc.server.health import Health
from extproc.server.pool import (
    BEAT,
    BEAT_EVERY_S,
    NOT_RECONCILED,
    NOT_RELOADED,
    READY,
    RECONCILED,
    RELOADED,
    WorkerPipes,
)
from extproc.server.transport import Method, TcpAddress, Transport
from extproc.server.watch import line_of
from extproc.stores.sql import open_ledger

DRAIN_S = 10.0
_RECONCILED_ROWS = 500
_REMEMBERED_SNAPSHOTS = 8
"""Requests that earlier configurations decided may still be open; they are recorded at the prices they began with."""

_log = logging.getLogger(__name__)


class TransportName(StrEnum):
    """The HTTP/2 stack under gRPC. Both serve the same sessions; libnghttp2 costs a tenth of grpcio's CPU."""

    NGH2 = "ngh2"
    GRPC_AIO = "grpc-aio"


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What each worker is started with. `load` compiles a configuration file and raises ValueError where it is bad.

    A worker listens at `address` where there is one, else at its `socket`.
    """

    snapshot: Snapshot
    load: Callable[[Path], Snapshot]
    environ: Mapping[str, str]
    transport: TransportName
    socket: Path
    board: Board
    address: TcpAddress | None = None


class Current:
    """The snapshot in force, swapped whole, and the few before it."""

    def __init__(self, snapshot: Snapshot, decider_of: Callable[[Snapshot], Decider]) -> None:
        self._decider_of = decider_of
        self._known: dict[str, Snapshot] = {}
        self.take(snapshot)

    def take(self, snapshot: Snapshot) -> None:
        """From now on requests are judged by `snapshot`; those that have begun keep theirs."""
        self.decider = self._decider_of(snapshot)
        self._known.pop(snapshot.revision, None)
        self._known[snapshot.revision] = snapshot
        while len(self._known) > _REMEMBERED_SNAPSHOTS:
            del self._known[next(iter(self._known))]

    def snapshot_of(self, finished: Finished) -> Snapshot:
        """The snapshot that decided a request, or the one in force where that is forgotten or none did."""
        revision = finished.decision.revision if finished.decision else ""
        return self._known.get(revision, self.decider.snapshot)


class Recorder:
    """From a finished request to the ledger's queue and the watcher's line."""

    def __init__(
        self,
        current: Current,
        ratios: LearnedRatios,
        health: ProviderHealth,
        put: Callable[[LedgerRow], None],
        tell: Callable[[bytes], None],
    ) -> None:
        self._current = current
        self._ratios = ratios
        self._health = health
        self._put = put
        self._tell = tell

    def __call__(self, finished: Finished) -> None:
        self._health.learn(finished)
        row = row_of(finished, self._current.snapshot_of(finished), self._ratios)
        self._put(row)
        self._tell(line_of(row))


async def serve(plan: WorkerPlan, pipes: WorkerPipes) -> None:
    """Serve until SIGTERM or the parent's end. Raises StoreError or SecretError when the ledger can not be opened."""
    stop = asyncio.Event()
    for wanted in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(wanted, stop.set)
    os.set_blocking(sys.stdout.fileno(), False)  # a reader that stands still must not hold up requests
    folder = plan.snapshot.folder
    ledger = await asyncio.to_thread(open_ledger, ledger_url(plan.snapshot, plan.environ), folder)
    counter = TokenCounter()
    await counter.preload()
    ratios = LearnedRatios()
    writer = BatchWriter(ledger, folder)
    writer.start()
    meter, draw = Meter(ratios, counter), Random()  # noqa: S311  (spreads load, guards nothing)
    health = ProviderHealth(plan.board, time.time)
    current = Current(plan.snapshot, lambda snapshot: Decider(snapshot, meter, draw, health))
    recorder = Recorder(current, ratios, health, writer.put, _tell)
    methods = (processor.method(lambda: current.decider), accesslog.method(recorder))
    serving = Health(methods)
    transport = _transport(plan, pipes, (*methods, *serving.methods()))
    await transport.start()
    # What lives now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    async with _Lifeline(pipes, plan, current, ledger, stop.set):
        await stop.wait()
    serving.stop()
    await transport.drain(DRAIN_S)
    await writer.close()
    counter.close()


class _Lifeline:
    """The worker's side of its pipes: beats out, commands in, and the end when the parent has ended."""

    def __init__(
        self,
        pipes: WorkerPipes,
        plan: WorkerPlan,
        current: Current,
        ledger: Ledger,
        end: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._pipes = pipes
        self._plan = plan
        self._current = current
        self._end = end
        self._line = b""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> None:
        os.set_blocking(self._pipes.hear, False)
        os.set_blocking(self._pipes.tell, False)
        asyncio.get_running_loop().add_reader(self._pipes.hear, self._on_command)
        self._say(READY)
        self._keep(self._beat())

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._pipes.hear)
        for task in self._tasks:
            task.cancel()

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _say(self, word: bytes) -> None:
        with suppress(OSError):
            os.write(self._pipes.tell, word)

    async def _beat(self) -> None:
        while True:
            self._say(BEAT)
            await asyncio.sleep(BEAT_EVERY_S)

    def _on_command(self) -> None:
        try:
            data = os.read(self._pipes.hear, 4096)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._pipes.hear)
            self._end()
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "reload":
                self._keep(self._reload(Path(rest)))
            elif word == "reconcile":
                self._keep(self._reconcile(Path(rest)))

    async def _reload(self, file: Path) -> None:
        try:
            snapshot = await asyncio.to_thread(self._plan.load, file)
            self._plan.board.know(snapshot.providers)
        except ValueError:
            _log.exception("a worker can not load what its parent could")
            self._say(NOT_RELOADED)
            return
        self._current.take(snapshot)
        self._say(RELOADED)

    async def _reconcile(self, journal: Path) -> None:
        """Put all of a journal's requests before the ledger, which has most of them already and takes none twice."""
        try:
            await asyncio.to_thread(self._write_all, journal)
        except Exception:
            _log.exception("the journal is not settled, and will be tried again")
            self._say(NOT_RECONCILED)
        else:
            self._say(RECONCILED)

    def _write_all(self, journal: Path) -> None:
        """In a thread, and past the queue: under load that is never empty, so nothing could wait for its end."""
        nothing_learnt = LearnedRatios(capacity=1)
        found = read_journal(journal)
        while batch := list(islice(found, _RECONCILED_ROWS)):
            self._ledger.write(
                [row_of(finished, self._current.snapshot_of(finished), nothing_learnt) for finished in batch]
            )


def _transport(plan: WorkerPlan, pipes: WorkerPipes, methods: Sequence[Method]) -> Transport:
    max_body_bytes = plan.snapshot.listen.max_body_bytes
    match plan.transport:
        case TransportName.NGH2:
            from extproc.server.ngh2_transport import Ngh2Transport  # noqa: PLC0415  (only the one in use)

            tls = plan.address.tls if plan.address else None
            return Ngh2Transport(pipes.listener or plan.socket, methods, max_body_bytes=max_body_bytes, tls=tls)
        case TransportName.GRPC_AIO:
            from extproc.server.grpc_aio import GrpcAioTransport  # noqa: PLC0415

            return GrpcAioTransport(plan.address or plan.socket, methods, max_body_bytes=max_body_bytes)
        case _ as never:
            assert_never(never)


def _tell(line: bytes) -> None:
    """To whoever started this worker. A watcher that is slow or gone costs lines, never requests."""
    try:
        os.write(sys.stdout.fileno(), line)
    except OSError:
        _log.debug("no one reads what passes")
