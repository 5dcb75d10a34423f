"""OpenAI's `/v1/chat/completions`: request to `Ask`, `Answer` to JSON or chunks.

Source: OpenAI API reference, chat completions and its streaming events. The surprising thing: with
`stream_options.include_usage` every chunk carries `"usage": null`, and only then comes one with no choices and the
figures; without it the field is absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from extproc.demo.answers import Answer, Ask, Finish, Turn
from extproc.demo.wire import (
    Count,
    JsonDict,
    Stamp,
    StreamOptions,
    Wire,
    declared,
    dump,
    event,
    invalid,
    stops_of,
    text_of,
    tool_choice_of,
    tools_of,
)

DONE = b"data: [DONE]\n\n"
FINGERPRINT = "fp_extproc_demo"

FINISH_REASONS = {
    Finish.END: "stop",
    Finish.STOP_SEQUENCE: "stop",
    Finish.LENGTH: "length",
    Finish.TOOL: "tool_calls",
}


class ChatMessage(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[JsonDict] | None = None
    tool_calls: list[JsonDict] | None = None


class ChatRequest(Wire):
    model: str = Field(min_length=1)
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: int | None = Field(None, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[JsonDict] | None = None
    tool_choice: str | JsonDict | None = None
    response_format: JsonDict | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def ask_of(request: ChatRequest) -> Ask:
    """The request without its dialect. Raises `wire.Refused`."""
    functions = [
        {"type": "function", **function}
        for tool in request.tools or []
        if tool.get("type") == "function" and isinstance(function := tool.get("function"), dict)
    ]
    tools = tools_of(functions, "parameters")
    wanted = request.response_format or {}
    schema = wanted["json_schema"].get("schema") if isinstance(wanted.get("json_schema"), dict) else None
    if wanted.get("type") == "json_schema" and not isinstance(schema, dict):
        raise invalid("response_format.json_schema needs a schema", "response_format.json_schema.schema")
    return Ask(
        model=request.model,
        turns=tuple(_turn(message) for message in request.messages),
        tools=tools,
        tool_choice=tool_choice_of(request.tool_choice, tools),
        schema=schema if wanted.get("type") == "json_schema" else None,
        json_object=wanted.get("type") == "json_object",
        max_tokens=request.max_completion_tokens or request.max_tokens,
        stop=stops_of(request.stop),
        declared=declared(request.tools, schema),
    )


def _turn(message: ChatMessage) -> Turn:
    text, images = text_of(message.content)
    called = declared(message.tool_calls)
    return Turn(message.role, text + called, images, tool_result=message.role in ("tool", "function"))


def body(request: ChatRequest, answer: Answer, stamp: Stamp) -> bytes:
    """The whole answer as one `chat.completion` object."""
    choices = request.n or 1
    return dump(
        {
            **_head(request, stamp, "chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": _message(answer, stamp, index),
                    "logprobs": None,
                    "finish_reason": FINISH_REASONS[answer.finish],
                }
                for index in range(choices)
            ],
            "usage": usage(answer, choices),
            "service_tier": "default",
            "system_fingerprint": FINGERPRINT,
        },
    )


def events(request: ChatRequest, answer: Answer, stamp: Stamp) -> Iterator[bytes]:
    """The answer as chunks: role, one delta a token, finish, usage where asked for, `[DONE]`."""
    head = {
        **_head(request, stamp, "chat.completion.chunk"),
        "service_tier": "default",
        "system_fingerprint": FINGERPRINT,
    }
    tail: JsonDict = {"usage": None} if request.include_usage else {}
    choices = range(request.n or 1)

    def chunk(index: int, delta: JsonDict, finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**head, "choices": [choice], **tail})

    for index in choices:
        yield chunk(index, _opening(answer, stamp, index))
    for piece in filter(None, answer.pieces):
        for index in choices:
            yield chunk(index, _delta(answer, piece))
    for index in choices:
        yield chunk(index, {}, FINISH_REASONS[answer.finish])
    if request.include_usage:
        yield event({**head, "choices": [], "usage": usage(answer, len(choices))})
    yield DONE


def usage(answer: Answer, choices: int) -> JsonDict:
    """The prompt is charged once and each choice's output apart, as the API does."""
    completion_tokens = answer.output_tokens * choices
    return {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": answer.input_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _head(request: ChatRequest, stamp: Stamp, kind: str) -> JsonDict:
    return {"id": f"chatcmpl-{stamp.serial}", "object": kind, "created": stamp.created, "model": request.model}


def _message(answer: Answer, stamp: Stamp, index: int) -> JsonDict:
    message: JsonDict = {"role": "assistant", "content": None, "refusal": None, "annotations": []}
    if answer.tool is None:
        return {**message, "content": answer.text}
    return {**message, "tool_calls": [_call(answer, stamp, index, answer.text)]}


def _call(answer: Answer, stamp: Stamp, index: int, arguments: str) -> JsonDict:
    function = {"name": answer.tool, "arguments": arguments}
    return {"id": f"call_{stamp.serial}{index}", "type": "function", "function": function}


def _opening(answer: Answer, stamp: Stamp, index: int) -> JsonDict:
    if answer.tool is None:
        return {"role": "assistant", "content": "", "refusal": None}
    call = {"index": 0, **_call(answer, stamp, index, "")}
    return {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}


def _delta(answer: Answer, piece: str) -> JsonDict:
    if answer.tool is None:
        return {"content": piece}
    return {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
