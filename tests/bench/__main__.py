"""`python -m tests.bench`: run the cases, show the table, write docs/performance.md and, on request, JSON."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tests.bench import report
from tests.bench.cases import CASES, FULL, QUICK, WHOLE, Bench, Row, as_json, bench
from tests.bench.processes import allow_many_files
from tests.gateway import Gateway

_LEDGER_WAIT_S = 15.0


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Short rounds; writes no document.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(CASES)}; may be repeated.")] = None,
    concurrency: Annotated[int, typer.Option(help="Worker threads of each Envoy.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
    document: Annotated[bool, typer.Option(help="Write docs/performance.md (a whole, long run only).")] = True,
) -> None:
    """Measure the gateway against bare Envoy in the same run."""
    unknown = set(only or ()) - set(CASES)
    if unknown:
        raise typer.BadParameter(f"no case is called {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    allow_many_files()
    console = Console(width=None if Console().is_terminal else 180)
    about = report.machine()
    rows: list[Row] = []
    with bench(QUICK if quick else FULL, concurrency) as (made, running):
        for name in only or CASES:
            console.print(f"[dim]{name} ...")
            rows += CASES[name](made)
        remarks = [report.outcomes_remark(made.outcomes), _ledger_remark(made, running)]
    table = [report.cells(row) for row in rows]
    report.show(console, table)
    for remark in remarks:
        console.print(remark, markup=False)
    if json_file is not None:
        written = {"about": about, "rows": [as_json(row) for row in rows], "remarks": remarks}
        json_file.write_text(json.dumps(written, indent=1) + "\n")
    if document and not quick and not only:
        report.write("bench", report.section(about, report.markdown(table), remarks))


def _ledger_remark(made: Bench, running: Gateway) -> str:
    """That the whole path was measured: how many requests the ledger holds of those that went to this gateway."""
    expected = made.outcomes.completed[WHOLE]
    deadline = time.monotonic() + _LEDGER_WAIT_S
    while (held := _rows(running)) < expected and time.monotonic() < deadline:
        time.sleep(0.2)
    return f"The gateway answered {expected:,} requests; its ledger holds {held:,} of them."


def _rows(running: Gateway) -> int:
    with closing(sqlite3.connect(f"file:{running.folder / 'ledger.db'}?mode=ro", uri=True)) as connection:
        count: int = connection.execute("select count(*) from ledger ").fetchone()[0]
        return count


if __name__ == "__main__":
    typer.run(main)
