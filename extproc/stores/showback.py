"""Showback: who spent what, as `extproc spend` and the console ask the ledger; beside the request's path, never on it.

The surprising thing: refused requests are counted apart and are not among the requests, because no model was called for
them; money that was estimated (the client left, the stream broke) is in the cost and is also shown by itself.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from sqlalchemy.ext.compiler import compiles

from extproc.record.ledger import Outcome
from extproc.stores.sql import LEDGER, SqlLedger

NOTHING = "-"
"""What a table shows where a row has no value, for example the provider of a request that was refused."""


class _Day(sa.sql.functions.FunctionElement[str]):
    """The UTC day of a time as `2026-11-24`, in each database's words."""

    type = sa.Text()
    inherit_cache = True


@compiles(_Day, "sqlite")
def _day_sqlite(element: _Day, compiler: Any, **kw: Any) -> str:
    return f"substr({compiler.process(element.clauses, **kw)}, 1, 10)"


@compiles(_Day, "postgresql")
def _day_postgresql(element: _Day, compiler: Any, **kw: Any) -> str:
    return f"to_char({compiler.process(element.clauses, **kw)} AT TIME ZONE 'UTC', 'YYYY-MM-DD')"


DIMENSIONS: Mapping[str, sa.ColumnElement[Any]] = MappingProxyType(
    {
        "team": LEDGER.c.team,
        "project": LEDGER.c.project,
        "user": LEDGER.c.user_id,
        "agent": LEDGER.c.agent,
        "key": LEDGER.c.key_id,
        "alias": LEDGER.c.alias,
        "provider": LEDGER.c.provider,
        "model": LEDGER.c.model_asked,
        "endpoint": LEDGER.c.endpoint,
        "day": _Day(LEDGER.c.started_at),
        "status": sa.cast(LEDGER.c.status, sa.Text),
        "outcome": LEDGER.c.outcome,
    }
)
"""What spend can be grouped by. `model` is the name sent to the provider, `alias` the one that the client asked for."""


@dataclass(frozen=True, slots=True)
class SpendLine:
    """One group's sums. `keys` are its values in the order of `by`, None where rows have none.

    `requests` does not include `refused` ones. `cost_nusd` (nano-USD) is all that is known: it includes
    `estimated_cost_nusd`, and nothing for the `unpriced_requests`.
    """

    keys: tuple[str | None, ...]
    requests: int = 0
    refused: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    cost_nusd: int = 0
    estimated_requests: int = 0
    estimated_cost_nusd: int = 0
    unpriced_requests: int = 0


_NUMBERS = tuple(field.name for field in fields(SpendLine) if field.name != "keys")
_TOKENS = tuple(name for name in _NUMBERS if name.endswith("_tokens"))


def spend(
    ledger: SqlLedger, *, by: Sequence[str], since: datetime | None = None, until: datetime | None = None
) -> list[SpendLine]:
    """Sums of the requests that started in [since, until), both aware, grouped by the dimensions in `by`.

    With `day` among them the lines come in their keys' order, else the dearest first. Without a dimension there is one
    line, the total. Raises ValueError for a dimension that is unknown or named twice.
    """
    _check(by)
    groups = [DIMENSIONS[name].label(f"by_{name}") for name in by]
    query = sa.select(*groups, *_sums()).group_by(*groups)
    if since is not None:
        query = query.where(LEDGER.c.started_at >= since)
    if until is not None:
        query = query.where(LEDGER.c.started_at < until)
    with ledger.engine.connect() as connection:
        found = connection.execute(query).all()
    lines = [SpendLine(tuple(row[: len(by)]), *(int(number or 0) for number in row[len(by) :])) for row in found]
    return sorted(lines, key=_by_keys if "day" in by else _by_cost)


