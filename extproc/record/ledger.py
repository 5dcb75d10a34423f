"""The ledger's row and what record asks of a ledger: the last step of a request's path, one row for each request id.

Pure values; the SQL lives in `stores.sql`, the queue in front of it in `record.writer`. The surprising thing: a row is
made storable before it is written, because a provider chooses some of its text and numbers, and one row that a database
refuses (a NUL, a lone surrogate, 10^30 tokens) would hold up all that follow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from extproc.catalog import Usage

MAX_TOKENS = 10**12
"""More tokens of a kind than any request has. Larger counts are stored as this."""
MAX_COST_NUSD = 10**15
"""One million USD in nano-USD, more than any request costs: sums over 9,000 such rows still fit 64 bits."""
MAX_BYTES = 2**53
MAX_ID_CHARS = 128
MAX_TEXT_CHARS = 512


class Outcome(StrEnum):
    """How a request ended. `refused`: by the gateway, so no provider was called; `failed`: by all providers or by one
    provider's error; `client_left` and `broken` (the stream stopped) are charged by estimate."""

    OK = "ok"
    REFUSED = "refused"
    FAILED = "failed"
    CLIENT_LEFT = "client_left"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """One finished request. None means not known or not applicable, never zero.

    `started_at` is aware, UTC. `alias` is the name that the client asked for, `provider` the one (as in gateway.yaml)
    that answered or was tried last, `model_asked` the name sent to it, `model_returned` the name it gave back. `tried`
    lists attempts and their statuses: "openai:503,azure:200". `code` is the refusal's. Times are seconds.
    """

    request_id: str
    started_at: datetime
    team: str | None = None
    project: str | None = None
    user: str | None = None
    agent: str | None = None
    key_id: str | None = None
    dialect: str | None = None
    endpoint: str | None = None
    alias: str | None = None
    provider: str | None = None
    model_asked: str | None = None
    model_returned: str | None = None
    usage: Usage | None = None
    cost_nusd: int | None = None
    price_source: str | None = None
    status: int
    code: str | None = None
    outcome: Outcome
    attempts: int
    tried: str | None = None
    first_byte_s: float | None = None
    duration_s: float
    stream: bool
    estimated: bool
    request_bytes: int
    response_bytes: int


class LedgerUnavailableError(Exception):
    """The ledger cannot be written now: away, full, locked. The same rows may be written later."""


class RowsRejectedError(Exception):
    """The ledger refuses at least one of the rows for what it holds. Trying again does not help."""


class Ledger(Protocol):
    """Where rows end up. Safe to call from any thread, one call at a time."""

    def write(self, rows: Sequence[LedgerRow]) -> int:
        """Stores all rows or none; returns how many were new (a repeated request id is one row, the first).

        Raises LedgerUnavailableError or RowsRejectedError.
        """
        ...


_TEXTS = tuple(field.name for field in fields(LedgerRow) if field.type == "str | None")


def storable(row: LedgerRow) -> LedgerRow:
    """The same row, with text that every database takes and numbers that 64 bits hold; itself when nothing changes."""
    changed: dict[str, object] = {}
    if (request_id := storable_id(row.request_id)) != row.request_id:
        changed["request_id"] = request_id
    for name in _TEXTS:
        text = getattr(row, name)
        if text is not None and (clean := _clean(text)[:MAX_TEXT_CHARS]) != text:
            changed[name] = clean
    if row.usage is not None and (usage := _bounded_usage(row.usage)) != row.usage:
        changed["usage"] = usage
    if row.cost_nusd is not None and row.cost_nusd > MAX_COST_NUSD:
        changed["cost_nusd"] = MAX_COST_NUSD
    for name in ("request_bytes", "response_bytes"):
        if (count := getattr(row, name)) != (bounded := min(max(count, 0), MAX_BYTES)):
            changed[name] = bounded
    return replace(row, **changed) if changed else row  # type: ignore[arg-type]


def storable_id(request_id: str) -> str:
    """A request id that fits an index. A longer one keeps its start and is told apart by its SHA-256."""
    clean = _clean(request_id)
    if len(clean) <= MAX_ID_CHARS:
        return clean
    digest = hashlib.sha256(clean.encode()).hexdigest()
    return f"{clean[: MAX_ID_CHARS - len(digest) - 1]}~{digest}"


def _clean(text: str) -> str:
    """Without NUL (PostgreSQL has none in text) and lone surrogates (no UTF-8): each becomes U+FFFD."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").replace("\0", "\ufffd")


def _bounded_usage(usage: Usage) -> Usage:
    return Usage(*(min(max(getattr(usage, field.name), 0), MAX_TOKENS) for field in fields(Usage)))
