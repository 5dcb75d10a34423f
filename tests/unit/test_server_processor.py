"""The ext_proc and access-log services as Envoy sees them: its own protobuf messages, through a real gRPC client.

Both transports serve the same sessions, so each fact here holds on both.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
from envoy.config.core.v3.base_pb2 import HeaderValue, Metadata
from envoy.data.accesslog.v3.accesslog_pb2 import HTTPAccessLogEntry
from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage, StreamAccessLogsResponse
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse

from extproc.decide.pipeline import Decider, InputTokens
from extproc.decision import ATTEMPTS_NAMESPACE, NAMESPACE, ROUTE_NAMESPACE, Decision
from extproc.dialects.endpoints import Endpoint
from extproc.errors import Dialect
from extproc.record.finished import AttemptMade, Finished
from extproc.server import accesslog, processor
from extproc.server.grpc_aio import GrpcAioTransport
from extproc.server.ngh2_transport import Ngh2Transport
from tests.deciding import ALL, SNAPSHOT, FixedMeter

MAX_BODY_BYTES = 100_000
Call = Callable[..., Any]


class BrokenMeter:
    """Fails on every prompt."""

    async def measure(self, endpoint: Endpoint, key_id: str, model: str, body: bytes) -> InputTokens:
        raise RuntimeError(f"a bug with {body!r} in its words")


class Service:
    """A running service, a channel to it, and what it recorded."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.recorded: list[Finished] = []
        self.meter: FixedMeter | BrokenMeter = FixedMeter()
        self._channel = channel
        self.refuse_entry = ""

    def decider(self) -> Decider:
        return Decider(SNAPSHOT, self.meter, Random(0))

    def record(self, finished: Finished) -> None:
        if finished.request_id == self.refuse_entry:
            raise RuntimeError("a bug on this entry")
        self.recorded.append(finished)

    def process(self, **metadata: str) -> Any:
        """One ext_proc stream."""
        call = self._channel.stream_stream(
            processor.PATH,
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )
        return call(metadata=[(name.replace("_", "-"), value) for name, value in metadata.items()])

    def log(self) -> Any:
        """One access-log stream."""
        return self._channel.stream_unary(
            accesslog.PATH,
            request_serializer=StreamAccessLogsMessage.SerializeToString,
            response_deserializer=StreamAccessLogsResponse.FromString,
        )()


@pytest.fixture(params=[GrpcAioTransport, Ngh2Transport], ids=["grpc-aio", "ngh2"])
async def service(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Service]:
    socket = tmp_path / "w.sock"
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        running = Service(channel)
        methods = (processor.method(running.decider), accesslog.method(running.record))
        transport = request.param(socket, methods, max_body_bytes=MAX_BODY_BYTES)
        await transport.start()
        yield running
        await transport.drain(1)


def headers(*, ends: bool = False, **more: str) -> ProcessingRequest:
    """The first message of a stream; further headers have `_` for `-`, and `colon_` for `:`."""
    pairs = {
        ":method": "POST",
        ":path": "/v1/chat/completions",
        "authorization": f"Bearer {ALL}",
        "content-type": "application/json",
        "x-request-id": "id-1",
    }
    pairs |= {name.replace("colon_", ":").replace("_", "-"): value for name, value in more.items()}
    message = ProcessingRequest()
    message.request_headers.end_of_stream = ends
    message.request_headers.headers.headers.extend(
        HeaderValue(key=name, raw_value=value.encode("latin-1")) for name, value in pairs.items()
    )
    return message


def body(content: bytes) -> ProcessingRequest:
    message = ProcessingRequest()
    message.request_body.body = content
    message.request_body.end_of_stream = True
    return message


async def ask(stream: Any, *messages: ProcessingRequest) -> list[ProcessingResponse]:
    """Each message's answer; Envoy sends the next one only when it has it."""
    answers = []
    for message in messages:
        await stream.write(message)
        answers.append(await asyncio.wait_for(stream.read(), 5))
    return answers


