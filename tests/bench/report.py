"""Where results go: a table on the screen, JSON for machines, and the sections between markers in docs/performance.md.

The surprising thing: the text of docs/performance.md outside the markers is a person's; a run replaces its own section
and touches no other.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.cases import Row
from tests.bench.rounds import Outcomes
from tests.bench.targets import envoy_version

DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"


def machine() -> dict[str, str]:
    """What the figures were taken on, and when. It names no host."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": _processor(),
        "load before": _load_average(),
        "Python": platform.python_version(),
        "Envoy": envoy_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _load_average() -> str:
    return f"{os.getloadavg()[0]:.2f}"


HEADERS = ("case", "figure", "bare Envoy", "here", "ratio (lowest-highest round)", "of it", "aim")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    divided = ", ".join(f"{role} {_number(size)}" for role, size in (row.parts or {}).items())
    return (
        row.case,
        row.figure,
        "" if row.bare is None else f"{_number(row.bare)} {row.unit}",
        f"{_number(row.value)} {row.unit}",
        "" if row.ratio is None else str(row.ratio),
        divided,
        row.aim,
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def show(console: Console, rows: Sequence[Sequence[str]], headers: Sequence[str] = HEADERS) -> None:
    """The table on the screen."""
    table = Table(*headers)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(rows: Sequence[Sequence[str]], headers: Sequence[str] = HEADERS) -> str:
    """The same table for a document."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(each.replace("|", "\\|") for each in line) + " |" for line in lines)


def section(about: Mapping[str, str], table: str, remarks: Sequence[str] = ()) -> str:
    """Machine, table and remarks, as they stand between the markers."""
    facts = "; ".join(f"{name}: {value}" for name, value in about.items())
    return "\n\n".join([facts, table, *remarks])


def outcomes_remark(outcomes: Outcomes) -> str:
    """How many requests were sent, and what became of those that failed."""
    told = "".join(f" {target}: `{what[:160]}`." for target, what in outcomes.seen.items())
    return f"{outcomes.sent:,} requests were sent; {outcomes.failed:,} failed.{told}"


def write(name: str, text: str, document: Path = DOCUMENT) -> None:
    """Replace the section `name` of the document. Raises ValueError where it has no such markers."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = document.read_text(encoding="utf-8")
    before, found, rest = content.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{document} has no markers {begin} and {end}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
