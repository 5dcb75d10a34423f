"""The access-log session: entries as Envoy sends them to `Finished`, one bad entry among good ones, one entry twice.

The surprising thing: Envoy may send a batch again when its stream broke before it knew of the end. The ledger's key
makes that one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from envoy.data.accesslog.v3.accesslog_pb2 import HTTPAccessLogEntry
from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage
from google.protobuf.struct_pb2 import Struct

from extproc.catalog import Usage
from extproc.config.snapshot import Snapshot
from extproc.config.source import parse
from extproc.decide.estimate import LearnedRatios
from extproc.decision import ATTEMPTS_NAMESPACE, NAMESPACE, USAGE_NAMESPACE, Decision
from extproc.errors import Dialect
from extproc.record.finished import AttemptMade, Ending, Finished
from extproc.record.pipeline import row_of
from extproc.record.told import ending_of
from extproc.server.accesslog import AI_USAGE, AccessLogSession, finished_of
from extproc.server.pb.envoy_ai_pb2 import TokenUsage
from extproc.stores.sql import LEDGER, SqlLedger, open_ledger

DECISION = Decision(
    dialect=Dialect.OPENAI, endpoint="chat", request_id="r1", path="/v1/x", providers=("a",), models=("m",), stream=True
)


def entry(
    *,
    decision: Decision | None = DECISION,
    attempts: dict[str, Any] | None = None,
    noted: dict[str, Any] | None = None,
    told: TokenUsage | None = None,
    details: str = "via_upstream",
    status: int = 200,
) -> Any:
    made = HTTPAccessLogEntry()
    common = made.common_properties
    common.start_time.FromJsonString("2026-11-24T08:00:00.25Z")
    common.duration.FromMilliseconds(1500)
    common.time_to_first_downstream_tx_byte.FromMilliseconds(250)
    common.time_to_last_upstream_tx_byte.FromMilliseconds(20)
    made.request.request_id = "envoys-own"
    made.request.request_body_bytes = 40
    made.response.response_code.value = status
    made.response.response_code_details = details
    made.response.response_body_bytes = 50
    spaces = common.metadata.filter_metadata
    if decision is not None:
        _put(spaces[NAMESPACE], {name: value for name, value in decision.to_metadata().items() if value != ("m",)})
    _put(spaces[ATTEMPTS_NAMESPACE], {"n": 1, "p1": "a", "s1": "200"} if attempts is None else attempts)
    if noted is not None:
        _put(spaces[USAGE_NAMESPACE], noted)
    if told is not None:
        common.metadata.typed_filter_metadata[AI_USAGE].value = told.SerializeToString()
    return made


def _put(struct: Struct, fields: dict[str, Any]) -> None:
    struct.update(fields)


def _told(status: int = TokenUsage.COMPLETE) -> TokenUsage:
    told = TokenUsage(model="m-1", extraction_status=status)  # type: ignore[arg-type]
    told.input_tokens.value, told.output_tokens.value = 50, 40
    told.input_token_details.cached_tokens.value = 20
    told.input_token_details.cache_creation_tokens.value = 10
    told.output_token_details.reasoning_tokens.value = 5
    return told


NOTED = {"input_tokens": 50, "output_tokens": 40, "cached_tokens": 20, "cache_write_tokens": 10, "model": "m-1"}


def test_an_entry_is_read_whole() -> None:
    attempts = {"n": 2, "p1": "a", "r1": "7", "s1": "429", "p2": "b", "s2": "200", "code": ""}
    finished = finished_of(entry(attempts=attempts, told=_told()))
    assert (finished.request_id, finished.status, finished.ending) == ("r1", 200, Ending.WHOLE)
    assert finished.started_at.isoformat() == "2026-11-24T08:00:00.250000+00:00"
    assert finished.decision == DECISION
    assert finished.attempts == (AttemptMade("a", 429, 7.0), AttemptMade("b", 200, None))
    assert (finished.usage, finished.usage_whole, finished.model_returned) == (Usage(50, 40, 20, 10, 5), True, "m-1")
    assert (finished.first_byte_s, finished.duration_s, finished.sent_upstream) == (0.25, 1.5, True)
    assert (finished.request_bytes, finished.response_bytes) == (40, 50)


def test_a_request_refused_before_decide_has_envoys_id() -> None:
    finished = finished_of(entry(decision=None, attempts={}, status=400))
    assert (finished.request_id, finished.decision, finished.attempts) == ("envoys-own", None, ())


@pytest.mark.parametrize(
    ("told", "noted", "stream", "usage", "whole"),
    [
        (None, None, True, None, False),
        (_told(), None, True, Usage(50, 40, 20, 10, 5), True),
        (_told(), {**NOTED, "output_tokens": 1}, True, Usage(50, 40, 20, 10, 5), True),
        (None, {**NOTED, "whole": True}, True, Usage(50, 40, 20, 10), True),
        (None, NOTED, True, Usage(50, 40, 20, 10), False),
        (None, NOTED, False, Usage(50, 40, 20, 10), True),
        (_told(TokenUsage.PARTIAL), None, True, Usage(50, 40, 20, 10, 5), False),
        (_told(TokenUsage.PARTIAL), {**NOTED, "whole": True}, True, Usage(50, 40, 20, 10), True),
        (TokenUsage(extraction_status=TokenUsage.COMPLETE), None, True, None, False),
        (None, {"model": "m-1"}, False, None, False),
        (None, {"input_tokens": "many", "output_tokens": True}, False, None, False),
    ],
)
def test_the_filter_that_heard_most_is_believed(
    told: TokenUsage | None, noted: dict[str, Any] | None, stream: bool, usage: Usage | None, whole: bool
) -> None:
    decision = Decision(dialect=Dialect.OPENAI, endpoint="chat", request_id="r1", path="/v1/x", stream=stream)
    finished = finished_of(entry(decision=decision, told=told, noted=noted))
    assert (finished.usage, finished.usage_whole) == (usage, whole)


@pytest.mark.parametrize(
    ("details", "status", "ending"),
    [
        ("via_upstream", 200, Ending.WHOLE),
        ("", 503, Ending.WHOLE),
        ("extproc:models", 200, Ending.WHOLE),
        ("upstream_reset_before_response_started{connection_termination}", 503, Ending.WHOLE),
        ("upstream_reset_before_response_started{remote_reset}", 503, Ending.WHOLE),
        ("upstream_per_try_timeout", 504, Ending.WHOLE),
        ("upstream_reset_after_response_started{connection_termination}", 200, Ending.BROKEN),
        ("upstream_reset_after_response_started{remote_reset}", 200, Ending.BROKEN),
        ("stream_idle_timeout", 200, Ending.BROKEN),
        ("downstream_local_disconnect(transport_socket_timeout)", 200, Ending.BROKEN),
        ("downstream_remote_disconnect", 0, Ending.CLIENT_LEFT),
        ("downstream_remote_disconnect", 200, Ending.CLIENT_LEFT),
        ("http2.remote_reset", 200, Ending.CLIENT_LEFT),
        ("http2.remote_refuse", 200, Ending.CLIENT_LEFT),
    ],
)
def test_an_ending_is_read_off_the_details(details: str, status: int, ending: Ending) -> None:
    assert ending_of(details, status) is ending


def _message(*entries: Any) -> bytes:
    message = StreamAccessLogsMessage()
    message.http_logs.log_entry.extend(entries)
    encoded: bytes = message.SerializeToString()
    return encoded


def test_an_entry_that_can_not_be_read_does_not_take_the_others_with_it() -> None:
    seen: list[Finished] = []
    session = AccessLogSession(seen.append)
    broken = entry(decision=None)
    _put(broken.common_properties.metadata.filter_metadata[NAMESPACE], {"decision": "no JSON"})
    assert session.receive(_message(entry(), broken, entry(decision=None))) == ()
    assert [finished.request_id for finished in seen] == ["r1", "envoys-own"]


def test_a_record_that_fails_does_not_end_the_session() -> None:
    calls: list[str] = []

    def record(finished: Finished) -> None:
        calls.append(finished.request_id)
        raise RuntimeError("full")

    session = AccessLogSession(record)
    session.receive(_message(entry(), entry()))
    assert calls == ["r1", "r1"]
    assert session.finish()[0] == b""


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[SqlLedger]:
    with closing(open_ledger("sqlite:///ledger.db", tmp_path)) as opened:
        yield opened


def test_an_entry_that_comes_twice_is_one_row(ledger: SqlLedger) -> None:
    config = b'{"providers": {"a": {"kind": "demo"}}, "models": {"m": {"targets": [{"provider": "a"}]}}}'
    snapshot = parse(config, path=Path("/nowhere/gateway.yaml"), environ={}, require_secrets=True)
    assert isinstance(snapshot, Snapshot)
    ratios = LearnedRatios()
    new: list[int] = []
    message = _message(entry(told=_told()), entry(told=_told()))
    for _ in range(2):
        session = AccessLogSession(lambda it: new.append(ledger.write([row_of(it, snapshot, ratios)])))
        session.receive(message)
    assert new == [1, 0, 0, 0]
    with ledger.engine.connect() as connection:
        assert connection.execute(sa.select(LEDGER.c.request_id, LEDGER.c.input_tokens)).all() == [("r1", 50)]
