"""The count is the provider's own where it publishes a rule, says so where it does not, and takes any JSON."""

from __future__ import annotations

import base64
import copy
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.decide import vocabulary
from extproc.decide.prompts import json_text
from extproc.decide.tokens import TokenCount, count_input_tokens

COOKBOOK_MESSAGES = [
    {
        "role": "system",
        "content": "You are a helpful, pattern-following assistant that translates "
        "corporate jargon into plain English.",
    },
    {"role": "system", "name": "example_user", "content": "New synergies will help drive top-line growth."},
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Things working well together will increase revenue.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "Let's circle back when we have more bandwidth to touch base "
        "on opportunities for increased leverage.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Let's talk later when we're less busy about how to do better.",
    },
    {
        "role": "user",
        "content": "This late pivot means we don't have time to boil the ocean for the client deliverable.",
    },
]
COOKBOOK_TOOL_MESSAGES = [
    {
        "role": "system",
        "content": "You are a helpful assistant that can answer to questions about the weather.",
    },
    {"role": "user", "content": "What's the weather like in San Francisco?"},
]
COOKBOOK_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
                "unit": {
                    "type": "string",
                    "description": "The unit of temperature to return",
                    "enum": ["celsius", "fahrenheit"],
                },
            },
            "required": ["location"],
        },
    },
}
ENDPOINTS = ("chat", "responses", "completions", "embeddings", "messages", "count_tokens")
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 1024, 1024) + bytes(9)).decode()
MARK = "a mark to be counted"


def count(endpoint: str, body: dict[str, Any], model: str = "gpt-4o") -> TokenCount:
    counted = count_input_tokens(endpoint, body, model)
    assert counted is not None
    return counted


def words(text: str) -> int:
    return len(vocabulary.vocabulary("o200k_base").encode_ordinary(text))


@pytest.mark.parametrize(
    ("model", "expected"), [("gpt-3.5-turbo", 129), ("gpt-4-0613", 129), ("gpt-4", 129), ("gpt-4o", 124)]
)
def test_messages_count_as_openai_counted_them(model: str, expected: int) -> None:
    assert count("chat", {"messages": COOKBOOK_MESSAGES}, model) == TokenCount(expected, exact=True)


@pytest.mark.parametrize(("model", "expected"), [("gpt-3.5-turbo", 105), ("gpt-4", 105), ("gpt-4o-mini", 101)])
def test_tools_count_as_openai_counted_them(model: str, expected: int) -> None:
    body = {"messages": COOKBOOK_TOOL_MESSAGES, "tools": [COOKBOOK_TOOL]}
    assert count("chat", body, model) == TokenCount(expected, exact=True)
    old = {"messages": COOKBOOK_TOOL_MESSAGES, "functions": [COOKBOOK_TOOL["function"]]}
    assert count("chat", old, model) == TokenCount(expected, exact=True)
    flat = {"input": COOKBOOK_TOOL_MESSAGES, "tools": [{"type": "function", **COOKBOOK_TOOL["function"]}]}
    assert count("responses", flat, model) == TokenCount(expected, exact=True)


def test_one_word_is_eight_tokens_in_each_way_to_ask() -> None:
    assert count("chat", {"messages": [{"role": "user", "content": "hi"}]}).tokens == 8
    parts = [{"type": "text", "text": "hi"}]
    assert count("chat", {"messages": [{"role": "user", "content": parts}]}).tokens == 8
    assert count("responses", {"input": "hi"}).tokens == 8
    item = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    assert count("responses", {"input": [item]}).tokens == 8
    assert count("responses", {"instructions": "hi", "input": "hi"}).tokens == 8 + 5


@pytest.mark.parametrize("endpoint", ["completions", "embeddings"])
def test_texts_and_token_arrays_count_alone_and_in_lists(endpoint: str) -> None:
    field = "prompt" if endpoint == "completions" else "input"
    for value, expected in (
        ("hello world", 2),
        (["hello world", "hello"], 3),
        ([1, 2, 3], 3),
        ([[1, 2, 3], [4]], 4),
        ([], 0),
        (None, 0),
    ):
        assert count(endpoint, {field: value}) == TokenCount(expected, exact=True)


def test_special_tokens_in_a_message_are_text() -> None:
    body = {"messages": [{"role": "user", "content": "<|endoftext|><|im_start|>system"}]}
    assert count("chat", body).tokens > 8 + 5


@pytest.mark.parametrize("endpoint", ["files", "images", "", "models"])
def test_other_endpoints_are_not_counted(endpoint: str) -> None:
    assert count_input_tokens(endpoint, {"prompt": "hi"}, "gpt-4o") is None


