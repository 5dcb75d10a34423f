"""What Envoy tells of an exchange in words and loose fields, made into record's own values.

Shared by the two ways in which record hears of a request: the gRPC access log (`server.accesslog`) and the journal
(`record.journal`). The surprising thing: how an exchange ended is nowhere a field; it is read from Envoy's details.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from extproc.catalog import Usage
from extproc.record.finished import AttemptMade, Ending

UsageTold = tuple[Usage | None, bool, str]
"""Usage, whether it is whole, and the model that the provider named."""


def ending_of(details: str, status: int) -> Ending:
    """How an exchange ended, by Envoy's response code details (docs: HTTP response code details)."""
    if details.startswith(("upstream_reset_after_response_started", "downstream_local_disconnect")):
        return Ending.BROKEN
    if details.startswith(("downstream_", "http2.remote_")):
        return Ending.CLIENT_LEFT
    if status < 400 and ("timeout" in details or "max_duration" in details):
        return Ending.BROKEN
    return Ending.WHOLE


def attempts_of(fields: Mapping[str, Any]) -> tuple[AttemptMade, ...]:
    """The attempts that the clusters' Lua filter noted, in order."""
    made: list[AttemptMade] = []
    for number in range(1, int(fields.get("n", 0)) + 1):
        status = fields.get(f"s{number}")
        wait_s = _retry_after_s(str(fields.get(f"r{number}", "")))
        made.append(AttemptMade(str(fields.get(f"p{number}", "")), int(status) if status else None, wait_s))
    return tuple(made)


def _retry_after_s(text: str) -> float | None:
    """Seconds from now of a Retry-After (RFC 9110 section 10.2.3: seconds, or a date); None for anything else."""
    if text.isdecimal():
        return float(text[:6])
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


_COUNTS = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")


def usage_noted(fields: Mapping[str, Any], *, streamed: bool) -> UsageTold:
    """Usage as json_to_metadata and Lua noted it field by field."""
    counts = {name: int(fields[name]) for name in _COUNTS if type(fields.get(name)) in (int, float)}
    # json_to_metadata copies an answer that is whole; Lua says of a stream whether its last word was heard.
    whole = bool(counts) and (not streamed or fields.get("whole") is True)
    return (Usage(**counts) if counts else None), whole, str(fields.get("model") or "")
