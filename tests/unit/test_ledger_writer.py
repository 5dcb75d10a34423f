"""The queue in front of the ledger: nothing waits for it, nothing is lost, memory stays bounded."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import sqlalchemy as sa

from extproc.catalog import Usage
from extproc.record.ledger import LedgerRow, LedgerUnavailableError, RowsRejectedError
from extproc.record.writer import REJECTED_FILE, BatchWriter
from extproc.stores.sql import LEDGER, open_ledger
from tests.ledger_rows import make_row


class FakeLedger:
    """A ledger in memory that can be away, slow, or refuse rows."""

    def __init__(self) -> None:
        self.rows: dict[str, LedgerRow] = {}
        self.batches: list[int] = []
        self.away = False
        self.broken = False
        self.rejects: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def write(self, rows: Sequence[LedgerRow]) -> int:
        self.gate.wait(30)
        if self.away:
            raise LedgerUnavailableError("connection refused")
        if self.broken:
            raise RuntimeError("a fault")
        if any(row.request_id in self.rejects for row in rows):
            raise RowsRejectedError("out of range")
        self.batches.append(len(rows))
        before = len(self.rows)
        for row in rows:
            self.rows.setdefault(row.request_id, row)
        return len(self.rows) - before


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def spool_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("ledger-spool-*"))


async def close_all(*writers: BatchWriter) -> None:
    for writer in writers:
        await writer.close()


async def test_a_single_row_is_written_within_the_interval(tmp_path: Path) -> None:
    ledger = FakeLedger()
    writer = BatchWriter(ledger, tmp_path)
    writer.start()
    writer.put(make_row())
    await until(lambda: bool(ledger.rows), timeout_s=1)
    await writer.close()
    assert writer.counters.written == 1
    assert spool_files(tmp_path) == []


async def test_full_batches_do_not_wait_for_the_interval(tmp_path: Path) -> None:
    ledger = FakeLedger()
    writer = BatchWriter(ledger, tmp_path, batch_rows=100, interval_s=60)
    writer.start()
    await asyncio.sleep(0.05)
    for number in range(1_000):
        writer.put(make_row(f"r{number}"))
    await until(lambda: len(ledger.rows) == 1_000, timeout_s=2)
    assert max(ledger.batches) == 100
    await writer.close()


async def test_put_neither_waits_nor_fails_while_a_write_hangs(tmp_path: Path) -> None:
    ledger = FakeLedger()
    ledger.gate.clear()
    writer = BatchWriter(ledger, tmp_path, interval_s=0)
    writer.start()
    writer.put(make_row("first"))
    await asyncio.sleep(0.1)
    started = time.perf_counter()
    for number in range(2_000):
        writer.put(make_row(f"r{number}"))
    assert time.perf_counter() - started < 1
    assert writer.counters.waiting == 2_001
    ledger.gate.set()
    await writer.close()
    assert len(ledger.rows) == 2_001


async def test_rows_outlast_an_outage_of_the_database_in_their_order(tmp_path: Path) -> None:
    ledger = FakeLedger()
    ledger.away = True
    writer = BatchWriter(ledger, tmp_path, interval_s=0, batch_rows=3)
    writer.start()
    for number in range(10):
        writer.put(make_row(f"r{number}"))
    await until(lambda: writer.counters.failures >= 2)
    assert writer.counters.waiting == 10
    ledger.away = False
    await until(lambda: len(ledger.rows) == 10)
    assert list(ledger.rows) == [f"r{number}" for number in range(10)]
    await writer.close()


async def test_a_fault_of_the_store_does_not_end_the_writing(tmp_path: Path) -> None:
    ledger = FakeLedger()
    ledger.broken = True
    writer = BatchWriter(ledger, tmp_path, interval_s=0)
    writer.start()
    writer.put(make_row())
    await until(lambda: writer.counters.failures >= 1)
    ledger.broken = False
    await until(lambda: len(ledger.rows) == 1)
    await writer.close()


async def test_beyond_the_bound_rows_go_to_a_private_file_and_come_back(tmp_path: Path) -> None:
    ledger = FakeLedger()
    ledger.away = True
    folder = tmp_path / "state"
    writer = BatchWriter(ledger, folder, interval_s=0, waiting_rows=1_000)
    writer.start()
    for number in range(3_500):
        writer.put(make_row(f"r{number}", usage=Usage(number, 1), cost_nusd=number))
        if number % 500 == 0:
            await asyncio.sleep(0.02)
    await until(lambda: writer.counters.waiting <= 1_000)
    assert writer.counters.waiting + writer.counters.spooled == 3_500
    (file,) = spool_files(folder)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ledger.away = False
    await until(lambda: len(ledger.rows) == 3_500)
    await until(lambda: spool_files(folder) == [])
    assert sum(row.cost_nusd or 0 for row in ledger.rows.values()) == sum(range(3_500))
    counters = writer.counters
    assert (counters.written, counters.replayed, counters.waiting) == (3_500, counters.spooled, 0)
    await writer.close()


async def test_rows_on_their_way_to_a_slow_disk_are_counted_and_come_back_without_new_traffic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = FakeLedger()
    writer = BatchWriter(ledger, tmp_path, interval_s=0, waiting_rows=0)
    append = writer._spool.append
    disk = threading.Event()

    def slow(rows: Sequence[LedgerRow]) -> None:
        disk.wait(10)
        append(rows)

    monkeypatch.setattr(writer._spool, "append", slow)
    writer.start()
    # Before the flusher's first look, so that it finds nothing in memory and nothing on disk, and goes to sleep.
    for number in range(1_000):
        writer.put(make_row(f"r{number}"))
    await asyncio.sleep(0.2)
    assert (writer.counters.waiting, writer.counters.spooled, ledger.rows) == (1_000, 0, {})
    disk.set()
    await until(lambda: len(ledger.rows) == 1_000, timeout_s=3)
    await writer.close()


async def test_the_spool_is_replayed_under_steady_traffic(tmp_path: Path) -> None:
    ledger = FakeLedger()
    ledger.away = True
    before = BatchWriter(ledger, tmp_path)
    for number in range(2_000):
        before.put(make_row(f"old{number}"))
    await before.close()
    ledger.away = False
    writer = BatchWriter(ledger, tmp_path, interval_s=0)
    writer.start()

    async def traffic() -> None:
        for number in range(100_000):
            writer.put(make_row(f"new{number}"))
            await asyncio.sleep(0)

    steady = asyncio.create_task(traffic())
    await until(lambda: writer.counters.replayed == 2_000)
    assert not steady.done()
    steady.cancel()
    await writer.close()


async def test_close_spools_what_the_database_does_not_take_and_the_next_start_writes_it(tmp_path: Path) -> None:
    ledger = FakeLedger()
    ledger.away = True
    first = BatchWriter(ledger, tmp_path)
    first.start()
    for number in range(1_234):
        first.put(make_row(f"r{number}"))
    await first.close()
    assert first.counters.waiting == 0
    ledger.away = False
    second = BatchWriter(ledger, tmp_path)
    second.start()
    await until(lambda: len(ledger.rows) == 1_234)
    await until(lambda: spool_files(tmp_path) == [])
    await second.close()


async def test_close_does_not_wait_for_ever_for_a_write_that_hangs(tmp_path: Path) -> None:
    ledger = FakeLedger()
    ledger.gate.clear()
    writer = BatchWriter(ledger, tmp_path, interval_s=0, close_timeout_s=0.2)
    writer.start()
    writer.put(make_row("in-flight"))
    await asyncio.sleep(0.05)
    writer.put(make_row("waiting"))
    started = time.perf_counter()
    await writer.close()
    assert time.perf_counter() - started < 2
    (file,) = spool_files(tmp_path)
    assert [json.loads(line)["request_id"] for line in file.read_text().splitlines()] == ["in-flight", "waiting"]
    ledger.gate.set()


async def test_a_row_that_comes_after_close_is_spooled(tmp_path: Path) -> None:
    writer = BatchWriter(FakeLedger(), tmp_path)
    writer.start()
    await writer.close()
    writer.put(make_row("late"))
    (file,) = spool_files(tmp_path)
    assert "late" in file.read_text()
    await writer.close()


async def test_close_writes_everything_that_waits(tmp_path: Path) -> None:
    ledger = FakeLedger()
    writer = BatchWriter(ledger, tmp_path, interval_s=60, batch_rows=10_000)
    writer.start()
    for number in range(5_000):
        writer.put(make_row(f"r{number}"))
    await writer.close()
    assert len(ledger.rows) == 5_000


async def test_one_row_that_the_database_rejects_is_put_aside_and_the_others_written(tmp_path: Path) -> None:
    ledger = FakeLedger()
    ledger.rejects = {"r137", "r401"}
    writer = BatchWriter(ledger, tmp_path, interval_s=0)
    writer.start()
    for number in range(500):
        writer.put(make_row(f"r{number}"))
    await until(lambda: len(ledger.rows) == 498 and writer.counters.rejected == 2)
    kept = (tmp_path / REJECTED_FILE).read_text().splitlines()
    assert {json.loads(line)["request_id"] for line in kept} == ledger.rejects
    await writer.close()


async def test_a_damaged_line_of_the_spool_is_put_aside_once_and_stops_nothing(tmp_path: Path) -> None:
    ledger = FakeLedger()
    ledger.away = True
    first = BatchWriter(ledger, tmp_path)
    for number in range(3):
        first.put(make_row(f"r{number}"))
    await first.close()
    (file,) = spool_files(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"\xff{half a li\n" + lines[1] + lines[2][:40])
    second = BatchWriter(ledger, tmp_path)
    second.start()
    await until(lambda: second.counters.failures >= 2)
    ledger.away = False
    await until(lambda: spool_files(tmp_path) == [])
    assert set(ledger.rows) == {"r0", "r1"}
    assert len((tmp_path / REJECTED_FILE).read_bytes().splitlines()) == 2
    assert second.counters.rejected == 2
    await second.close()


async def test_a_spool_of_a_living_process_is_left_to_it(tmp_path: Path) -> None:
    away, here = FakeLedger(), FakeLedger()
    away.away = True
    owner = BatchWriter(away, tmp_path, interval_s=0, waiting_rows=10)
    owner.start()
    for number in range(100):
        owner.put(make_row(f"r{number}"))
    await until(lambda: owner.counters.spooled > 0)
    other = BatchWriter(here, tmp_path, interval_s=0)
    other.start()
    await asyncio.sleep(0.2)
    assert here.rows == {}
    assert len(spool_files(tmp_path)) == 1
    await close_all(owner, other)


KILLED = """
    import asyncio, sys
    from pathlib import Path
    from extproc.record.ledger import LedgerUnavailableError
    from extproc.record.writer import BatchWriter
    from tests.ledger_rows import make_row

    class Away:
        def write(self, rows):
            raise LedgerUnavailableError("away")

    async def main():
        writer = BatchWriter(Away(), Path(sys.argv[1]), interval_s=0, waiting_rows=0)
        writer.start()
        for number in range(1000):
            writer.put(make_row(f"r{number}"))
        while writer.counters.spooled < 1000:
            await asyncio.sleep(0.01)
        print("spooled", flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


async def test_a_killed_process_leaves_its_spool_to_the_next_on_a_real_database(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"spooled\n"
        os.kill(process.pid, signal.SIGKILL)
    ledger = open_ledger("sqlite:///ledger.db", tmp_path)
    writer = BatchWriter(ledger, tmp_path)
    writer.start()
    await until(lambda: writer.counters.written == 1_000)
    await until(lambda: spool_files(tmp_path) == [])
    await writer.close()
    ledger.close()


async def test_rows_outlast_a_real_postgresql_that_drops_all_connections(
    fresh_postgres_url: str, postgres_url: str, tmp_path: Path
) -> None:
    name = urlsplit(fresh_postgres_url).path.removeprefix("/")
    ledger = open_ledger(fresh_postgres_url, tmp_path)
    writer = BatchWriter(ledger, tmp_path, interval_s=0, waiting_rows=500)
    writer.start()
    writer.put(make_row("before"))
    await until(lambda: writer.counters.written == 1)
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        for number in range(2_000):
            writer.put(make_row(f"r{number}"))
        await until(lambda: writer.counters.failures >= 1 and writer.counters.spooled > 0)
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
    await until(lambda: writer.counters.written == 2_001)
    await until(lambda: spool_files(tmp_path) == [])
    await writer.close()
    with ledger.engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(LEDGER)).scalar_one() == 2_001
    ledger.close()


@pytest.mark.parametrize("step", ["spool", "close"])
async def test_a_disk_that_is_full_is_reported_and_the_rows_stay_in_memory(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = FakeLedger()
    ledger.away = True
    writer = BatchWriter(ledger, tmp_path, interval_s=0, waiting_rows=10)
    monkeypatch.setattr(writer._spool, "append", _no_space)
    writer.start()
    for number in range(100 if step == "spool" else 5):
        writer.put(make_row(f"r{number}"))
    await until(lambda: writer.counters.failures >= 2)
    with pytest.raises(OSError, match="No space"):
        await writer.close()
    assert writer.counters.waiting == (100 if step == "spool" else 5)


def _no_space(_rows: Sequence[LedgerRow]) -> None:
    raise OSError(28, "No space left on device")
