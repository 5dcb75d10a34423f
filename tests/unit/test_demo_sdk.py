"""The demo provider as the official SDKs see it, with strict response validation and every warning an error."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from extproc.demo.answers import TOKENS_PER_MESSAGE, TOKENS_PER_REPLY
from extproc.demo.server import serve_demo
from extproc.demo.tokens import o200k

pytestmark = pytest.mark.filterwarnings("error")

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}
RESPONSES_TOOL: Any = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}
ANTHROPIC_TOOL: Any = {"name": "get_weather", "description": "The weather", "input_schema": WEATHER}
CALLED = {"city": "demo", "unit": "celsius"}

USER: Any = [{"role": "user", "content": "What is an Envoy?"}]


def count(text: str) -> int:
    return len(o200k()(text))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(serve_demo(token_delay_s=0), loop).result()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def oai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, _strict_response_validation=True) as client:
        yield client


@pytest.fixture
def lenient(url: str) -> Iterator[openai.OpenAI]:
    """Not strict, where strict would refuse OpenAI's own answers: the SDK validates embeddings before it decodes the
    base64 that it asked for, and allows no null `finish_reason` in the chunks of a completion."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0, _strict_response_validation=True) as client:
        yield client


def test_chat_echoes_the_question_and_says_what_it_is(oai: openai.OpenAI) -> None:
    completion = oai.chat.completions.create(model="any-name", messages=USER)
    text = completion.choices[0].message.content or ""
    assert "extproc demo provider" in text
    assert "What is an Envoy?" in text
    assert (completion.model, completion.choices[0].finish_reason) == ("any-name", "stop")