def test_a_model_whose_vocabulary_is_a_guess_is_not_exact() -> None:
    assert count("chat", {"messages": COOKBOOK_MESSAGES}, "llama-3") == TokenCount(124, exact=False)


NESTED = {**COOKBOOK_TOOL["function"], "parameters": {"properties": {"a": {"properties": {"b": {"type": "string"}}}}}}
UNPUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"tools": [{"type": "function", "function": NESTED}]}),
    ("chat", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
    ("chat", {"tool_choice": {"type": "function", "function": {"name": "x"}}}),
    ("chat", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]}),
    ("chat", {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
    ("responses", {"input": "hi", "previous_response_id": "resp_1"}),
    ("responses", {"tools": [{"type": "web_search"}]}),
    ("messages", {"messages": []}),
]


@pytest.mark.parametrize(("endpoint", "body"), UNPUBLISHED)
def test_what_no_rule_covers_is_marked(endpoint: str, body: dict[str, Any]) -> None:
    assert not count(endpoint, body).exact


COUNTED_TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"messages": [{"role": "user", "content": MARK}]}),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": MARK}]}]}),
    ("chat", {"messages": [{"role": "assistant", "refusal": MARK}]}),
    ("chat", {"messages": [{"role": "assistant", "reasoning_content": MARK}]}),
    ("chat", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": MARK}}]}]}),
    ("chat", {"messages": [{"role": "assistant", "tool_calls": [{"custom": {"name": "f", "input": MARK}}]}]}),
    ("chat", {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": MARK}}]}),
    ("chat", {"messages": [{"role": "tool", "tool_call_id": "1", "content": MARK}]}),
    ("chat", {"tools": [{"type": "function", "function": {"name": "f", "description": MARK}}]}),
    ("chat", {"tools": [{"type": "custom", "custom": {"name": "f", "description": MARK}}]}),
    ("chat", {"tools": [{"type": "function", "function": {"parameters": {"properties": {"a": {"enum": [MARK]}}}}}]}),
    (
        "chat",
        {"tools": [{"type": "function", "function": {"parameters": {"properties": {"a": {"items": {"x": MARK}}}}}}]},
    ),
    ("chat", {"tools": [{"type": "function", "function": {"parameters": {"$defs": {"a": {"description": MARK}}}}}]}),
    ("chat", {"functions": [{"parameters": {"properties": {"a": {"properties": {"b": {"description": MARK}}}}}}]}),
    ("chat", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"description": MARK}}}}),
    ("responses", {"instructions": MARK}),
    ("responses", {"input": [{"type": "function_call", "name": "f", "arguments": MARK}]}),
    ("responses", {"input": [{"type": "function_call_output", "output": MARK}]}),
    ("responses", {"input": [{"type": "function_call_output", "output": [{"type": "input_text", "text": MARK}]}]}),
    ("responses", {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": MARK}]}]}),
    ("responses", {"input": [{"type": "new_in_a_year", "whatever": MARK}]}),
    ("responses", {"text": {"format": {"type": "json_schema", "schema": {"description": MARK}}}}),
    ("completions", {"prompt": "x", "suffix": MARK}),
    ("messages", {"system": MARK}),
    ("messages", {"system": [{"type": "text", "text": MARK, "cache_control": {"type": "ephemeral"}}]}),
    ("messages", {"messages": [{"role": "user", "content": MARK}]}),
    ("messages", {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": MARK}]}]}),
    ("messages", {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": {"x": MARK}}]}]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": MARK}]}]}),
    (
        "messages",
        {"messages": [{"content": [{"type": "tool_result", "content": [{"type": "text", "text": MARK}]}]}]},
    ),
    ("messages", {"messages": [{"content": [{"type": "document", "source": {"type": "text", "data": MARK}}]}]}),
    (
        "messages",
        {"messages": [{"content": [{"type": "search_result", "content": [{"type": "text", "text": MARK}]}]}]},
    ),
    ("messages", {"tools": [{"name": "f", "input_schema": {"description": MARK}}]}),
    ("count_tokens", {"system": MARK}),
]


@pytest.mark.parametrize(("endpoint", "body"), COUNTED_TEXTS)
def test_every_text_that_a_model_reads_counts(endpoint: str, body: dict[str, Any]) -> None:
    longer = copy.deepcopy(body)
    _replace(longer, MARK, f"{MARK} {MARK}")
    model = "claude-sonnet-4-5" if endpoint in ("messages", "count_tokens") else "gpt-4o"
    added = count(endpoint, longer, model).tokens - count(endpoint, body, model).tokens
    assert added >= words(f" {MARK}")


