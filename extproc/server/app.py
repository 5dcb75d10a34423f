"""A worker, put together: one process that decides, adapts and records for the Envoy that calls its socket.

The composition root of the data path; the supervisor starts it as `extproc serve`. The surprising thing: it never
learns a provider's secret. Those go from gateway.yaml into Envoy's own files, and Envoy adds them on the way out.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from extproc.config.secrets import ledger_url
from extproc.config.snapshot import Snapshot
from extproc.decide.estimate import LearnedRatios
from extproc.decide.meter import Meter
from extproc.decide.pipeline import Decider
from extproc.decide.tokens import TokenCounter
from extproc.record.finished import Finished
from extproc.record.ledger import LedgerRow
from extproc.record.pipeline import row_of
from extproc.record.writer import BatchWriter
from extproc.server import accesslog, processor
from extproc.server.grpc_aio import GrpcAioTransport
from extproc.server.watch import line_of
from extproc.stores.sql import open_ledger

READY_LINE = b"ready\n"
DRAIN_S = 10.0

_log = logging.getLogger(__name__)


class Recorder:
    """From a finished request to the ledger's queue and the watcher's line."""

    def __init__(
        self, snapshot: Snapshot, ratios: LearnedRatios, put: Callable[[LedgerRow], None], tell: Callable[[bytes], None]
    ) -> None:
        self._snapshot = snapshot
        self._ratios = ratios
        self._put = put
        self._tell = tell

    def __call__(self, finished: Finished) -> None:
        row = row_of(finished, self._snapshot, self._ratios)
        self._put(row)
        self._tell(line_of(row))


async def serve(snapshot: Snapshot, socket: Path, environ: Mapping[str, str]) -> None:
    """Serve on `socket` until SIGTERM or SIGINT. Raises StoreError or SecretError when the ledger can not be opened."""
    stop = asyncio.Event()
    for wanted in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(wanted, stop.set)
    folder = snapshot.folder
    ledger = await asyncio.to_thread(open_ledger, ledger_url(snapshot, environ), folder)
    counter = TokenCounter()
    await counter.preload()
    ratios = LearnedRatios()
    writer = BatchWriter(ledger, folder)
    writer.start()
    decider = Decider(snapshot, Meter(ratios, counter), Random())
    recorder = Recorder(snapshot, ratios, writer.put, _tell)
    methods = (processor.method(lambda: decider), accesslog.method(recorder))
    transport = GrpcAioTransport(socket, methods, max_body_bytes=snapshot.listen.max_body_bytes)
    await transport.start()
    # What lives now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    _tell(READY_LINE)
    await stop.wait()
    await transport.drain(DRAIN_S)
    await writer.close()
    counter.close()


def _tell(line: bytes) -> None:
    """To whoever started this worker. A watcher that is slow or gone costs lines, never requests."""
    try:
        os.write(sys.stdout.fileno(), line)
    except OSError:
        _log.debug("no one reads what passes")
