"""The SQL store behind the ledger: SQLite in a file by default, PostgreSQL by URL; the end of a request's path.

`record.writer` calls it from a thread, `extproc spend` reads it. The surprising thing: opening migrates. Whichever of
several processes opens first holds a lock while alembic runs, and the others find the work done.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Dialect, Engine, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError, StatementError

from extproc.record.ledger import LedgerRow, LedgerUnavailableError, RowsRejectedError, storable

METADATA = sa.MetaData()
BUSY_TIMEOUT_S = 10.0
"""How long SQLite waits for another process's transaction."""
CONNECT_TIMEOUT_S = 5
LOST_CONNECTION_MS = 10_000
"""After how long without an acknowledgement a PostgreSQL connection counts as lost (Linux; else the system's)."""
MIGRATION_LOCK = 0x6578_7470_726F_6331
"""The PostgreSQL advisory lock that migrations hold: ASCII `extproc1`."""


class StoreError(Exception):
    """The store's URL is wrong, its database cannot be reached, or it belongs to a newer release. Safe to print."""


class UtcDateTime(sa.TypeDecorator[datetime]):
    """Aware UTC in, aware UTC out. PostgreSQL keeps `timestamptz`; SQLite text of fixed width, which sorts by time."""

    impl = sa.DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        return dialect.type_descriptor(sa.DateTime(timezone=dialect.name == "postgresql"))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone")
        utc = value.astimezone(UTC)
        return utc if dialect.name == "postgresql" else utc.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


LEDGER = sa.Table(
    "ledger",
    METADATA,
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("started_at", UtcDateTime, nullable=False),
    sa.Column("team", sa.Text),
    sa.Column("project", sa.Text),
    # Not `user`: a reserved word of PostgreSQL, a trap for whoever writes their own query.
    sa.Column("user_id", sa.Text),
    sa.Column("agent", sa.Text),
    sa.Column("key_id", sa.Text),
    sa.Column("dialect", sa.Text),
    sa.Column("endpoint", sa.Text),
    sa.Column("alias", sa.Text),
    sa.Column("provider", sa.Text),
    sa.Column("model_asked", sa.Text),
    sa.Column("model_returned", sa.Text),
    sa.Column("input_tokens", sa.BigInteger),
    sa.Column("output_tokens", sa.BigInteger),
    sa.Column("cached_tokens", sa.BigInteger),
    sa.Column("cache_write_tokens", sa.BigInteger),
    sa.Column("reasoning_tokens", sa.BigInteger),
    sa.Column("cost_nusd", sa.BigInteger),
    sa.Column("price_source", sa.Text),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("code", sa.Text),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("tried", sa.Text),
    sa.Column("first_byte_s", sa.Double),
    sa.Column("duration_s", sa.Double, nullable=False),
    sa.Column("stream", sa.Boolean, nullable=False),
    sa.Column("estimated", sa.Boolean, nullable=False),
    sa.Column("request_bytes", sa.BigInteger, nullable=False),
    sa.Column("response_bytes", sa.BigInteger, nullable=False),
    sa.Index("ledger_by_start", "started_at"),
    sa.Index("ledger_by_team_and_start", "team", "started_at"),
)


