"""The SQL ledger, on SQLite and on a real PostgreSQL: one row a request id, from any number of processes."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from extproc.catalog import Usage
from extproc.record.ledger import LedgerRow, LedgerUnavailableError, Outcome, RowsRejectedError
from extproc.stores.sql import LEDGER, METADATA, SqlLedger, StoreError, open_ledger
from tests.ledger_rows import make_row


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database of each kind; a relative one starts at the test's folder."""
    fresh: str = (
        "sqlite:///state/ledger.db" if request.param == "sqlite" else request.getfixturevalue("fresh_postgres_url")
    )
    return fresh


@pytest.fixture
def ledger(url: str, tmp_path: Path) -> Iterator[SqlLedger]:
    opened = open_ledger(url, tmp_path)
    yield opened
    opened.close()


def stored(ledger: SqlLedger) -> list[sa.Row[tuple[object, ...]]]:
    with ledger.engine.connect() as connection:
        return list(connection.execute(sa.select(LEDGER).order_by(LEDGER.c.started_at, LEDGER.c.request_id)))


FULL = make_row(
    "full",
    team="search",
    project="indexer",
    user="ada",
    agent="ci-bot",
    key_id="search-ci",
    dialect="openai",
    endpoint="chat",
    alias="smart",
    provider="azure",
    model_asked="gpt-5.1",
    model_returned="gpt-5.1-2026-01-01",
    usage=Usage(100, 50, 20, 10, 5),
    cost_nusd=2**40,
    price_source="genai-prices",
    tried="openai:503,azure:200",
    attempts=2,
    first_byte_s=0.25,
    stream=True,
    estimated=True,
    outcome=Outcome.CLIENT_LEFT,
)


def test_every_field_of_a_row_is_read_back_as_it_was_written(ledger: SqlLedger) -> None:
    assert ledger.write([FULL]) == 1
    (found,) = stored(ledger)
    values = found._asdict()
    usage = Usage(*(values.pop(name) for name in Usage.__slots__))
    user, outcome = values.pop("user_id"), Outcome(values.pop("outcome"))
    assert LedgerRow(**values, user=user, outcome=outcome, usage=usage) == FULL


def test_what_is_not_known_is_null_and_not_zero(ledger: SqlLedger) -> None:
    ledger.write([make_row(usage=None, cost_nusd=None)])
    (found,) = stored(ledger)
    assert (found.input_tokens, found.cost_nusd, found.team, found.first_byte_s) == (None, None, None, None)


def test_a_repeated_request_id_is_one_row_the_first(ledger: SqlLedger) -> None:
    assert ledger.write([make_row("a", status=200), make_row("b")]) == 2
    assert ledger.write([make_row("a", status=500), make_row("c"), make_row("c")]) == 1
    assert [(row.request_id, row.status) for row in stored(ledger)] == [("a", 200), ("b", 200), ("c", 200)]


def test_nothing_to_write_is_no_error(ledger: SqlLedger) -> None:
    assert ledger.write([]) == 0


def test_times_of_all_zones_are_ordered_and_filtered_as_utc(ledger: SqlLedger) -> None:
    early = datetime(2026, 11, 24, 1, 0, tzinfo=timezone(timedelta(hours=9)))  # 16:00 UTC, the day before
    middle = datetime(2026, 11, 23, 20, 0, 0, 1, tzinfo=UTC)
    late = datetime(2026, 11, 23, 17, 0, tzinfo=timezone(timedelta(hours=-8)))  # 01:00 UTC, the day after
    ledger.write(
        [make_row("late", started_at=late), make_row("early", started_at=early), make_row("middle", started_at=middle)]
    )
    assert [row.request_id for row in stored(ledger)] == ["early", "middle", "late"]
    assert [row.started_at for row in stored(ledger)] == [early, middle, late]
    assert all(row.started_at.tzinfo is UTC for row in stored(ledger))
    with ledger.engine.connect() as connection:
        after = connection.execute(sa.select(LEDGER.c.request_id).where(LEDGER.c.started_at > middle)).scalars().all()
    assert after == ["late"]


def test_a_row_without_a_time_zone_is_rejected_and_takes_none_with_it(ledger: SqlLedger) -> None:
    with pytest.raises(RowsRejectedError):
        ledger.write([make_row("good"), make_row("bad", started_at=datetime(2026, 1, 1))])
    assert stored(ledger) == []


def test_hostile_text_and_numbers_are_stored(ledger: SqlLedger) -> None:
    hostile = "a\0b\ud800'; DROP TABLE ledger; --" + "x" * 100_000
    row = make_row(hostile, alias=hostile, team=hostile, usage=Usage(10**40, -5), cost_nusd=10**40)
    assert ledger.write([row, row]) == 1
    assert ledger.write([row]) == 0


def test_a_database_that_is_gone_is_unavailable_and_not_a_fault_of_the_rows(ledger: SqlLedger) -> None:
    with ledger.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE ledger RENAME TO away"))
    with pytest.raises(LedgerUnavailableError):
        ledger.write([make_row()])
    with ledger.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE away RENAME TO ledger"))
    assert ledger.write([make_row()]) == 1


def test_the_message_of_a_failed_write_holds_no_personal_data(ledger: SqlLedger) -> None:
    with ledger.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE ledger"))
    with pytest.raises(LedgerUnavailableError) as failure:
        ledger.write([make_row(user="ada@example.com")])
    assert "ada@example.com" not in str(failure.value)


