"""One way to write a ledger row in a test: an answered request, but for what the test is about."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from extproc.record.ledger import LedgerRow, Outcome


def make_row(request_id: str = "r1", **values: Any) -> LedgerRow:
    defaults: dict[str, Any] = {
        "started_at": datetime(2026, 11, 24, 8, 0, tzinfo=UTC),
        "status": 200,
        "outcome": Outcome.OK,
        "attempts": 1,
        "duration_s": 0.5,
        "stream": False,
        "estimated": False,
        "request_bytes": 10,
        "response_bytes": 20,
    }
    return LedgerRow(request_id=request_id, **(defaults | values))