class SqlLedger:
    """A ledger in a SQL database. Rows are inserted in one transaction a batch; a known request id changes nothing."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writes = engine.execution_options(sqlite_begin="BEGIN IMMEDIATE", preserve_rowcount=True)
        insert = (sqlite if engine.dialect.name == "sqlite" else postgresql).insert(LEDGER)
        self._insert = insert.on_conflict_do_nothing(index_elements=["request_id"])

    def write(self, rows: Sequence[LedgerRow]) -> int:
        """Stores all rows or none; returns how many were new. As `record.ledger.Ledger` says."""
        if not rows:
            return 0
        # By request id: processes that insert the same rows in different orders would wait for each other in a circle.
        values = sorted((_values(storable(row)) for row in rows), key=lambda value: str(value["request_id"]))
        try:
            with self._writes.begin() as connection:
                return connection.execute(self._insert, values).rowcount
        except SQLAlchemyError as error:
            raise (RowsRejectedError if _is_about_the_rows(error) else LedgerUnavailableError)(
                _reason(error)
            ) from error
        except (ValueError, OverflowError, TypeError) as error:
            raise RowsRejectedError(type(error).__name__) from error

    def close(self) -> None:
        self.engine.dispose()


def open_ledger(url: str, folder: Path) -> SqlLedger:
    """Opens the database at `url` and brings its tables up to date; a relative SQLite path starts at `folder`.

    Safe when several processes open the same database at once. Raises StoreError.
    """
    engine = _engine(url, folder)
    try:
        migrate(engine)
    except CommandError as error:
        engine.dispose()
        raise StoreError("the database was written by a newer release of extproc; use that release") from error
    except (SQLAlchemyError, sqlite3.Error) as error:
        engine.dispose()
        raise StoreError(f"cannot open the database: {_reason(error)}") from error
    return SqlLedger(engine)


def migrate(engine: Engine) -> None:
    """Runs the migrations that the database lacks, in one transaction, under a lock that other processes wait for."""
    config = Config()
    config.set_main_option("script_location", "extproc.stores:migrations")
    if engine.dialect.name == "sqlite":
        _use_write_ahead_log(engine)
    with engine.execution_options(sqlite_begin="BEGIN IMMEDIATE").begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _engine(url: str, folder: Path) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        # The URL may hold a password, so the message must not repeat it.
        raise StoreError("not a database URL; write sqlite:///FILE or postgresql://USER@HOST/NAME") from error
    match parsed.get_backend_name():
        case "sqlite":
            return _sqlite_engine(parsed, folder)
        case "postgresql" | "postgres":
            return _postgresql_engine(parsed)
        case other:
            raise StoreError(f"{other} is not supported; write sqlite:///FILE or postgresql://USER@HOST/NAME")


def _sqlite_engine(url: URL, folder: Path) -> Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise StoreError("SQLite needs a file that several processes can share; write sqlite:///FILE")
    path = folder / url.database
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Only a new file is opened here: closing one that SQLite holds open would drop this process's locks on it.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise StoreError(f"cannot create {path}: {error.strerror}") from error
    engine = sa.create_engine(
        url.set(drivername="sqlite+pysqlite", database=str(path)), connect_args={"timeout": BUSY_TIMEOUT_S}
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """Takes transactions out of the sqlite3 module's hands, which does not open one for DDL or SELECT."""
    connection.isolation_level = None
    # With a write-ahead log, NORMAL survives a crash of the process; a power failure may take the last transactions.
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin_sqlite(connection: Connection) -> None:
    """Readers begin deferred and hold up no writer; a writer takes its lock first, else it may fail half way."""
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


def _use_write_ahead_log(engine: Engine) -> None:
    """Sets WAL, which stays with the file. SQLite does not wait for others when it changes this, so this does."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    connection = engine.raw_connection()
    try:
        while True:
            try:
                connection.cursor().execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
    finally:
        connection.close()


def _postgresql_engine(url: URL) -> Engine:
    defaults = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "tcp_user_timeout": LOST_CONNECTION_MS,
        "application_name": "extproc",
    }
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args={name: value for name, value in defaults.items() if name not in url.query},
        pool_size=2,
        max_overflow=2,
        pool_pre_ping=True,
    )


def _values(row: LedgerRow) -> dict[str, object]:
    """The row as column values: the usage spread over its columns, all of them NULL when it is unknown."""
    values: dict[str, object] = {name: getattr(row, name) for name in _ROW_FIELDS}
    values["user_id"] = row.user
    values["outcome"] = row.outcome.value
    for name in _USAGE_FIELDS:
        values[name] = None if row.usage is None else getattr(row.usage, name)
    return values


_USAGE_FIELDS = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
_ROW_FIELDS = tuple(name for name in LedgerRow.__slots__ if name not in {"user", "usage", "outcome"})


def _is_about_the_rows(error: SQLAlchemyError) -> bool:
    """True for a value that the column cannot hold: refused by the database, or by SQLAlchemy before it was sent."""
    match error:
        case DataError() | IntegrityError():
            return True
        case DBAPIError():
            return False
        case _:
            return isinstance(error, StatementError)


def _reason(error: Exception) -> str:
    """The driver's own words in one line, without the statement and its parameters, which hold personal data."""
    match error:
        case DBAPIError():
            return " ".join(str(error.orig).split())
        case SQLAlchemyError():
            return type(error).__name__
        case _:
            return str(error)
