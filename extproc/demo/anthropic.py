"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`: request to `Ask`, `Answer` to a message or its events.

Source: Anthropic API reference, messages and streaming messages. The surprising thing: the usage comes in two parts.
`message_start` has the input's tokens and a first guess at the output's; `message_delta` at the end has the total.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from extproc.demo.answers import Answer, Ask, Finish, Turn
from extproc.demo.wire import (
    Count,
    JsonDict,
    Stamp,
    Wire,
    as_text,
    declared,
    dump,
    event,
    invalid,
    text_of,
    tool_choice_of,
    tools_of,
)

STOP_REASONS = {
    Finish.END: "end_turn",
    Finish.STOP_SEQUENCE: "stop_sequence",
    Finish.LENGTH: "max_tokens",
    Finish.TOOL: "tool_use",
}


class Message(Wire):
    role: Literal["user", "assistant", "system"]
    content: str | list[JsonDict]


class CountRequest(Wire):
    """What `count_tokens` takes: a messages request without the fields that shape its output."""

    model: str = Field(min_length=1)
    messages: list[Message] = Field(min_length=1)
    system: str | list[JsonDict] | None = None
    tools: list[JsonDict] | None = None
    tool_choice: JsonDict | None = None
    output_config: JsonDict | None = None


class MessagesRequest(CountRequest):
    max_tokens: Count
    stop_sequences: list[str] | None = None
    stream: bool | None = None


def ask_of(request: CountRequest) -> Ask:
    """The request without its dialect. Raises `wire.Refused`."""
    turns = [_turn(message) for message in request.messages]
    if request.system:
        turns.insert(0, Turn("system", text_of(request.system)[0]))
    tools = tools_of((tool for tool in request.tools or [] if "input_schema" in tool), "input_schema")
    wanted = (request.output_config or {}).get("format")
    schema = wanted.get("schema") if isinstance(wanted, dict) and wanted.get("type") == "json_schema" else None
    if wanted is not None and not isinstance(schema, dict):
        raise invalid("output_config.format needs the type json_schema and a schema", "output_config.format.schema")
    stop = request.stop_sequences if isinstance(request, MessagesRequest) else None
    return Ask(
        model=request.model,
        turns=tuple(turns),
        tools=tools,
        tool_choice=tool_choice_of(request.tool_choice, tools),
        schema=schema,
        max_tokens=request.max_tokens if isinstance(request, MessagesRequest) else None,
        stop=tuple(stop or ()),
        declared=declared(request.tools, schema),
    )


def _turn(message: Message) -> Turn:
    if isinstance(message.content, str):
        return Turn(message.role, message.content)
    results = [block for block in message.content if block.get("type") == "tool_result"]
    if not results:
        return Turn(message.role, *text_of(message.content))
    parts = [text_of(block.get("content")) for block in results]
    others, images = text_of([block for block in message.content if block.get("type") != "tool_result"])
    text = "\n".join([*(text for text, _ in parts), *filter(None, [others])])
    return Turn(message.role, text, images + sum(seen for _, seen in parts), tool_result=True)


def body(request: MessagesRequest, answer: Answer, stamp: Stamp) -> bytes:
    """The whole answer as one `message` object."""
    return dump(
        {
            **_head(request, stamp),
            "content": _content(answer, stamp),
            "stop_reason": STOP_REASONS[answer.finish],
            "stop_sequence": answer.stop_sequence,
            "usage": _usage(answer, answer.output_tokens),
        },
    )


def events(request: MessagesRequest, answer: Answer, stamp: Stamp) -> Iterator[bytes]:
    """The answer as named events: message_start, one content block with its deltas, message_delta, message_stop."""

    def named(name: str, /, **fields: Any) -> bytes:
        return event({"type": name, **fields}, name)

    opening: JsonDict = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(answer, 1)}
    yield named("message_start", message={**_head(request, stamp), **opening})
    yield named("content_block_start", index=0, content_block=_opened(answer, stamp))
    yield named("ping")
    for piece in filter(None, answer.pieces):
        yield named("content_block_delta", index=0, delta=_delta(answer, piece))
    yield named("content_block_stop", index=0)
    ending = {"stop_reason": STOP_REASONS[answer.finish], "stop_sequence": answer.stop_sequence}
    total = {key: value for key, value in _usage(answer, answer.output_tokens).items() if key.endswith("_tokens")}
    yield named("message_delta", delta=ending, usage=total)
    yield named("message_stop")


def counted(input_tokens: int) -> bytes:
    """The answer of `count_tokens`."""
    return dump({"input_tokens": input_tokens})


def _head(request: MessagesRequest, stamp: Stamp) -> JsonDict:
    return {"id": f"msg_{stamp.serial}", "type": "message", "role": "assistant", "model": request.model}


def _content(answer: Answer, stamp: Stamp) -> list[JsonDict]:
    if answer.tool is None:
        return [{"type": "text", "text": answer.text}] if answer.pieces else []
    # Arguments that the cap cut short are no JSON object, and the field can hold nothing else.
    return [{**_opened(answer, stamp), "input": json.loads(answer.text) if answer.complete else {}}]


def _opened(answer: Answer, stamp: Stamp) -> JsonDict:
    if answer.tool is None:
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": f"toolu_{stamp.serial}", "name": as_text(answer.tool), "input": {}}


def _delta(answer: Answer, piece: str) -> JsonDict:
    if answer.tool is None:
        return {"type": "text_delta", "text": piece}
    return {"type": "input_json_delta", "partial_json": piece}


def _usage(answer: Answer, output_tokens: int) -> JsonDict:
    return {
        "input_tokens": answer.input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": output_tokens,
        "service_tier": "standard",
    }