def test_the_migrations_make_exactly_the_tables_that_the_program_uses(ledger: SqlLedger) -> None:
    with ledger.engine.connect() as connection:
        options = {"compare_type": True, "version_table": "extproc_revision"}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), METADATA) == []


def test_opening_again_keeps_the_rows(ledger: SqlLedger, url: str, tmp_path: Path) -> None:
    ledger.write([make_row()])
    again = open_ledger(url, tmp_path)
    assert len(stored(again)) == 1
    again.close()


def test_a_database_of_a_newer_release_is_refused_with_a_reason(ledger: SqlLedger, url: str, tmp_path: Path) -> None:
    with ledger.engine.begin() as connection:
        connection.execute(sa.text("UPDATE extproc_revision SET version_num = '9999'"))
    with pytest.raises(StoreError, match="newer release"):
        open_ledger(url, tmp_path)


def test_several_threads_open_an_empty_database_at_once(url: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ledgers = list(pool.map(lambda _: open_ledger(url, tmp_path), range(8)))
    assert sum(ledger.write([make_row()]) for ledger in ledgers) == 1
    for ledger in ledgers:
        ledger.close()


WRITE_2000 = """
    import sys
    from datetime import UTC, datetime, timedelta
    from pathlib import Path
    import random
    from extproc.catalog import Usage
    from extproc.record.ledger import LedgerUnavailableError, Outcome, LedgerRow
    from extproc.stores.sql import open_ledger

    url, folder, seed = sys.argv[1:]
    rows = [
        LedgerRow(request_id=f"r{n}", started_at=datetime(2026, 11, 24, tzinfo=UTC) + timedelta(seconds=n), team="t",
                  usage=Usage(n, 1), cost_nusd=n, status=200, outcome=Outcome.OK, attempts=1, duration_s=0.1,
                  stream=False, estimated=False, request_bytes=1, response_bytes=1)
        for n in range(2000)
    ]
    random.Random(seed).shuffle(rows)
    ledger = open_ledger(url, Path(folder))
    print(sum(ledger.write(rows[start:start + 100]) for start in range(0, 2000, 100)))
"""


def test_four_processes_write_the_same_2000_rows_and_the_table_has_2000(url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WRITE_2000), url, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)
        for seed in range(4)
    ]
    new = [int(writer.communicate(timeout=120)[0]) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0, 0]
    ledger = open_ledger(url, tmp_path)
    with ledger.engine.connect() as connection:
        count, cost = connection.execute(sa.select(sa.func.count(), sa.func.sum(LEDGER.c.cost_nusd))).one()
    ledger.close()
    assert (count, int(cost), sum(new)) == (2000, sum(range(2000)), 2000)


def test_a_sqlite_ledger_is_private_relative_to_its_folder_and_in_wal_mode(tmp_path: Path) -> None:
    ledger = open_ledger("sqlite:///state/ledger.db", tmp_path)
    ledger.write([make_row()])
    files = list((tmp_path / "state").iterdir())
    assert tmp_path / "state" / "ledger.db" in files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    with ledger.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 10_000
    ledger.close()


def test_a_reader_does_not_hold_up_the_writer(tmp_path: Path) -> None:
    ledger = open_ledger("sqlite:///ledger.db", tmp_path)
    ledger.write([make_row("a")])
    with ledger.engine.connect() as reader:
        assert reader.execute(sa.select(sa.func.count()).select_from(LEDGER)).scalar_one() == 1
        assert ledger.write([make_row("b")]) == 1
        assert reader.execute(sa.select(sa.func.count()).select_from(LEDGER)).scalar_one() == 1
    ledger.close()


def test_the_last_days_are_found_by_index_and_not_by_a_scan(ledger: SqlLedger) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    ledger.write([make_row(f"r{n}", started_at=start + timedelta(minutes=n), team="t") for n in range(5_000)])
    query = sa.select(sa.func.sum(LEDGER.c.cost_nusd)).where(LEDGER.c.started_at >= start + timedelta(minutes=4_990))
    of_team = query.where(LEDGER.c.team == "t")
    with ledger.engine.connect() as connection:
        sqlite = ledger.engine.dialect.name == "sqlite"
        if not sqlite:
            connection.execute(sa.text("ANALYZE ledger"))
        for asked in (query, of_team):
            words = str(asked.compile(ledger.engine, compile_kwargs={"literal_binds": True}))
            plan = json.dumps(
                [list(row) for row in connection.exec_driver_sql(f"EXPLAIN {'QUERY PLAN' if sqlite else ''} {words}")]
            )
            assert "ledger_by_" in plan, plan
            assert "SCAN ledger" not in plan


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql://root:hunter2@db/x", "mysql is not supported"),
        ("hunter2 is no url", "not a database URL"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("postgresql://u:hunter2@127.0.0.1:1/x", "cannot open the database"),
    ],
)
def test_a_wrong_url_is_refused_with_a_reason_and_without_its_password(url: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=reason) as refusal:
        open_ledger(url, tmp_path)
    assert "hunter2" not in str(refusal.value)


def test_a_file_that_is_no_database_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database " * 100)
    with pytest.raises(StoreError, match="not a database"):
        open_ledger("sqlite:///notes.txt", tmp_path)