def _sums() -> list[sa.ColumnElement[Any]]:
    called = LEDGER.c.outcome != Outcome.REFUSED.value
    counts = {
        "requests": called,
        "refused": ~called,
        "estimated_requests": called & LEDGER.c.estimated,
        "unpriced_requests": called & (LEDGER.c.price_source == "unpriced"),
    }
    amounts = {
        "cost_nusd": LEDGER.c.cost_nusd,
        "estimated_cost_nusd": sa.case((LEDGER.c.estimated, LEDGER.c.cost_nusd)),
        **{name: LEDGER.c[name] for name in _TOKENS},
    }
    sums = {name: sa.func.sum(sa.case((condition, 1), else_=0)) for name, condition in counts.items()}
    sums |= {name: sa.func.sum(column) for name, column in amounts.items()}
    return [sums[name].label(name) for name in _NUMBERS]


def _by_keys(line: SpendLine) -> tuple[tuple[bool, str], ...]:
    return tuple((key is None, key or "") for key in line.keys)


def _by_cost(line: SpendLine) -> tuple[Any, ...]:
    return (-line.cost_nusd, -line.requests, -line.refused, _by_keys(line))


def total(lines: Iterable[SpendLine]) -> SpendLine:
    """The sum of all lines, without keys."""
    numbers = dict.fromkeys(_NUMBERS, 0)
    for line in lines:
        for name in _NUMBERS:
            numbers[name] += getattr(line, name)
    return SpendLine((), **numbers)


def parse_by(text: str) -> tuple[str, ...]:
    """The dimensions in `team,model`. Raises ValueError, with what is known, for any other word."""
    by = tuple(name.strip() for name in text.split(","))
    _check(by)
    return by


def _check(by: Sequence[str]) -> None:
    if unknown := [name for name in by if name not in DIMENSIONS]:
        raise ValueError(f"cannot group by {', '.join(map(repr, unknown))}; known: {', '.join(DIMENSIONS)}")
    if len(set(by)) < len(by):
        raise ValueError(f"a dimension is named twice: {', '.join(by)}")


_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def parse_since(text: str, *, now: datetime) -> datetime:
    """`7d`, `24h`, `30m` before `now` (aware), or an ISO date or time (UTC when it names no zone), as aware UTC.

    Raises ValueError with a message for the person who typed it.
    """
    mistake = f"{text!r} is no time: write 7d, 24h, 30m, 2026-11-24 or 2026-11-24T08:00"
    try:
        if match := re.fullmatch(r"([0-9]{1,9})([mhd])", text.strip()):
            return (now - timedelta(**{_UNITS[match[2]]: int(match[1])})).astimezone(UTC)
        moment = datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(mistake) from None


