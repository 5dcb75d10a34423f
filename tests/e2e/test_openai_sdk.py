"""The official OpenAI SDK against the gateway, unchanged but for its base URL and key; every warning is an error.

Behind the gateway stands the recording upstream, so each test sees both ends: what the SDK made of the answer, and
what the provider was sent. What the SDK raises for refusals is in `test_sdk_errors`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.gateway import KEY, NARROW_KEY, PROVIDER_SECRET, Gateway, config, digest
from tests.upstream import Recorded, RecordingUpstream, Reply, sse
from tests.upstream_answers import TEXT, compact

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("error")]

USER: Any = [{"role": "user", "content": "What is an Envoy?"}]
WEATHER_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Weather(BaseModel):
    city: str


@pytest.fixture(scope="module")
def upstream() -> Iterator[RecordingUpstream]:
    with RecordingUpstream() as recording:
        yield recording


@pytest.fixture(scope="module")
def gateway(upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    narrow = {"models": ["demo", "narrow"], "keys": [{"id": "narrow", "sha256": digest(NARROW_KEY)}]}
    sections = config(
        providers={
            "acme": {"kind": "openai", "endpoint": f"{upstream.url}/v1", "api_key": {"env": "PROVIDER_KEY"}},
            "claude": {"kind": "anthropic", "endpoint": upstream.url, "api_key": {"env": "PROVIDER_KEY"}},
            "demo": {"kind": "demo"},
        },
        models={
            "gpt-test": {"targets": [{"provider": "acme"}]},
            "alias": {"targets": [{"provider": "acme", "model": "gpt-real"}]},
            "narrow": {"targets": [{"provider": "acme"}]},
            "claude-test": {"targets": [{"provider": "claude"}]},
            "demo": {"targets": [{"provider": "demo"}]},
        },
        teams={
            "all": {
                "models": ["*"],
                "default_provider": "acme",
                "keys": [{"id": "all", "sha256": digest(KEY)}],
            },
            "narrow": narrow,
        },
    )
    with Gateway(tmp_path_factory.mktemp("openai-sdk"), sections) as running:
        yield running


@pytest.fixture(autouse=True)
def _anew(upstream: RecordingUpstream) -> None:
    upstream.behave_normally()
    upstream.clear()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def strict(gateway: Gateway) -> Iterator[openai.OpenAI]:
    """Refuses answers that are not exactly what OpenAI documents."""
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
    ) as sdk:
        yield sdk


@pytest.fixture
async def aclient(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as sdk:
        yield sdk


def only(upstream: RecordingUpstream, method: str, path: str) -> Recorded:
    """The one request that the provider got: to `path`, with the provider's credential and not the client's."""
    (request,) = upstream.wait_for_requests(1)
    assert (request.method, request.path) == (method, path)
    assert request.values("authorization") == [f"Bearer {PROVIDER_SECRET}"]
    assert KEY.encode() not in request.raw_head + request.body
    return request


# Chat


def test_chat_is_answered_and_the_provider_sees_what_the_sdk_sent(
    strict: openai.OpenAI, upstream: RecordingUpstream
) -> None:
    answer = strict.chat.completions.create(model="gpt-test", messages=USER, temperature=0.5)
    assert answer.choices[0].message.content == TEXT
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 7)
    sent = only(upstream, "POST", "/v1/chat/completions")
    assert sent.json == {"model": "gpt-test", "messages": USER, "temperature": 0.5}


def test_an_alias_becomes_the_providers_own_name_of_the_model(
    strict: openai.OpenAI, upstream: RecordingUpstream
) -> None:
    answer = strict.chat.completions.create(model="alias", messages=USER)
    assert answer.model == "gpt-real"
    assert only(upstream, "POST", "/v1/chat/completions").json["model"] == "gpt-real"


def test_a_stream_arrives_whole_and_without_the_usage_that_was_not_asked_for(
    strict: openai.OpenAI, upstream: RecordingUpstream
) -> None:
    with strict.chat.completions.create(model="gpt-test", messages=USER, stream=True) as chunks:
        got = list(chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in got) == TEXT
    assert all(chunk.usage is None for chunk in got)
    assert only(upstream, "POST", "/v1/chat/completions").json["stream_options"] == {"include_usage": True}


def test_a_stream_tells_its_usage_to_who_asks(strict: openai.OpenAI) -> None:
    with strict.chat.completions.create(
        model="gpt-test", messages=USER, stream=True, stream_options={"include_usage": True}
    ) as chunks:
        *_, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 18


async def test_the_async_client_chats_and_streams(aclient: openai.AsyncOpenAI) -> None:
    answer = await aclient.chat.completions.create(model="gpt-test", messages=USER)
    assert answer.choices[0].message.content == TEXT
    stream = await aclient.chat.completions.create(model="gpt-test", messages=USER, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == TEXT


async def test_the_async_stream_helper_gives_the_whole_completion(aclient: openai.AsyncOpenAI) -> None:
    async with aclient.chat.completions.stream(model="gpt-test", messages=USER) as stream:
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == TEXT


def test_a_tool_call_reaches_the_client_as_the_provider_made_it(
    strict: openai.OpenAI, upstream: RecordingUpstream
) -> None:
    arguments = '{"city": "Zürich 🙂"}'
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    upstream.behave(Reply(body=compact(_chat(message, "tool_calls"))))
    answer = strict.chat.completions.create(model="gpt-test", messages=USER, tools=[WEATHER_TOOL])
    (made,) = answer.choices[0].message.tool_calls or []
    assert made.type == "function"
    assert (made.function.name, made.function.arguments) == ("get_weather", arguments)
    assert only(upstream, "POST", "/v1/chat/completions").json["tools"] == [WEATHER_TOOL]


def test_the_stream_helper_puts_a_tool_call_together(strict: openai.OpenAI, upstream: RecordingUpstream) -> None:
    upstream.behave(Reply(chunks=_tool_call_chunks('{"ci', 'ty":"Bern', '"}'), headers=_SSE))
    with strict.chat.completions.stream(model="gpt-test", messages=USER, tools=[WEATHER_TOOL]) as stream:
        completion = stream.get_final_completion()
    (made,) = completion.choices[0].message.tool_calls or []
    assert (made.function.name, made.function.parsed_arguments) == ("get_weather", {"city": "Bern"})


def test_parse_gives_an_object_of_the_callers_own_type(client: openai.OpenAI, upstream: RecordingUpstream) -> None:
    message = {"role": "assistant", "content": '{"city": "Bern"}', "refusal": None}
    upstream.behave(Reply(body=compact(_chat(message, "stop"))))
    answer = client.chat.completions.parse(model="gpt-test", messages=USER, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Bern")
    asked = only(upstream, "POST", "/v1/chat/completions").json["response_format"]
    assert (asked["type"], asked["json_schema"]["strict"]) == ("json_schema", True)


# Other endpoints that name a model


def test_embeddings_arrive_in_the_sdks_own_base64_default(client: openai.OpenAI, upstream: RecordingUpstream) -> None:
    answer = client.embeddings.create(model="gpt-test", input=["a", "b"])
    assert [each.embedding for each in answer.data] == [[1.0, 0.0], [1.0, 0.0]]
    assert only(upstream, "POST", "/v1/embeddings").json["encoding_format"] == "base64"


def test_legacy_completions_answer_and_stream(client: openai.OpenAI) -> None:
    assert client.completions.create(model="gpt-test", prompt="Say hello").choices[0].text == TEXT
    with client.completions.create(model="gpt-test", prompt="Say hello", stream=True) as chunks:
        assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT


def test_responses_are_created_and_streamed(strict: openai.OpenAI, upstream: RecordingUpstream) -> None:
    answer = strict.responses.create(model="alias", input="Hello")
    assert (answer.output_text, answer.model) == (TEXT, "gpt-real")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 18
    only(upstream, "POST", "/v1/responses")
    with strict.responses.stream(model="alias", input="Hello") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert (kinds[0], kinds[-1], final.output_text) == ("response.created", "response.completed", TEXT)


def test_responses_parse_gives_an_object(client: openai.OpenAI, upstream: RecordingUpstream) -> None:
    answered = client.responses.create(model="gpt-test", input="Hello").to_dict()
    answered["output"][0]["content"][0]["text"] = '{"city": "Bern"}'  # type: ignore[index]
    upstream.behave(Reply(body=compact(answered)))
    assert client.responses.parse(model="gpt-test", input="Hello", text_format=Weather).output_parsed == Weather(
        city="Bern"
    )


def test_input_tokens_are_counted_by_the_provider(client: openai.OpenAI, upstream: RecordingUpstream) -> None:
    upstream.behave(Reply(body=b'{"object":"response.input_tokens","input_tokens":42}'))
    assert client.responses.input_tokens.count(model="gpt-test", input="Hello").input_tokens == 42
    only(upstream, "POST", "/v1/responses/input_tokens")


# Models


def test_models_lists_what_this_key_may_use(client: openai.OpenAI, gateway: Gateway) -> None:
    page = client.models.list()
    assert {model.id for model in page} == {"gpt-test", "alias", "narrow", "claude-test", "demo"}
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=NARROW_KEY, max_retries=0) as narrow:
        assert [model.id for model in narrow.models.list()] == ["narrow", "demo"]
        with pytest.raises(openai.NotFoundError) as caught:
            narrow.models.retrieve("gpt-test")
    assert caught.value.code == "model_not_found"


def test_models_retrieve_gives_one(strict: openai.OpenAI, upstream: RecordingUpstream) -> None:
    model = strict.models.retrieve("alias")
    assert (model.id, model.object) == ("alias", "model")
    assert upstream.requests == []


# Headers


def test_raw_responses_show_who_answered(client: openai.OpenAI, gateway: Gateway) -> None:
    raw = client.chat.completions.with_raw_response.create(model="alias", messages=USER)
    assert raw.headers["x-extproc-provider"] == "acme"
    assert raw.headers["x-extproc-model"] == "gpt-real"
    assert raw.parse().choices[0].message.content == TEXT
    row = gateway.wait_for_rows(1, f"request_id = '{raw.headers['x-request-id']}'")[0]
    assert (row["alias"], row["provider"], row["model_asked"]) == ("alias", "acme", "gpt-real")
    internal = [name for name in raw.headers if name.startswith(("x-envoy", "x-extproc-"))]
    assert sorted(internal) == ["x-extproc-model", "x-extproc-provider"]


def test_the_request_id_is_the_gateways_own_and_new_each_time(client: openai.OpenAI) -> None:
    first, second = (
        client.chat.completions.create(model="gpt-test", messages=USER, extra_headers={"x-request-id": "mine"})
        for _ in range(2)
    )
    assert first._request_id != second._request_id
    assert not {first._request_id, second._request_id} & {"mine", None, "req_upstream_1", "req_upstream_2"}


# The demo provider, as the quickstart has it


def test_the_demo_provider_answers_every_endpoint_of_the_quickstart(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="demo", messages=USER)
    assert "What is an Envoy?" in (chat.choices[0].message.content or "")
    with client.chat.completions.create(model="demo", messages=USER, stream=True) as chunks:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == chat.choices[0].message.content
    assert client.responses.create(model="demo", input="Hello").output_text
    assert client.embeddings.create(model="demo", input="Hello").data[0].embedding
    assert client.completions.create(model="demo", prompt="Hello").choices[0].text


_SSE = (("content-type", "text/event-stream"),)


def _chat(message: dict[str, Any], finish: str) -> dict[str, Any]:
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-test",
        "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def _tool_call_chunks(*pieces: str) -> tuple[bytes, ...]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-test"}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        return sse(compact({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}))

    begun = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    return (
        chunk({"role": "assistant", "content": None, "tool_calls": [begun]}),
        *(chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}) for piece in pieces),
        chunk({}, "tool_calls"),
        sse("[DONE]"),
    )
