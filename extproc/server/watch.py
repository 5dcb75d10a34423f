"""One short line for each finished request: how workers tell the supervisor's screen and metrics what passed.

Written by a worker to its standard output, read by the process that started it. The surprising thing: it carries the
ledger's facts and no other, so what a person sees on the screen is what will be billed.
"""

from __future__ import annotations

import msgspec

from extproc.record.ledger import LedgerRow


class Passed(msgspec.Struct, frozen=True, omit_defaults=True):
    """One finished request. Times in milliseconds, cost in nano-USD (None: unpriced or nothing used)."""

    request_id: str
    status: int
    outcome: str
    duration_ms: float
    first_byte_ms: float | None = None
    team: str | None = None
    key_id: str | None = None
    endpoint: str | None = None
    alias: str | None = None
    provider: str | None = None
    model: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost_nusd: int | None = None
    unpriced: bool = False
    estimated: bool = False
    stream: bool = False
    attempts: int = 0
    tried: str = ""
    code: str | None = None


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Passed)


def line_of(row: LedgerRow) -> bytes:
    """The line, with its end."""
    usage = row.usage
    passed = Passed(
        request_id=row.request_id,
        status=row.status,
        outcome=row.outcome.value,
        duration_ms=round(row.duration_s * 1000, 1),
        first_byte_ms=None if row.first_byte_s is None else round(row.first_byte_s * 1000, 1),
        team=row.team,
        key_id=row.key_id,
        endpoint=row.endpoint,
        alias=row.alias,
        provider=row.provider,
        model=row.model_asked,
        input_tokens=usage.input_tokens if usage else 0,
        output_tokens=usage.output_tokens if usage else 0,
        cost_nusd=row.cost_nusd,
        unpriced=row.price_source == "unpriced",
        estimated=row.estimated,
        stream=row.stream,
        attempts=row.attempts,
        tried=row.tried or "",
        code=row.code,
    )
    return _ENCODER.encode(passed) + b"\n"


def passed_of(line: bytes) -> Passed | None:
    """What `line_of` wrote, or None for anything else that a worker may print."""
    try:
        return _DECODER.decode(line)
    except msgspec.MsgspecError:
        return None