CHAT = b'{"model":"alias","messages":[],"stream":true}'


async def test_headers_and_body_come_to_a_route_with_a_chain_a_body_and_a_decision(service: Service) -> None:
    stream = service.process()
    first, second = await ask(stream, headers(), body(CHAT))
    assert first.WhichOneof("response") == "request_headers"
    assert not first.HasField("dynamic_metadata")
    common = second.request_body.response
    sent = b'{"model":"real","messages":[],"stream":true,"stream_options":{"include_usage":true}}'
    assert common.body_mutation.body == sent
    assert common.clear_route_cache
    set_headers = {option.header.key: option.header.raw_value for option in common.header_mutation.set_headers}
    assert set_headers["content-length"] == str(len(sent)).encode()
    assert set_headers["x-envoy-max-retries"] == b"0"
    assert "x-extproc-idle-ms" in set_headers
    (group,) = second.dynamic_metadata[ROUTE_NAMESPACE]["priority_groups"]
    assert group["clusters"][0]["cluster_name"] == "east"
    decision = Decision.from_metadata(dict(second.dynamic_metadata[NAMESPACE].items()))
    assert decision is not None
    assert (decision.alias, decision.models, decision.request_id) == ("alias", ("real",), "id-1")
    assert await stream.read() is grpc.aio.EOF


async def test_a_request_without_a_body_is_decided_on_its_headers(service: Service) -> None:
    (answer,) = await ask(service.process(), headers(ends=True, colon_method="GET", colon_path="/v1/files"))
    assert answer.request_headers.response.clear_route_cache
    assert ROUTE_NAMESPACE in answer.dynamic_metadata


async def test_a_refusal_is_an_immediate_answer_and_ends_the_stream(service: Service) -> None:
    stream = service.process()
    (answer,) = await ask(stream, headers(authorization="Bearer sk-nobody"))
    assert answer.immediate_response.status.code == 401
    assert json.loads(answer.immediate_response.body)["error"]["code"] == "invalid_api_key"
    assert answer.immediate_response.details == "extproc:invalid_api_key"
    assert ROUTE_NAMESPACE not in answer.dynamic_metadata
    assert await stream.read() is grpc.aio.EOF


@pytest.mark.parametrize(("path", "dialect"), [("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic")])
async def test_a_bug_on_the_body_is_503_in_the_clients_dialect_and_quotes_nothing(
    service: Service, path: str, dialect: str
) -> None:
    service.meter = BrokenMeter()
    model = b"alias" if dialect == "openai" else b"sonnet"
    _, answer = await ask(service.process(), headers(colon_path=path), body(b'{"model":"%b","messages":[]}' % model))
    assert answer.immediate_response.status.code == 503
    document = json.loads(answer.immediate_response.body)
    assert document["error"]["code"] == "gateway_unavailable"
    assert ("request_id" in document) == (dialect == "anthropic")
    assert "bug" not in answer.immediate_response.body.decode()
    assert ROUTE_NAMESPACE not in answer.dynamic_metadata


@pytest.mark.parametrize("message", [body(b"{}"), ProcessingRequest(response_headers={}), ProcessingRequest()])
async def test_a_message_that_comes_out_of_turn_ends_the_stream_with_an_error(
    service: Service, message: ProcessingRequest
) -> None:
    stream = service.process()
    await stream.write(message)
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.wait_for(stream.read(), 5)
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_streams_that_interleave_do_not_mix(service: Service) -> None:
    streams = [service.process() for _ in range(50)]
    names = [f"glob-{number}" for number in range(50)]
    for stream in streams:
        await stream.write(headers())
    for stream, name in zip(reversed(streams), reversed(names), strict=True):
        assert (await stream.read()).WhichOneof("response") == "request_headers"
        await stream.write(body(json.dumps({"model": name, "messages": []}).encode()))
    for stream, name in zip(streams, names, strict=True):
        decision = Decision.from_metadata(dict((await stream.read()).dynamic_metadata[NAMESPACE].items()))
        assert decision is not None
        assert decision.alias == name


