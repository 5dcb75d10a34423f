"""The demo provider's pure part: schemas, tokens and answers, without a server."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.demo import chat, responses
from extproc.demo.answers import Answer, Ask, Finish, Tool, ToolChoice, Turn, answer
from extproc.demo.schema import MAX_VALUES, UnsatisfiableError, minimal
from extproc.demo.tokens import o200k
from extproc.demo.wire import Refused, Stamp, parse

bounds = st.integers(-50, 50)


def numbers(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    def bounded(low: int, width: int, step: int | None) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": kind, "minimum": low, "maximum": low + width}
        return schema if step is None else {**schema, "multipleOf": step, "maximum": low + width + step}

    return st.builds(bounded, bounds, st.integers(0, 20), st.none() | st.integers(1, 9))


scalars = st.one_of(
    numbers("integer"),
    numbers("number"),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": low + 1}, bounds),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 12),
        st.integers(0, 9),
    ),
    st.sampled_from(["date", "date-time", "email", "uuid", "ipv4"]).map(lambda it: {"type": "string", "format": it}),
    st.sampled_from([r"^\d{3}$", r"^[A-Z]{2,3}$", r"^[a-z]+-\d+$", ""]).map(
        lambda it: {"type": "string", "pattern": it}
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "integer"]}, {}]),
    st.lists(st.integers() | st.text(max_size=4), min_size=1).map(lambda it: {"enum": it}),
    st.integers().map(lambda it: {"const": it}),
)


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=4)
    closed = properties.map(
        lambda it: {"type": "object", "properties": it, "required": sorted(it), "additionalProperties": False}
    )
    arrays = st.builds(lambda it, low: {"type": "array", "items": it, "minItems": low}, inner, st.integers(0, 3))
    unions = st.lists(inner, min_size=1, max_size=3).map(lambda it: {"anyOf": it})
    return st.one_of(closed, properties.map(lambda it: {"type": "object", "properties": it}), arrays, unions)


@given(st.recursive(scalars, objects, max_leaves=12))
def test_the_minimal_value_is_valid_under_its_schema(schema: dict[str, Any]) -> None:
    jsonschema.validate(minimal(schema), schema)


def test_references_and_compositions_are_followed() -> None:
    schema = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["name", "next"],
            }
        },
        "allOf": [{"$ref": "#/$defs/node"}, {"properties": {"size": {"type": "integer"}}, "required": ["size"]}],
    }
    assert minimal(schema) == {"name": "demo", "next": None, "size": 1}
    jsonschema.validate(minimal(schema), schema)


@pytest.mark.parametrize("kind", ["integer", "string"])
def test_unique_items_are_unique(kind: str) -> None:
    schema = {"type": "array", "items": {"type": kind}, "minItems": 4, "uniqueItems": True}
    jsonschema.validate(minimal(schema), schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": r"^never-\d{77}$"},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "string", "minLength": 1 << 40},
        {"type": "array", "minItems": MAX_VALUES + 1},
        {"$ref": "#/$defs/absent"},
        {"$ref": "#"},
        {"$defs": {"a": {"type": "array", "minItems": 9, "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
    ],
    ids=["pattern", "empty range", "huge string", "huge array", "dangling", "self reference", "explosion"],
)
def test_a_schema_without_a_known_value_is_refused_rather_than_broken(schema: dict[str, Any]) -> None:
    with pytest.raises(UnsatisfiableError):
        minimal(schema)


@given(st.text())
def test_pieces_join_to_the_text_and_number_its_tokens(text: str) -> None:
    pieces = o200k()(text)
    assert "".join(pieces) == text.encode("utf-8", "replace").decode()


def test_a_prompt_of_megabytes_is_counted() -> None:
    text = "hi there " * 300_000
    pieces = o200k()(text)
    assert ("".join(pieces), len(pieces)) == (text, 600_001)


def test_a_special_token_in_the_text_is_ordinary_text() -> None:
    assert len(o200k()("<|endoftext|>")) > 1


def ask(text: str, **fields: Any) -> Ask:
    return Ask("demo", (Turn("user", text),), **fields)


@given(st.text(), st.integers(1, 80))
def test_no_answer_is_longer_than_its_cap(text: str, cap: int) -> None:
    whole = answer(ask(text), o200k())
    said = answer(ask(text, max_tokens=cap), o200k())
    assert said.output_tokens == min(cap, whole.output_tokens)
    assert (said.finish is Finish.LENGTH) == (whole.output_tokens > cap)
    assert whole.text.startswith(said.text)


def test_the_same_question_gets_the_same_answer() -> None:
    assert answer(ask("Hi"), o200k()) == answer(ask("Hi"), o200k())


def test_a_cap_cuts_a_tool_call_short() -> None:
    tool = Tool("look_up", {"type": "object", "properties": {"word": {"type": "string", "minLength": 400}}})
    said = answer(ask("Hi", tools=(tool,), tool_choice=ToolChoice("required"), max_tokens=9), o200k())
    assert (said.finish, said.output_tokens, said.tool) == (Finish.LENGTH, 9, "look_up")


def test_images_and_tools_are_charged() -> None:
    plain = answer(ask("Hi"), o200k()).input_tokens
    assert answer(Ask("demo", (Turn("user", "Hi", images=2),)), o200k()).input_tokens == plain + 170
    assert answer(ask("Hi", declared='{"tool":1}'), o200k()).input_tokens == plain + len(o200k()('{"tool":1}'))


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"[]", "invalid_type", None),
        (b"[" * 100_000, "invalid_json", None),
        (b'{"messages":[{"role":"user","content":"x"}]}', "missing_field", "model"),
        (b'{"model":"","messages":[{"role":"user"}]}', "invalid_type", "model"),
        (b'{"model":"m","messages":[{"role":"user"}],"n":"2"}', "invalid_type", "n"),
        (b'{"model":"m","messages":[{"role":"user","content":1}]}', "invalid_type", "messages.0.content"),
        (b'{"model":"m","messages":[{"role":"boss"}]}', "invalid_type", "messages.0.role"),
    ],
)
def test_a_bad_request_names_its_fault(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(Refused) as refused:
        parse(chat.ChatRequest, body)
    assert (refused.value.refusal.code, refused.value.refusal.param) == (code, param)


def test_chunks_are_the_apis_bytes() -> None:
    request = parse(chat.ChatRequest, b'{"model":"m","messages":[{"role":"user","content":"x"}],"stream":true}')
    said = Answer(("Hé", "llo"), Finish.END, 1, 2)
    events = list(chat.events(request, said, Stamp("1", 7)))
    head = (
        'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m","service_tier":"default",'
        '"system_fingerprint":"fp_extproc_demo","choices":[{"index":0,"delta":'
    )
    going = ',"logprobs":null,"finish_reason":null}]}\n\n'
    assert [event.decode() for event in events] == [
        head + '{"role":"assistant","content":"","refusal":null}' + going,
        head + '{"content":"Hé"}' + going,
        head + '{"content":"llo"}' + going,
        head + '{},"logprobs":null,"finish_reason":"stop"}]}\n\n',
        "data: [DONE]\n\n",
    ]


def test_named_events_carry_their_name_twice() -> None:
    request = parse(responses.ResponseRequest, b'{"model":"m","input":"x"}')
    for event in responses.events(request, Answer(("a",), Finish.END, 1, 1), Stamp("1", 7)):
        name, data = event.decode().removesuffix("\n\n").split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
