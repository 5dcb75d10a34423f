"""OpenAI's `/v1/responses`: request to `Ask`, `Answer` to a response object or its named events.

Source: OpenAI API reference, responses and its streaming events. The surprising thing: a stream repeats the whole
response object in its first two events and its last, and ends without `[DONE]`. The demo provider keeps no
responses, so a `previous_response_id` is refused rather than ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from pydantic import Field

from extproc.demo.answers import Answer, Ask, Turn
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

NOT_KEPT = "The demo provider keeps no responses; send the whole conversation as input."


class ResponseRequest(Wire):
    model: str = Field(min_length=1)
    input: str | list[JsonDict] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    tools: list[JsonDict] | None = None
    tool_choice: str | JsonDict | None = None
    text: JsonDict | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None


def ask_of(request: ResponseRequest) -> Ask:
    """The request without its dialect. Raises `wire.Refused`."""
    if request.previous_response_id is not None:
        raise invalid(NOT_KEPT, "previous_response_id")
    turns = [Turn("user", request.input)] if isinstance(request.input, str) else [_turn(item) for item in request.input]
    if request.instructions is not None:
        turns.insert(0, Turn("system", request.instructions))
    tools = tools_of((tool for tool in request.tools or [] if tool.get("type") == "function"), "parameters")
    wanted = (request.text or {}).get("format")
    wanted = wanted if isinstance(wanted, dict) else {}
    schema = wanted.get("schema") if wanted.get("type") == "json_schema" else None
    if wanted.get("type") == "json_schema" and not isinstance(schema, dict):
        raise invalid("text.format needs a schema", "text.format.schema")
    return Ask(
        model=request.model,
        turns=tuple(turns),
        tools=tools,
        tool_choice=tool_choice_of(request.tool_choice, tools),
        schema=schema,
        json_object=wanted.get("type") == "json_object",
        max_tokens=request.max_output_tokens,
        declared=declared(request.tools, schema),
    )


def _turn(item: JsonDict) -> Turn:
    match item.get("type", "message"):
        case "message":
            text, images = text_of(item.get("content"))
            return Turn(as_text(item.get("role", "user")), text, images)
        case "function_call_output":
            text, images = text_of(item.get("output"))
            return Turn("tool", text, images, tool_result=True)
        case _:
            return Turn("assistant", as_text(item))


def body(request: ResponseRequest, answer: Answer, stamp: Stamp) -> bytes:
    """The whole answer as one `response` object."""
    return dump(_response(request, stamp, _closing_status(answer), answer))


def events(request: ResponseRequest, answer: Answer, stamp: Stamp) -> Iterator[bytes]:
    """The answer as events, numbered from 0: created, in_progress, one output item with its deltas, the end."""
    numbers = count()

    def named(name: str, /, **fields: Any) -> bytes:
        kind = f"response.{name}"
        return event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    started = _response(request, stamp, "in_progress", None)
    yield named("created", response=started)
    yield named("in_progress", response=started)
    place: JsonDict = {"item_id": _item_id(answer, stamp), "output_index": 0}
    yield named("output_item.added", output_index=0, item=_item(answer, stamp, "in_progress"))
    if answer.tool is None:
        place["content_index"] = 0
        yield named("content_part.added", **place, part=_part(""))
        for piece in filter(None, answer.pieces):
            yield named("output_text.delta", **place, delta=piece, logprobs=[])
        yield named("output_text.done", **place, text=answer.text, logprobs=[])
        yield named("content_part.done", **place, part=_part(answer.text))
    else:
        for piece in filter(None, answer.pieces):
            yield named("function_call_arguments.delta", **place, delta=piece)
        if answer.complete:
            yield named("function_call_arguments.done", **place, name=answer.tool, arguments=answer.text)
    status = _closing_status(answer)
    yield named("output_item.done", output_index=0, item=_item(answer, stamp, status))
    yield named(status, response=_response(request, stamp, status, answer))


def _closing_status(answer: Answer) -> str:
    return "completed" if answer.complete else "incomplete"


def _item_id(answer: Answer, stamp: Stamp) -> str:
    return f"{'msg' if answer.tool is None else 'fc'}_{stamp.serial}"


def _part(text: str) -> JsonDict:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _item(answer: Answer, stamp: Stamp, status: str) -> JsonDict:
    begun = status == "in_progress"
    head = {"id": _item_id(answer, stamp), "status": status}
    if answer.tool is None:
        content = [] if begun else [_part(answer.text)]
        return {**head, "type": "message", "role": "assistant", "content": content}
    call = {"call_id": f"call_{stamp.serial}", "name": answer.tool, "arguments": "" if begun else answer.text}
    return {**head, "type": "function_call", **call}


def _response(request: ResponseRequest, stamp: Stamp, status: str, answer: Answer | None) -> JsonDict:
    return {
        "id": f"resp_{stamp.serial}",
        "object": "response",
        "created_at": stamp.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "model": request.model,
        "output": [] if answer is None else [_item(answer, stamp, status)],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"}, "verbosity": "medium", **(request.text or {})},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_logprobs": 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None if answer is None else _usage(answer),
        "user": request.user,
    }


def _usage(answer: Answer) -> JsonDict:
    return {
        "input_tokens": answer.input_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.input_tokens + answer.output_tokens,
    }