def adapting(message: ProcessingRequest, decision: Decision | None, attempt: int) -> ProcessingRequest:
    """`message` with the metadata that Envoy forwards to a cluster's filter."""
    if decision is not None:
        message.metadata_context.filter_metadata[NAMESPACE].update(decision.to_metadata())
        message.metadata_context.filter_metadata[ATTEMPTS_NAMESPACE].update({"n": attempt})
    return message


CHAIN = Decision(
    Dialect.OPENAI,
    "chat",
    path="/v1/chat/completions",
    model_in_body="one",
    providers=("a", "b"),
    models=("one", "two"),
)


@pytest.mark.parametrize(("attempt", "sent"), [(1, None), (2, b'{ "model": "two", "x": 1.0 }')])
async def test_adapt_gives_each_attempt_its_own_model(service: Service, attempt: int, sent: bytes | None) -> None:
    stream = service.process(x_extproc_provider="b")
    left = b'{ "model": "one", "x": 1.0 }'
    first, second = await ask(stream, adapting(headers(), CHAIN, attempt), adapting(body(left), CHAIN, attempt))
    assert first.WhichOneof("response") == "request_headers"
    common = second.request_body.response
    assert common.HasField("body_mutation") == (sent is not None)
    if sent is not None:
        assert common.body_mutation.body == sent
        (length,) = common.header_mutation.set_headers
        assert (length.header.key, length.header.raw_value) == ("content-length", str(len(sent)).encode())


@pytest.mark.parametrize(("decision", "attempt"), [(None, 1), (CHAIN, 0), (CHAIN, 3)])
async def test_adapt_fails_an_attempt_that_no_decision_names(
    service: Service, decision: Decision | None, attempt: int
) -> None:
    stream = service.process(x_extproc_provider="b")
    await ask(stream, headers())
    await stream.write(adapting(body(b'{"model":"one"}'), decision, attempt))
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.wait_for(stream.read(), 5)
    assert caught.value.code() is grpc.StatusCode.INTERNAL


def entry(request_id: str, decision: Decision | None = CHAIN) -> HTTPAccessLogEntry:
    logged = HTTPAccessLogEntry()
    logged.request.request_id = request_id
    logged.response.response_code.value = 200
    if decision is not None:
        metadata: Metadata = logged.common_properties.metadata
        metadata.filter_metadata[NAMESPACE].update(decision.to_metadata())
        metadata.filter_metadata[ATTEMPTS_NAMESPACE].update({"n": 2, "p1": "a", "s1": "503", "p2": "b", "s2": "200"})
    return logged


def batch(*entries: HTTPAccessLogEntry) -> StreamAccessLogsMessage:
    message = StreamAccessLogsMessage()
    message.http_logs.log_entry.extend(entries)
    return message


async def test_finished_requests_are_recorded_and_one_that_fails_costs_no_other(service: Service) -> None:
    service.refuse_entry = "bad"
    stream = service.log()
    await stream.write(batch(entry("one"), entry("bad"), entry("two")))
    await stream.write(batch(entry("refused", decision=None)))
    await stream.done_writing()
    await stream
    assert [finished.request_id for finished in service.recorded] == ["one", "two", "refused"]
    assert service.recorded[0].attempts == (AttemptMade("a", 503), AttemptMade("b", 200))
    assert service.recorded[0].decision == CHAIN
    assert (service.recorded[2].decision, service.recorded[2].attempts) == (None, ())


async def test_an_entry_is_recorded_before_the_stream_ends(service: Service) -> None:
    stream = service.log()
    await stream.write(batch(entry("one")))
    for _ in range(500):
        if service.recorded:
            break
        await asyncio.sleep(0.01)
    assert [finished.request_id for finished in service.recorded] == ["one"]
    stream.cancel()
