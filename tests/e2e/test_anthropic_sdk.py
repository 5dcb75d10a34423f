"""The official Anthropic SDK against the gateway, unchanged but for its base URL and key; every warning is an error.

Behind the gateway stands the recording upstream, so each test sees both ends. What the SDK raises for refusals is in
`test_sdk_errors`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import pytest

from tests.gateway import KEY, NARROW_KEY, PROVIDER_SECRET, Gateway, config, digest
from tests.upstream import Recorded, RecordingUpstream, Reply, sse
from tests.upstream_answers import TEXT, compact

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("error")]

USER: Any = [{"role": "user", "content": "What is an Envoy?"}]
WEATHER_TOOL: Any = {
    "name": "get_weather",
    "description": "The weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CHAT: dict[str, Any] = {"model": "claude-test", "max_tokens": 64, "messages": USER}
_SSE = (("content-type", "text/event-stream"),)


@pytest.fixture(scope="module")
def upstream() -> Iterator[RecordingUpstream]:
    with RecordingUpstream() as recording:
        yield recording


@pytest.fixture(scope="module")
def gateway(upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    secret = {"env": "PROVIDER_KEY"}
    sections = config(
        providers={
            "acme": {"kind": "anthropic", "endpoint": upstream.url, "api_key": secret},
            "other": {"kind": "openai", "endpoint": f"{upstream.url}/v1", "api_key": secret},
            "demo": {"kind": "demo"},
        },
        models={
            "claude-test": {"targets": [{"provider": "acme"}]},
            "alias": {"targets": [{"provider": "acme", "model": "claude-real"}]},
            "narrow": {"targets": [{"provider": "acme"}]},
            "gpt-test": {"targets": [{"provider": "other"}]},
            "demo": {"targets": [{"provider": "demo"}]},
        },
        teams={
            "all": {"models": ["*"], "default_provider": "acme", "keys": [{"id": "all", "sha256": digest(KEY)}]},
            "narrow": {"models": ["demo", "narrow"], "keys": [{"id": "narrow", "sha256": digest(NARROW_KEY)}]},
        },
    )
    with Gateway(tmp_path_factory.mktemp("anthropic-sdk"), sections) as running:
        yield running


@pytest.fixture(autouse=True)
def _anew(upstream: RecordingUpstream) -> None:
    upstream.behave_normally()
    upstream.clear()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0, _strict_response_validation=True) as sdk:
        yield sdk


@pytest.fixture
async def aclient(gateway: Gateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key=KEY, max_retries=0) as sdk:
        yield sdk


def only(upstream: RecordingUpstream, method: str, path: str) -> Recorded:
    """The one request that the provider got: to `path`, with the provider's credential and not the client's."""
    (request,) = upstream.wait_for_requests(1)
    assert (request.method, request.path) == (method, path)
    assert request.values("x-api-key") == [PROVIDER_SECRET]
    assert KEY.encode() not in request.raw_head + request.body
    return request


# Messages


def test_messages_are_answered_and_the_provider_sees_what_the_sdk_sent(
    client: anthropic.Anthropic, upstream: RecordingUpstream
) -> None:
    message = client.messages.create(**CHAT, system="Be brief.")
    assert _text(message) == TEXT
    assert (message.usage.input_tokens, message.usage.output_tokens, message.stop_reason) == (11, 7, "end_turn")
    sent = only(upstream, "POST", "/v1/messages")
    assert sent.json == {**CHAT, "system": "Be brief."}
    assert sent.header("anthropic-version") == client.default_headers["anthropic-version"]


def test_beta_headers_and_queries_reach_the_provider(client: anthropic.Anthropic, upstream: RecordingUpstream) -> None:
    client.beta.messages.create(**CHAT, betas=["context-1m-2025-08-07"], extra_query={"beta": "true"})
    sent = only(upstream, "POST", "/v1/messages")
    assert (sent.query, sent.header("anthropic-beta")) == ("beta=true", "context-1m-2025-08-07")


def test_an_alias_becomes_the_providers_own_name_of_the_model(
    client: anthropic.Anthropic, upstream: RecordingUpstream
) -> None:
    assert client.messages.create(**{**CHAT, "model": "alias"}).model == "claude-real"
    assert only(upstream, "POST", "/v1/messages").json["model"] == "claude-real"


def test_a_bearer_token_is_as_good_as_an_api_key(gateway: Gateway, upstream: RecordingUpstream) -> None:
    with anthropic.Anthropic(base_url=gateway.url, api_key=None, auth_token=KEY, max_retries=0) as sdk:
        assert _text(sdk.messages.create(**CHAT)) == TEXT
    assert only(upstream, "POST", "/v1/messages").values("authorization") == []


def test_a_raw_stream_arrives_event_by_event(client: anthropic.Anthropic) -> None:
    with client.messages.create(**CHAT, stream=True) as events:
        kinds = [event.type for event in events]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])


def test_the_stream_helper_gives_text_and_the_whole_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**CHAT) as stream:
        assert "".join(stream.text_stream) == TEXT
        message = stream.get_final_message()
    assert (message.usage.input_tokens, message.usage.output_tokens) == (11, 7)


async def test_the_async_client_answers_and_streams(aclient: anthropic.AsyncAnthropic) -> None:
    assert _text(await aclient.messages.create(**CHAT)) == TEXT
    async with aclient.messages.stream(**CHAT) as stream:
        assert "".join([text async for text in stream.text_stream]) == TEXT


def test_a_tool_call_reaches_the_client_as_the_provider_made_it(
    client: anthropic.Anthropic, upstream: RecordingUpstream
) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Zürich 🙂"}}
    upstream.behave(Reply(body=compact(_message([call], "tool_use"))))
    message = client.messages.create(**CHAT, tools=[WEATHER_TOOL])
    (block,) = message.content
    assert block.type == "tool_use"
    assert (block.name, block.input) == ("get_weather", {"city": "Zürich 🙂"})
    assert only(upstream, "POST", "/v1/messages").json["tools"] == [WEATHER_TOOL]


def test_the_stream_helper_puts_a_tool_call_together(client: anthropic.Anthropic, upstream: RecordingUpstream) -> None:
    upstream.behave(Reply(chunks=_tool_use_chunks('{"ci', 'ty": "Bern', '"}'), headers=_SSE))
    with client.messages.stream(**CHAT, tools=[WEATHER_TOOL]) as stream:
        (block,) = stream.get_final_message().content
    assert block.type == "tool_use"
    assert (block.name, block.input) == ("get_weather", {"city": "Bern"})


def test_tokens_are_counted_by_the_provider(client: anthropic.Anthropic, upstream: RecordingUpstream) -> None:
    assert client.messages.count_tokens(model="alias", messages=USER).input_tokens == 11
    assert only(upstream, "POST", "/v1/messages/count_tokens").json["model"] == "claude-real"


# Models


def test_models_lists_what_this_key_may_use_on_one_page(client: anthropic.Anthropic, gateway: Gateway) -> None:
    page = client.models.list(limit=2)
    assert [model.id for model in page] == ["claude-test", "alias", "narrow", "gpt-test", "demo"]
    assert (page.has_more, page.has_next_page(), page.first_id, page.last_id) == (False, False, "claude-test", "demo")
    with anthropic.Anthropic(base_url=gateway.url, api_key=NARROW_KEY, max_retries=0) as narrow:
        assert [model.id for model in narrow.models.list()] == ["narrow", "demo"]


def test_models_retrieve_gives_one(client: anthropic.Anthropic, upstream: RecordingUpstream) -> None:
    model = client.models.retrieve("alias")
    assert (model.id, model.type, model.display_name) == ("alias", "model", "alias")
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.request_id
    assert upstream.requests == []


# Batches: they name no model, so they go to the team's default provider


def test_message_batches_go_to_the_default_provider(client: anthropic.Anthropic, upstream: RecordingUpstream) -> None:
    batch = _batch()
    result = {"custom_id": "a", "result": {"type": "succeeded", "message": _message([{"type": "text", "text": "x"}])}}
    upstream.behave(Reply(body=compact(result) + b"\n"), path="/v1/messages/batches/msgbatch_1/results")
    upstream.behave(
        Reply(body=compact({"data": [batch], "has_more": False, "first_id": None, "last_id": None})),
        path="/v1/messages/batches",
        method="GET",
    )
    upstream.behave(
        Reply(body=b'{"id":"msgbatch_1","type":"message_batch_deleted"}'),
        path="/v1/messages/batches/*",
        method="DELETE",
    )
    upstream.behave(Reply(body=compact(batch)))
    params: Any = {"custom_id": "a", "params": {**CHAT, "model": "a-model-that-no-policy-judged"}}
    assert client.messages.batches.create(requests=[params]).id == "msgbatch_1"
    assert client.messages.batches.retrieve("msgbatch_1").processing_status == "ended"
    assert [each.id for each in client.messages.batches.list()] == ["msgbatch_1"]
    assert [each.custom_id for each in client.messages.batches.results("msgbatch_1")] == ["a"]
    assert client.messages.batches.cancel("msgbatch_1").id == "msgbatch_1"
    assert client.messages.batches.delete("msgbatch_1").id == "msgbatch_1"
    assert {request.header("x-api-key") for request in upstream.requests} == {PROVIDER_SECRET}


def test_batches_are_refused_to_a_key_that_may_not_use_every_model(
    gateway: Gateway, upstream: RecordingUpstream
) -> None:
    with (
        anthropic.Anthropic(base_url=gateway.url, api_key=NARROW_KEY, max_retries=0) as narrow,
        pytest.raises(anthropic.PermissionDeniedError) as caught,
    ):
        narrow.messages.batches.create(requests=[{"custom_id": "a", "params": {**CHAT, "model": "narrow"}}])  # type: ignore[typeddict-item]
    assert "model_not_allowed" in caught.value.message
    assert upstream.requests == []


# Headers


def test_raw_responses_show_who_answered(client: anthropic.Anthropic, gateway: Gateway) -> None:
    raw = client.messages.with_raw_response.create(**{**CHAT, "model": "alias"})
    assert (raw.headers["x-extproc-provider"], raw.headers["x-extproc-model"]) == ("acme", "claude-real")
    assert _text(raw.parse()) == TEXT
    row = gateway.wait_for_rows(1, f"request_id = '{raw.headers['x-request-id']}'")[0]
    assert (row["dialect"], row["alias"], row["provider"], row["input_tokens"]) == ("anthropic", "alias", "acme", 11)


# The demo provider, as the quickstart has it


def test_the_demo_provider_answers_messages_streams_and_counts(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {**CHAT, "model": "demo", "max_tokens": 256}
    message = client.messages.create(**asked)
    assert "What is an Envoy?" in _text(message)
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_text() == _text(message)
    counted = client.messages.count_tokens(model="demo", messages=USER)
    assert counted.input_tokens == message.usage.input_tokens


def _text(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def _message(content: list[dict[str, Any]], stop_reason: str = "end_turn") -> dict[str, Any]:
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-test", "content": content}
    return {**head, "stop_reason": stop_reason, "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 2}}


def _batch() -> dict[str, Any]:
    counts = {"processing": 0, "succeeded": 1, "errored": 0, "canceled": 0, "expired": 0}
    times = {"created_at": "2026-01-01T00:00:00Z", "expires_at": "2026-01-02T00:00:00Z", "ended_at": None}
    more = {"archived_at": None, "cancel_initiated_at": None, "results_url": "/v1/messages/batches/msgbatch_1/results"}
    head = {"id": "msgbatch_1", "type": "message_batch", "processing_status": "ended", "request_counts": counts}
    return {**head, **times, **more}


def _tool_use_chunks(*pieces: str) -> tuple[bytes, ...]:
    def event(kind: str, **fields: Any) -> bytes:
        return sse(compact({"type": kind, **fields}), event=kind)

    block = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}}
    return (
        event("message_start", message={**_message([]), "stop_reason": None}),
        event("content_block_start", index=0, content_block=block),
        *(
            event("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": piece})
            for piece in pieces
        ),
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage={"output_tokens": 9}),
        event("message_stop"),
    )
