"""The journal: the second record of each finished request, which Envoy writes to a file by itself.

Beside the gRPC access log, for what that loses: entries that a worker had taken and not yet written when it died, or
that came while no worker lived. The surprising thing: in good times nobody reads it. It is read after a worker has died
and when a gateway starts after a crash, and since the request id is the ledger's key, reading too much is harmless.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from extproc.catalog import Usage
from extproc.decision import ATTEMPTS_NAMESPACE, NAMESPACE, USAGE_NAMESPACE, WHOLE_FIELD, decision_of
from extproc.record.finished import Finished
from extproc.record.told import UsageTold, attempts_of, ending_of, usage_noted

_REPORTED = "metadata.typed_filter_metadata['envoy.ai.token_usage']"


def _counted(path: str) -> str:
    return f"%CEL({_REPORTED}.{path})%"


FORMAT: dict[str, str] = {
    "id": "%STREAM_ID%",
    "told_id": "%RESP(X-REQUEST-ID)%",
    "at": "%START_TIME%",
    "status": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "decision": f"%DYNAMIC_METADATA({NAMESPACE}:{WHOLE_FIELD})%",
    "attempts": f"%DYNAMIC_METADATA({ATTEMPTS_NAMESPACE})%",
    "noted": f"%DYNAMIC_METADATA({USAGE_NAMESPACE})%",
    "model": _counted("model"),
    "whole": _counted("extraction_status"),
    "input_tokens": _counted("input_tokens"),
    "output_tokens": _counted("output_tokens"),
    "cached_tokens": _counted("input_token_details.cached_tokens"),
    "cache_write_tokens": _counted("input_token_details.cache_creation_tokens"),
    "reasoning_tokens": _counted("output_token_details.reasoning_tokens"),
    "sent_ms": "%COMMON_DURATION(DS_RX_BEG:US_TX_END:ms)%",
    "first_byte_ms": "%COMMON_DURATION(DS_RX_BEG:DS_TX_BEG:ms)%",
    "duration_ms": "%DURATION%",
    "request_bytes": "%BYTES_RECEIVED%",
    "response_bytes": "%BYTES_SENT%",
}
"""What render gives Envoy's file logger as its JSON format, field by field; `Entry` reads it back."""


class Entry(msgspec.Struct, frozen=True):
    """One line. Envoy writes numbers of its own as numbers, those that CEL finds as text, and null where none is."""

    status: int
    details: str | None
    at: datetime
    request_bytes: int
    response_bytes: int
    id: str | None = None
    told_id: str | None = None
    decision: str | None = None
    attempts: dict[str, Any] | None = None
    noted: dict[str, Any] | None = None
    model: str | None = None
    whole: str | int | None = None
    input_tokens: str | int | None = None
    output_tokens: str | int | None = None
    cached_tokens: str | int | None = None
    cache_write_tokens: str | int | None = None
    reasoning_tokens: str | int | None = None
    sent_ms: str | int | None = None
    first_byte_ms: str | int | None = None
    duration_ms: int | None = None


_DECODE = msgspec.json.Decoder(Entry).decode
_COMPLETE = frozenset(("0", "1", "COMPLETE", "EXTRACTION_STATUS_UNSPECIFIED"))


def read_journal(file: Path) -> Iterator[Finished]:
    """The requests in `file`, as the access log would have told them. Lines that say too little are passed over."""
    with file.open("rb") as lines:
        for line in lines:
            finished = finished_of(line)
            if finished is not None:
                yield finished


def finished_of(line: bytes) -> Finished | None:
    """One line, or None where it is cut short or names no request."""
    try:
        entry = _DECODE(line)
        decision = decision_of(entry.decision) if entry.decision else None
    except msgspec.MsgspecError:
        return None
    request_id = (decision and decision.request_id) or entry.id or entry.told_id
    if not request_id:
        return None
    attempts = entry.attempts or {}
    usage, whole, model = _usage(entry, streamed=decision is not None and decision.stream)
    return Finished(
        request_id=request_id,
        started_at=entry.at,
        status=entry.status,
        ending=ending_of(entry.details or "", entry.status),
        decision=decision,
        attempts=attempts_of(attempts),
        code=str(attempts.get("code", "")),
        usage=usage,
        usage_whole=whole,
        model_returned=model,
        sent_upstream=entry.sent_ms is not None,
        first_byte_s=None if entry.first_byte_ms is None else int(entry.first_byte_ms) / 1000,
        duration_s=(entry.duration_ms or 0) / 1000,
        request_bytes=entry.request_bytes,
        response_bytes=entry.response_bytes,
    )


def _usage(entry: Entry, *, streamed: bool) -> UsageTold:
    """As `server.accesslog` has it: what the AI filter published whole comes first, then what was noted."""
    published: UsageTold | None = None
    if entry.input_tokens is not None or entry.output_tokens is not None:
        usage = Usage(
            input_tokens=int(entry.input_tokens or 0),
            output_tokens=int(entry.output_tokens or 0),
            cached_tokens=int(entry.cached_tokens or 0),
            cache_write_tokens=int(entry.cache_write_tokens or 0),
            reasoning_tokens=int(entry.reasoning_tokens or 0),
        )
        published = (usage, str(entry.whole) in _COMPLETE, entry.model or "")
        if published[1]:
            return published
    if entry.noted:
        return usage_noted(entry.noted, streamed=streamed)
    return published or (None, False, "")
