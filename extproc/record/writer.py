"""The queue in front of the ledger: `put` costs the request nothing, a thread writes batches, and no row is lost.

Record calls `put` at the end of each request. While the database is away rows wait in memory, and beyond a bound in a
spool file in the state folder, which is replayed when the database answers, or by the next process to start. The
surprising thing: a row may be written twice (a lost connection may hide a commit), and that is why its request id is
the primary key.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import random
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from uuid import uuid4

import msgspec

from extproc.record.ledger import Ledger, LedgerRow, LedgerUnavailableError, RowsRejectedError, storable

log = logging.getLogger(__name__)

BATCH_ROWS = 500
INTERVAL_S = 0.25
WAITING_ROWS = 50_000
SPOOL_CHUNK_ROWS = 5_000
FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 10.0
CLOSE_TIMEOUT_S = 5.0
REJECTED_FILE = "ledger-rejected.jsonl"


@dataclass(frozen=True, slots=True)
class WriterCounters:
    """`written`: new rows in the ledger. `waiting`: rows in memory now. `spooled`: rows ever put into the spool file.
    `replayed`: rows read back from one and written. `failures`: writes that failed. `rejected`: rows that no database
    would take, kept in `ledger-rejected.jsonl`.
    """

    written: int
    waiting: int
    spooled: int
    replayed: int
    failures: int
    rejected: int


class BatchWriter:
    """Writes rows in batches of `batch_rows`, at the latest `interval_s` after they came. Belongs to one event loop."""

    def __init__(
        self,
        ledger: Ledger,
        folder: Path,
        *,
        batch_rows: int = BATCH_ROWS,
        interval_s: float = INTERVAL_S,
        waiting_rows: int = WAITING_ROWS,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        self._ledger = ledger
        self._spool = Spool(folder)
        self._batch_rows = batch_rows
        self._interval_s = interval_s
        self._waiting_rows = waiting_rows
        self._close_timeout_s = close_timeout_s
        self._waiting: deque[LedgerRow] = deque()
        self._in_flight: tuple[LedgerRow, ...] = ()
        self._being_spooled: list[LedgerRow] = []
        self._arrived = asyncio.Event()
        self._batch_full = asyncio.Event()
        self._too_many = asyncio.Event()
        self._closing = asyncio.Event()
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._closed = False
        self._written = self._spooled = self._replayed = self._failures = self._rejected = 0

    def start(self) -> None:
        """Begins to write, first what a process before this one left in its spool. Needs a running event loop."""
        self._tasks = (asyncio.create_task(self._flush_for_ever()), asyncio.create_task(self._spool_for_ever()))

    def put(self, row: LedgerRow) -> None:
        """Takes a row. Never waits; after `close` it goes straight to the spool file."""
        if self._closed:
            self._spool.append((row,))
            self._spooled += 1
            return
        self._waiting.append(row)
        self._arrived.set()
        waiting = len(self._waiting)
        if waiting >= self._batch_rows:
            self._batch_full.set()
        if waiting > self._waiting_rows:
            self._too_many.set()

    @property
    def counters(self) -> WriterCounters:
        waiting = len(self._waiting) + len(self._in_flight) + len(self._being_spooled)
        return WriterCounters(
            self._written, waiting, self._spooled, self._replayed, self._failures, self._rejected + self._spool.damaged
        )

    async def close(self) -> None:
        """Writes what waits, for at most `close_timeout_s`; what the ledger does not take by then goes to the spool."""
        for event in (self._closing, self._arrived, self._batch_full, self._too_many):
            event.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._close_timeout_s):
                await asyncio.gather(*self._tasks, return_exceptions=True)
                while self._waiting and await self._write_waiting():
                    pass
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # No await from here on, so that no row can slip in between the last look and the last line.
        self._closed = True
        if self._waiting:
            rows = list(self._waiting)
            self._spool.append(rows)
            self._waiting.clear()
            self._spooled += len(rows)
            log.warning("the ledger did not take %d rows; they wait in %s", len(rows), self._spool.folder)
        self._spool.close()

    async def _flush_for_ever(self) -> None:
        await self._adopt()
        backoff_s = FIRST_BACKOFF_S
        while not self._closing.is_set():
            # One batch of each, by turns: steady traffic must not keep the spool from being replayed.
            if (not self._waiting or await self._write_waiting()) and await self._replay():
                backoff_s = FIRST_BACKOFF_S
                if len(self._waiting) < self._batch_rows and not self._spool.has_rows:
                    await self._next_batch()
            else:
                # Uneven, so that the processes of one gateway do not come back all at once.
                await _wait(self._closing, backoff_s * random.uniform(0.75, 1.25))  # noqa: S311
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    async def _adopt(self) -> None:
        try:
            await asyncio.to_thread(self._spool.adopt)
        except OSError as error:
            self._failures += 1
            log.error("cannot read spool files in %s: %s", self._spool.folder, error)

    async def _next_batch(self) -> None:
        """Returns when a batch is full, `interval_s` after the first row came, or at once when closing."""
        await self._arrived.wait()
        self._arrived.clear()
        self._batch_full.clear()
        if len(self._waiting) < self._batch_rows and not self._closing.is_set():
            await _wait(self._batch_full, self._interval_s)

    async def _write_waiting(self) -> bool:
        """Writes one batch; False when the ledger is away, and then the rows are back in their place."""
        batch = tuple(self._waiting.popleft() for _ in range(min(self._batch_rows, len(self._waiting))))
        self._in_flight = batch
        stored = False
        try:
            stored = await self._store(batch)
        finally:
            self._in_flight = ()
            if not stored:
                self._waiting.extendleft(reversed(batch))
        return stored

    async def _replay(self) -> bool:
        """Writes the next rows of the spool, if it has any; False when that must be tried again later."""
        if not self._spool.has_rows:
            return True
        try:
            rows = await asyncio.to_thread(self._spool.peek, self._batch_rows)
            if rows and not await self._store(rows):
                return False
            await asyncio.to_thread(self._spool.advance)
        except OSError as error:
            self._failures += 1
            log.error("cannot read the spool in %s: %s", self._spool.folder, error)
            return False
        self._replayed += len(rows)
        return True

    async def _store(self, rows: Sequence[LedgerRow]) -> bool:
        """Writes rows; those that the ledger rejects are found by halving and put aside. False: the ledger is away."""
        try:
            self._written += await asyncio.to_thread(self._ledger.write, rows)
        except LedgerUnavailableError as error:
            self._failures += 1
            log.warning("the ledger is away, %d rows wait: %s", self.counters.waiting, error)
            return False
        except RowsRejectedError as error:
            self._failures += 1
            if len(rows) > 1:
                middle = len(rows) // 2
                return await self._store(rows[:middle]) and await self._store(rows[middle:])
            return await self._put_aside(rows[0], error)
        except Exception:
            # A fault of the store must not end the task that writes: the rows keep, and the log says what is wrong.
            self._failures += 1
            log.exception("the ledger failed in an unknown way")
            return False
        return True

    async def _put_aside(self, row: LedgerRow, reason: Exception) -> bool:
        log.error("the ledger rejects request %s: %s", row.request_id, reason)
        try:
            await asyncio.to_thread(self._spool.reject, _line(row))
        except OSError as error:
            log.error("cannot write %s: %s", REJECTED_FILE, error)
            return False
        self._rejected += 1
        return True

    async def _spool_for_ever(self) -> None:
        """Moves the oldest rows to the file while too many wait. Its own task: the other may hang in a slow write."""
        while not self._closing.is_set():
            await self._too_many.wait()
            self._too_many.clear()
            while len(self._waiting) > self._waiting_rows and not self._closing.is_set():
                try:
                    await self._spool_oldest()
                except OSError as error:
                    self._failures += 1
                    log.error("cannot write the ledger's spool file: %s", error)
                    await _wait(self._closing, 1.0)

    async def _spool_oldest(self) -> None:
        """Moves a chunk of rows to the file, down to half the bound; they are back in their place when that fails."""
        count = min(SPOOL_CHUNK_ROWS, len(self._waiting) - self._waiting_rows // 2)
        chunk = self._being_spooled = [self._waiting.popleft() for _ in range(count)]
        spooled = False
        try:
            await asyncio.to_thread(self._spool.append, chunk)
            spooled = True
        finally:
            self._being_spooled = []
            if not spooled:
                self._waiting.extendleft(reversed(chunk))
        self._spooled += len(chunk)
        # The flusher may have seen an empty queue and an empty file while the rows were between the two.
        self._arrived.set()


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


class Spool:
    """Rows on disk as JSON lines, mode 0600: this process's own file, and those that dead processes left behind.

    Whoever holds the lock (flock) of a file owns it; the kernel lets go of it when the owner dies. Thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged = 0
        self._own: _SpoolFile | None = None
        self._adopted: list[_SpoolFile] = []
        self._lock = threading.Lock()

    @property
    def has_rows(self) -> bool:
        return self._own is not None or bool(self._adopted)

    def append(self, rows: Sequence[LedgerRow]) -> None:
        """Adds rows at the end. Raises OSError when the disk does not take them."""
        lines = b"".join(_line(row) for row in rows)
        with self._lock:
            if self._own is None:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._own = _SpoolFile.open(self.folder / f"ledger-spool-{uuid4().hex[:12]}.jsonl", os.O_CREAT)
            if self._own is None:
                raise OSError("another process took the new spool file")
            self._own.append(lines)

    def adopt(self) -> None:
        """Takes over the files whose owners are dead."""
        with self._lock:
            for path in sorted(self.folder.glob("ledger-spool-*.jsonl")):
                if (file := _SpoolFile.open(path)) is not None:
                    self._adopted.append(file)

    def peek(self, limit: int) -> list[LedgerRow]:
        """At most `limit` next rows, left in place until `advance`. A line that cannot be read is not among them."""
        with self._lock:
            file = self._oldest()
            return [] if file is None else file.peek(limit)

    def advance(self) -> None:
        """Lets go of the lines that the last `peek` saw, puts damaged ones aside, and deletes a file without more."""
        with self._lock:
            if (file := self._oldest()) is None:
                return
            for line in file.damaged:
                self.reject(line)
                self.damaged += 1
            file.damaged = []
            file.read_to = file.peeked_to
            if file.read_to < os.fstat(file.fd).st_size:
                return
            file.path.unlink(missing_ok=True)
            os.close(file.fd)
            if file is self._own:
                self._own = None
            else:
                self._adopted.remove(file)

    def reject(self, line: bytes) -> None:
        """Keeps a row, as a JSON line, that no one can write, for a person to look at."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.folder / REJECTED_FILE, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        with os.fdopen(fd, "ab") as file:
            file.write(line if line.endswith(b"\n") else line + b"\n")

    def close(self) -> None:
        """Lets go of all files; they stay for the next process."""
        with self._lock:
            for file in (*self._adopted, *((self._own,) if self._own else ())):
                os.close(file.fd)
            self._adopted, self._own = [], None

    def _oldest(self) -> _SpoolFile | None:
        return self._adopted[0] if self._adopted else self._own


@dataclass(slots=True)
class _SpoolFile:
    """An open, locked file. Bytes before `read_to` are in the ledger, those before `peeked_to` were looked at."""

    path: Path
    fd: int
    read_to: int = 0
    peeked_to: int = 0
    damaged: list[bytes] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, flags: int = 0) -> _SpoolFile | None:
        """The file, or None when another process owns it or has just deleted it."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return cls(path, fd)
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(fd)
        return None

    def append(self, lines: bytes) -> None:
        start = os.fstat(self.fd).st_size
        written = 0
        try:
            while written < len(lines):
                written += os.write(self.fd, lines[written:])
        except OSError:
            # Half a chunk would be written again with the next attempt; half a line would spoil the one after it.
            os.ftruncate(self.fd, start)
            raise

    def peek(self, limit: int) -> list[LedgerRow]:
        with open(self.fd, "rb", closefd=False) as file:
            file.seek(self.read_to)
            lines = list(islice(file, limit))
        self.peeked_to = self.read_to + sum(map(len, lines))
        self.damaged = []
        rows: list[LedgerRow] = []
        for line in lines:
            try:
                rows.append(_DECODER.decode(line))
            except (msgspec.DecodeError, ValueError):
                self.damaged.append(line)
        return rows


_DECODER = msgspec.json.Decoder(LedgerRow)
_ENCODER = msgspec.json.Encoder()


def _line(row: LedgerRow) -> bytes:
    return _ENCODER.encode(storable(row)) + b"\n"