def usd(amount_nusd: int, decimals: int = 9) -> str:
    """Nano-USD as plain decimal USD, rounded half up to `decimals` (at most 9) places: never an exponent."""
    unit = 10 ** (9 - decimals)
    whole, part = divmod((2 * amount_nusd + unit) // (2 * unit), 10**decimals)
    return f"{whole}.{part:0{decimals}d}" if decimals else str(whole)


def render_json(
    lines: Sequence[SpendLine], *, by: Sequence[str], since: datetime | None = None, until: datetime | None = None
) -> str:
    """One JSON document: the question, `lines` with a member for each dimension, and `total`. `cost_usd` is a string,
    exact; `cost_nusd` the same as an integer."""

    def document(line: SpendLine) -> dict[str, object]:
        numbers = {name: number for name, number in asdict(line).items() if name != "keys"}
        money = {"cost_usd": usd(line.cost_nusd), "estimated_cost_usd": usd(line.estimated_cost_nusd)}
        return {**dict(zip(by, line.keys, strict=False)), **numbers, **money}

    answer = {
        "by": list(by),
        "since": since.isoformat() if since else None,
        "until": until.isoformat() if until else None,
        "lines": [document(line) for line in lines],
        "total": document(total(lines)),
    }
    return json.dumps(answer, indent=2)


def render_csv(lines: Sequence[SpendLine], *, by: Sequence[str]) -> str:
    """A header and a line a group, no total, so that a column can be summed. Costs are exact USD."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [name.replace("_nusd", "_usd") for name in _NUMBERS]
    writer.writerow([*by, *columns])
    for line in lines:
        numbers = [getattr(line, name) for name in _NUMBERS]
        values = [usd(n) if name.endswith("_nusd") else n for name, n in zip(_NUMBERS, numbers, strict=True)]
        writer.writerow([*map(_csv_text, line.keys), *values])
    return out.getvalue()


def _csv_text(value: str | None) -> str:
    """Text that a spreadsheet does not run as a formula (OWASP: CSV injection); the client chooses some of it."""
    text = "" if value is None else _printable(value)
    return f"'{text}" if text.lstrip()[:1] in {"=", "+", "-", "@"} else text


def render_table(lines: Sequence[SpendLine], *, by: Sequence[str], width: int = 80) -> Table:
    """A table for a terminal of `width` columns, with a total; columns that hold nothing but zeros are left out.

    When that is too wide, large counts are shortened (9.9G) and cached tokens left out.
    """
    table = _table(lines, by, compact=False)
    console = Console(width=10_000)
    if Measurement.get(console, console.options, table).maximum <= width:
        return table
    return _table(lines, by, compact=True)


def _table(lines: Sequence[SpendLine], by: Sequence[str], *, compact: bool) -> Table:
    summed, decimals = total(lines), _decimals(lines)
    shown = [column for column in _COLUMNS if column.always or getattr(summed, column.name)]
    if compact:
        shown = [column for column in shown if column.name != "cached_tokens"]
    table = Table(show_footer=True, pad_edge=False, box=None, header_style="bold", footer_style="bold")
    for number, name in enumerate(by):
        table.add_column(name.capitalize(), footer="" if number else "Total", overflow="fold", min_width=6)
    for column in shown:
        footer = column.text(summed, decimals, compact=compact)
        table.add_column(column.title, footer=footer, justify="right", no_wrap=True)
    for line in lines:
        numbers = (column.text(line, decimals, compact=compact) for column in shown)
        table.add_row(*(Text(NOTHING if key is None else _printable(key)) for key in line.keys), *numbers)
    table.caption = _caption(summed, decimals)
    table.caption_justify = "left"
    return table


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    name: str
    always: bool = False

    def text(self, line: SpendLine, decimals: int, *, compact: bool) -> str:
        number: int = getattr(line, self.name)
        if self.name.endswith("_nusd"):
            return usd(number, decimals)
        return _short(number) if compact else f"{number:,}"


_COLUMNS = (
    _Column("Requests", "requests", always=True),
    _Column("Refused", "refused"),
    _Column("Input", "input_tokens", always=True),
    _Column("Cached", "cached_tokens"),
    _Column("Output", "output_tokens", always=True),
    _Column("USD", "cost_nusd", always=True),
    _Column("Unpriced", "unpriced_requests"),
)


def _caption(summed: SpendLine, decimals: int) -> Text | None:
    notes = []
    if (estimated := summed.estimated_requests) > 0:
        amount = usd(summed.estimated_cost_nusd, decimals)
        verb = "request is" if estimated == 1 else "requests are"
        notes.append(f"{estimated:,} {verb} charged by estimate, {amount} USD of the total.")
    if (unpriced := summed.unpriced_requests) > 0:
        verbs = ("request has", "is") if unpriced == 1 else ("requests have", "are")
        notes.append(f"{unpriced:,} {verbs[0]} no known price and {verbs[1]} not in USD: add it to prices:")
    return Text("\n".join(notes)) if notes else None


def _decimals(lines: Sequence[SpendLine]) -> int:
    """Places for the whole column, so that points stand under each other and the smallest cost keeps two digits."""
    smallest = min((line.cost_nusd for line in lines if line.cost_nusd), default=10**9)
    return min(9, max(2, 11 - len(str(smallest))))


def _short(number: int) -> str:
    """12,345 as 12.3k: at most five characters up to 999 billion."""
    size, unit = float(number), ""
    for following in ("k", "M", "G", "T"):
        if size < 999.5:
            break
        size, unit = size / 1000, following
    return f"{size:.1f}{unit}" if unit and size < 99.95 else f"{size:.0f}{unit}"


def _printable(text: str) -> str:
    """Text that cannot steer the terminal: clients choose model names, and an escape sequence is a legal one."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