def test_chat_usage_is_the_tokenizers_count(oai: openai.OpenAI) -> None:
    completion = oai.chat.completions.create(model="demo", messages=USER)
    usage = completion.usage
    assert usage is not None
    framing = TOKENS_PER_MESSAGE + TOKENS_PER_REPLY
    assert usage.prompt_tokens == count("user") + count("What is an Envoy?") + framing
    assert usage.completion_tokens == count(completion.choices[0].message.content or "")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_chat_stream_says_the_same_and_ends_with_the_usage(oai: openai.OpenAI) -> None:
    whole = oai.chat.completions.create(model="demo", messages=USER)
    chunks = list(
        oai.chat.completions.create(model="demo", messages=USER, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    spoken = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(spoken) == whole.choices[0].message.content
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_chat_stream_has_no_usage_unless_asked(oai: openai.OpenAI) -> None:
    chunks = list(oai.chat.completions.create(model="demo", messages=USER, stream=True))
    assert all("usage" not in chunk.model_fields_set and chunk.choices for chunk in chunks)


def test_n_choices_are_charged_for_each_output_and_one_prompt(oai: openai.OpenAI) -> None:
    one = oai.chat.completions.create(model="demo", messages=USER).usage
    three = oai.chat.completions.create(model="demo", messages=USER, n=3)
    assert one is not None
    assert three.usage is not None
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert three.usage.prompt_tokens == one.prompt_tokens
    assert three.usage.completion_tokens == 3 * one.completion_tokens


@pytest.mark.parametrize("cap", ["max_tokens", "max_completion_tokens"])
def test_a_cap_ends_the_answer_with_length(oai: openai.OpenAI, cap: str) -> None:
    completion = oai.chat.completions.create(model="demo", messages=USER, **{cap: 5})  # type: ignore[call-overload]
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 5


def test_a_stop_sequence_cuts_the_text_before_itself(oai: openai.OpenAI) -> None:
    completion = oai.chat.completions.create(model="demo", messages=USER, stop=["Try next", "zzz"])
    text = completion.choices[0].message.content or ""
    assert text.endswith('"What is an Envoy?"\n')
    assert completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_chat_calls_a_forced_tool_with_valid_arguments(oai: openai.OpenAI, choice: Any) -> None:
    completion = oai.chat.completions.create(model="demo", messages=USER, tools=[CHAT_TOOL], tool_choice=choice)
    [call] = completion.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", CALLED)
    assert completion.choices[0].finish_reason == "tool_calls"


def test_chat_calls_the_tool_that_the_text_names_and_answers_its_result_in_text(oai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Please use get_weather."}]
    asked = oai.chat.completions.create(model="demo", messages=messages, tools=[CHAT_TOOL]).choices[0].message
    assert asked.tool_calls
    result: Any = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "It rains in Bern."}
    turn: Any = asked.model_dump(exclude_none=True)
    answered = oai.chat.completions.create(model="demo", messages=[*messages, turn, result], tools=[CHAT_TOOL])
    assert "It rains in Bern." in (answered.choices[0].message.content or "")


@pytest.mark.parametrize(("text", "choice"), [("Hello", "auto"), ("get_weather", "none")])
def test_chat_leaves_a_tool_alone_that_no_one_asks_for(oai: openai.OpenAI, text: str, choice: Any) -> None:
    messages: Any = [{"role": "user", "content": text}]
    completion = oai.chat.completions.create(model="demo", messages=messages, tools=[CHAT_TOOL], tool_choice=choice)
    assert completion.choices[0].message.tool_calls is None


def test_the_chat_stream_helper_assembles_a_tool_call(oai: openai.OpenAI) -> None:
    with oai.chat.completions.stream(model="demo", messages=USER, tools=[CHAT_TOOL], tool_choice="required") as stream:
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == CALLED


class Step(BaseModel):
    title: str
    minutes: int


class Plan(BaseModel):
    steps: list[Step]
    kind: Literal["short", "long"]


def test_chat_parses_into_the_callers_schema(oai: openai.OpenAI) -> None:
    parsed = oai.chat.completions.parse(model="demo", messages=USER, response_format=Plan).choices[0].message.parsed
    assert parsed == Plan(steps=[], kind="short")


def test_json_mode_answers_an_object(oai: openai.OpenAI) -> None:
    completion = oai.chat.completions.create(model="demo", messages=USER, response_format={"type": "json_object"})
    assert json.loads(completion.choices[0].message.content or "")["you_wrote"] == '"What is an Envoy?"'


def test_responses_text_and_usage(oai: openai.OpenAI) -> None:
    response = oai.responses.create(model="demo", input="What is an Envoy?", instructions="Be brief.")
    assert "What is an Envoy?" in response.output_text
    assert response.usage is not None
    framing = 2 * TOKENS_PER_MESSAGE + TOKENS_PER_REPLY
    words = ("system", "Be brief.", "user", "What is an Envoy?")
    assert response.usage.input_tokens == sum(map(count, words)) + framing
    assert response.usage.output_tokens == count(response.output_text)


def test_responses_stream_has_the_apis_event_sequence(oai: openai.OpenAI) -> None:
    events = list(oai.responses.create(model="demo", input="Hi", stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.usage is not None
    spoken = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].response.output_text == spoken


def test_the_responses_stream_helper_assembles_a_tool_call(oai: openai.OpenAI) -> None:
    with oai.responses.stream(model="demo", input="Use get_weather", tools=[RESPONSES_TOOL]) as stream:
        final = stream.get_final_response()
    [item] = final.output
    assert item.type == "function_call"
    assert json.loads(item.arguments) == CALLED
    called: Any = item.model_dump(exclude_none=True)
    result: Any = {"type": "function_call_output", "call_id": item.call_id, "output": "Sunny"}
    again = oai.responses.create(model="demo", input=[called, result], tools=[RESPONSES_TOOL])
    assert "Sunny" in again.output_text


def test_responses_parse_into_the_callers_schema(oai: openai.OpenAI) -> None:
    assert oai.responses.parse(model="demo", input="Hi", text_format=Plan).output_parsed == Plan(steps=[], kind="short")


def test_a_capped_response_is_incomplete(oai: openai.OpenAI) -> None:
    whole = oai.responses.create(model="demo", input="Hi", max_output_tokens=4)
    last = list(oai.responses.create(model="demo", input="Hi", max_output_tokens=4, stream=True))[-1]
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert response.incomplete_details is not None
        assert response.usage is not None
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.usage.output_tokens == 4


def test_a_previous_response_is_refused_because_none_is_kept(oai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        oai.responses.create(model="demo", input="Hi", previous_response_id="resp_1")


def test_completions_json_stream_and_several_prompts(oai: openai.OpenAI, lenient: openai.OpenAI) -> None:
    whole = oai.completions.create(model="demo", prompt=["One", "Two words"], n=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == count("One") + count("Two words")
    assert whole.usage.completion_tokens == sum(count(choice.text) for choice in whole.choices)
    chunks = list(
        lenient.completions.create(
            model="demo", prompt="One", stream=True, echo=True, stream_options={"include_usage": True}
        )
    )
    spoken = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert spoken == "One" + whole.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == count(whole.choices[0].text)


def test_token_ids_are_counted_as_they_are(oai: openai.OpenAI, lenient: openai.OpenAI) -> None:
    usage = oai.completions.create(model="demo", prompt=[[1, 2, 3], [4]]).usage
    assert usage is not None
    assert usage.prompt_tokens == 4
    assert lenient.embeddings.create(model="demo", input=[1, 2, 3]).usage.prompt_tokens == 3


def test_embeddings_in_both_encodings_are_the_same_unit_vectors(lenient: openai.OpenAI) -> None:
    texts = ["the cat sat on the mat", "a cat on the mat", "quarterly revenue grew"]
    packed = lenient.embeddings.create(model="demo-embedding", input=texts)
    plain = lenient.embeddings.create(model="demo-embedding", input=texts, encoding_format="float")
    vectors = [item.embedding for item in packed.data]
    assert vectors == [item.embedding for item in plain.data]
    assert [len(vector) for vector in vectors] == [256] * 3
    assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1.0] * 3, abs=1e-6)

    def cosine(a: int, b: int) -> float:
        return sum(x * y for x, y in zip(vectors[a], vectors[b], strict=True))

    assert cosine(0, 1) > 0.5 > abs(cosine(0, 2))
    assert packed.usage.prompt_tokens == sum(map(count, texts))


def test_embeddings_honour_dimensions_and_refuse_an_empty_text(lenient: openai.OpenAI) -> None:
    assert len(lenient.embeddings.create(model="e", input="hi", dimensions=8).data[0].embedding) == 8
    with pytest.raises(openai.BadRequestError, match="none of them empty"):
        lenient.embeddings.create(model="e", input="")


def test_models_are_listed_in_both_dialects(oai: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    names = [model.id for model in oai.models.list()]
    assert names == [model.id for model in claude.models.list()] == ["demo", "demo-embedding"]
    assert oai.models.retrieve("demo").owned_by == "extproc"
    with pytest.raises(openai.NotFoundError):
        oai.models.retrieve("gpt-5")


def test_messages_text_and_usage(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(model="demo", max_tokens=500, messages=USER, system="Be brief.")
    [block] = message.content
    assert block.type == "text"
    assert "What is an Envoy?" in block.text
    assert message.stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model="demo", messages=USER, system="Be brief.")
    assert message.usage.input_tokens == counted.input_tokens
    assert message.usage.output_tokens == count(block.text)


def test_the_messages_stream_helper_returns_the_same_message(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(model="demo", max_tokens=500, messages=USER)
    with claude.messages.stream(model="demo", max_tokens=500, messages=USER) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    assert final.stop_reason == "end_turn"
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_messages_stream_has_the_apis_event_sequence(claude: anthropic.Anthropic) -> None:
    kinds = [event.type for event in claude.messages.create(model="m", max_tokens=3, messages=USER, stream=True)]
    # The SDK keeps pings to itself.
    assert kinds == [
        "message_start", "content_block_start", *["content_block_delta"] * 3, "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip


def test_messages_cap_and_stop_sequence(claude: anthropic.Anthropic) -> None:
    capped = claude.messages.create(model="demo", max_tokens=4, messages=USER)
    assert (capped.stop_reason, capped.usage.output_tokens) == ("max_tokens", 4)
    stopped = claude.messages.create(model="demo", max_tokens=500, messages=USER, stop_sequences=["Try next"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Try next")


def test_messages_tool_round_trip(claude: anthropic.Anthropic) -> None:
    asked = claude.messages.create(
        model="demo", max_tokens=500, messages=USER, tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}
    )
    [call] = asked.content
    assert call.type == "tool_use"
    assert (call.name, call.input, asked.stop_reason) == ("get_weather", CALLED, "tool_use")
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Foggy"}]}
    turn: Any = {"role": "assistant", "content": [call.model_dump(exclude_none=True)]}
    with claude.messages.stream(
        model="demo", max_tokens=500, messages=[*USER, turn, result], tools=[ANTHROPIC_TOOL]
    ) as stream:
        assert "Foggy" in stream.get_final_text()


def test_the_messages_stream_helper_assembles_a_tool_call(claude: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "get_weather"}
    with claude.messages.stream(
        model="demo", max_tokens=500, messages=USER, tools=[ANTHROPIC_TOOL], tool_choice=choice
    ) as stream:
        [call] = stream.get_final_message().content
    assert call.type == "tool_use"
    assert call.input == CALLED


def test_messages_answer_an_output_schema(claude: anthropic.Anthropic) -> None:
    config: Any = {"format": {"type": "json_schema", "schema": WEATHER}}
    message = claude.messages.create(model="demo", max_tokens=500, messages=USER, output_config=config)
    assert json.loads(message.content[0].text) == CALLED  # type: ignore[union-attr]


def test_refusals_raise_the_sdks_error_classes(oai: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        oai.chat.completions.create(model="demo", messages=[])
    assert (refused.value.code, refused.value.param) == ("invalid_type", "messages")
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="demo", max_tokens=0, messages=USER)
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        oai.chat.completions.create(
            model="demo",
            messages=USER,
            tools=[CHAT_TOOL],
            tool_choice={"type": "function", "function": {"name": "absent"}},
        )