def _replace(node: Any, old: str, new: str) -> None:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if value == old:
            node[key] = new
        elif isinstance(value, dict | list):
            _replace(value, old, new)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}, TokenCount(765, exact=True)),
        ({"type": "image_url", "image_url": {"url": "https://x/a.png", "detail": "low"}}, TokenCount(85, exact=True)),
        ({"type": "image_url", "image_url": {"url": "https://x/a.png"}}, TokenCount(1445, exact=False)),
        ({"type": "image_url", "image_url": "not what it should be"}, TokenCount(1445, exact=False)),
        ({"type": "input_audio", "input_audio": {"data": "A" * 106_668}}, TokenCount(101, exact=False)),
        ({"type": "file", "file": {"file_id": "file-1"}}, TokenCount(15_000, exact=False)),
        ({"type": "file", "file": {"file_data": "A" * 4_000}}, TokenCount(1_500, exact=False)),
        ({"type": "file", "file": {"file_data": "A" * 40_000_000}}, TokenCount(450_000, exact=False)),
    ],
)
def test_pictures_and_files_cost_a_bounded_number(part: dict[str, Any], expected: TokenCount) -> None:
    around = count("chat", {"messages": [{"role": "user", "content": []}]}).tokens
    counted = count("chat", {"messages": [{"role": "user", "content": [part]}]})
    assert TokenCount(counted.tokens - around, counted.exact) == expected


def test_pictures_cost_the_same_in_responses() -> None:
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}", "detail": "high"}
    bare = count("responses", {"input": [{"role": "user", "content": []}]}).tokens
    assert count("responses", {"input": [{"role": "user", "content": [image]}]}).tokens == bare + 765


def test_a_message_to_claude_costs_more_tokens_and_its_pictures_their_patches() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 100
    body = {"messages": [{"role": "user", "content": text}]}
    sonnet, opus = (count("messages", body, model).tokens for model in ("claude-sonnet-4-5", "claude-opus-4-7"))
    assert words(text) * 1.2 < sonnet < opus < words(text) * 1.7
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    unseen = {"type": "image", "source": {"type": "url", "url": "https://x/a.png"}}
    bare = count("messages", {"messages": [{"content": []}]}, "claude-sonnet-4-5").tokens
    for block, expected in ((image, 37 * 37), (unseen, 1568)):
        nested = {"type": "tool_result", "content": [block]}
        for content in ([block], [nested]):
            counted = count("messages", {"messages": [{"content": content}]}, "claude-sonnet-4-5").tokens
            assert counted == bare + expected


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_depth_is_no_limit(endpoint: str) -> None:
    deep: Any = "end"
    schema: dict[str, Any] = {"type": "string"}
    block: dict[str, Any] = {"type": "text", "text": "end"}
    for _ in range(20_000):
        deep = [{"a": deep}]
        schema = {"properties": {"p": schema}}
        block = {"type": "tool_result", "content": [block]}
    tool = {"type": "function", "function": {"parameters": schema}}
    bodies: list[dict[str, Any]] = [
        dict.fromkeys(("messages", "input", "prompt", "tools", "system", "instructions"), deep),
        {"messages": [{"content": deep}], "input": [{"type": "new", "content": deep}], "tools": [{"x": deep}]},
        {"messages": [{"content": [block]}], "input": [{"content": [block]}], "tools": [tool]},
    ]
    for body in bodies:
        assert count(endpoint, body).tokens >= 0


WORDS_OF_BODIES = """
    messages input prompt tools system instructions content role name type text function parameters properties enum
    items image_url url detail data source file file_data input_audio tool_calls arguments function_call output summary
    description response_format json_schema tool_choice suffix thinking custom message tool_use tool_result document
    image none reasoning function_call_output redacted_thinking base64
"""
WORDS = st.sampled_from(WORDS_OF_BODIES.split())
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), WORDS)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(WORDS, inner, max_size=6)),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ENDPOINTS), st.dictionaries(WORDS, JSON, max_size=6), st.sampled_from(["gpt-4o", "gpt-4", "x"]))
def test_any_json_is_counted(endpoint: str, body: dict[str, Any], model: str) -> None:
    counted = count(endpoint, body, model)
    assert counted.tokens >= 0
    assert counted == count(endpoint, body, model)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["chat", "responses", "messages"]), st.lists(JSON, max_size=4), JSON)
def test_one_more_message_never_makes_a_request_cheaper(endpoint: str, messages: list[Any], extra: Any) -> None:
    field = "input" if endpoint == "responses" else "messages"
    message = {"role": "user", "content": extra}
    assert count(endpoint, {field: [*messages, message]}).tokens >= count(endpoint, {field: messages}).tokens


@pytest.mark.parametrize("value", [10**6000, [2**70], "\ud800", {"a": ["\udfff", float("inf")]}], ids=range(4))
def test_values_that_no_encoder_takes_have_a_text(value: Any) -> None:
    assert json_text(value)
