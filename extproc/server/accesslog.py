"""The access-log service: Envoy's batches of finished requests become `Finished` values for record.

At the edge, on the way out. The surprising thing: Envoy never asks for an answer, so nothing here may fail loudly. An
entry that can not be read is logged with its request id and skipped; the stream goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage, StreamAccessLogsResponse

from extproc.catalog import Usage
from extproc.decision import ATTEMPTS_NAMESPACE, NAMESPACE, USAGE_NAMESPACE
from extproc.record.finished import Finished
from extproc.record.told import UsageTold, attempts_of, ending_of, usage_noted
from extproc.server.envoy import read_decision, read_struct
from extproc.server.pb.envoy_ai_pb2 import TokenUsage
from extproc.server.transport import Metadata, Method, Replies, Session, Shape

PATH = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
AI_USAGE = "envoy.ai.token_usage"

_log = logging.getLogger(__name__)


def method(record: Callable[[Finished], None]) -> Method:
    """The access-log method; `record` is called once for each entry and must not block."""

    def begin(_: Metadata) -> Session:
        return AccessLogSession(record)

    return Method(PATH, Shape.CLIENT_STREAM, begin)


class AccessLogSession:
    """One Envoy worker thread's stream of entries."""

    __slots__ = ("_record",)
    done = False

    def __init__(self, record: Callable[[Finished], None]) -> None:
        self._record = record

    def receive(self, message: bytes) -> Replies:
        for entry in StreamAccessLogsMessage.FromString(message).http_logs.log_entry:
            try:
                self._record(finished_of(entry))
            except Exception:
                _log.exception("access-log entry %s was not recorded", entry.request.request_id)
        return ()

    def finish(self) -> Replies:
        return (StreamAccessLogsResponse().SerializeToString(),)


def finished_of(entry: Any) -> Finished:
    """One HTTPAccessLogEntry, read."""
    common, response = entry.common_properties, entry.response
    spaces = common.metadata.filter_metadata
    attempts = read_struct(spaces[ATTEMPTS_NAMESPACE]) if ATTEMPTS_NAMESPACE in spaces else {}
    decision = read_decision(spaces[NAMESPACE]) if NAMESPACE in spaces else None
    usage, whole, model = _usage(common.metadata, streamed=decision is not None and decision.stream)
    return Finished(
        request_id=(decision and decision.request_id) or _request_id(entry),
        started_at=common.start_time.ToDatetime(tzinfo=UTC) if common.HasField("start_time") else datetime.now(UTC),
        status=response.response_code.value,
        ending=ending_of(response.response_code_details, response.response_code.value),
        decision=decision,
        attempts=attempts_of(attempts),
        code=str(attempts.get("code", "")),
        usage=usage,
        usage_whole=whole,
        model_returned=model,
        sent_upstream=common.HasField("time_to_last_upstream_tx_byte"),
        first_byte_s=_seconds(common, "time_to_first_downstream_tx_byte"),
        duration_s=_seconds(common, "duration") or _seconds(common, "time_to_last_downstream_tx_byte") or 0.0,
        request_bytes=entry.request.request_body_bytes,
        response_bytes=response.response_body_bytes,
    )


def _request_id(entry: Any) -> str:
    """Envoy's id; else the one its own refusal told the client; else, where no one was answered, a new one."""
    answered = entry.response.response_headers
    return entry.request.request_id or entry.common_properties.stream_id or answered.get("x-request-id") or str(uuid4())


def _usage(metadata: Any, *, streamed: bool) -> UsageTold:
    """Usage, whether it is whole, and the model that the provider named.

    What Envoy's AI filter publishes at a clean end comes first; what the other filters noted holds where it heard less.
    """
    published = _published(metadata.typed_filter_metadata)
    if published is not None and published[1]:
        return published
    noted = _noted(metadata.filter_metadata, streamed=streamed)
    return noted or published or (None, False, "")


def _published(typed: Any) -> UsageTold | None:
    if AI_USAGE not in typed:
        return None
    found = TokenUsage.FromString(typed[AI_USAGE].value)
    if not (found.HasField("input_tokens") or found.HasField("output_tokens")):
        return None
    usage = Usage(
        input_tokens=found.input_tokens.value,
        output_tokens=found.output_tokens.value,
        cached_tokens=found.input_token_details.cached_tokens.value,
        cache_write_tokens=found.input_token_details.cache_creation_tokens.value,
        reasoning_tokens=found.output_token_details.reasoning_tokens.value,
    )
    whole = found.extraction_status in (TokenUsage.COMPLETE, TokenUsage.EXTRACTION_STATUS_UNSPECIFIED)
    return usage, whole, found.model


def _noted(spaces: Any, *, streamed: bool) -> UsageTold | None:
    return usage_noted(read_struct(spaces[USAGE_NAMESPACE]), streamed=streamed) if USAGE_NAMESPACE in spaces else None


def _seconds(common: Any, name: str) -> float | None:
    if not common.HasField(name):
        return None
    duration = getattr(common, name)
    seconds: float = duration.seconds + duration.nanos / 1e9
    return seconds
