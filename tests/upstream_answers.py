"""What the recording upstream says unless a test scripts it: small, literal answers of every provider endpoint.

`upstream.RecordingUpstream` asks here for each request. The surprising thing: an answer knows what it cost. `usage`
is the upstream's own count, which stands even when the client did not ask to be told it, and it is None where a
provider charges nothing: a stored response shows its old usage, and a gateway must not charge that again.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import Any

WORDS = ("Hello", " from", " the", " recording", " upstream", ", naïve", " café", " 🙂.")
TEXT = "".join(WORDS)
CREATED = 1_767_225_600

JsonDict = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. `input_tokens` is all input, cached and cache-write included, whatever the dialect says
    on the wire; `output_tokens` includes `reasoning_tokens`."""

    input_tokens: int = 11
    output_tokens: int = 7
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


NOTHING = Usage(0, 0)


@dataclass(frozen=True, slots=True)
class DefaultAnswer:
    """A whole `body`, or the `chunks` of a stream; `usage` is what it cost."""

    body: bytes | None = None
    chunks: tuple[bytes, ...] = ()
    usage: Usage | None = None


def default_answer(
    method: str, path: str, query: str, body: bytes, *, usage: Usage, model: str | None
) -> DefaultAnswer:
    """The answer to a request. `model` is the one to name; None for the one asked for."""
    asked = _asked(body)
    endpoint = re.sub(r"^.*?/v\d+/", "", path) if re.search(r"/v\d+/", path) else path.lstrip("/")
    name = model or str(asked.get("model", "test-model"))
    stream = asked.get("stream") is True
    match method, endpoint:
        case "POST", "chat/completions":
            options = asked.get("stream_options")
            told = isinstance(options, dict) and options.get("include_usage") is True
            return _chat_stream(name, usage, told=told) if stream else _whole(_chat(name, usage), usage)
        case "POST", "completions":
            options = asked.get("stream_options")
            told = isinstance(options, dict) and options.get("include_usage") is True
            return _completion_stream(name, usage, told=told) if stream else _whole(_completion(name, usage), usage)
        case "POST", "responses":
            return _response_stream(name, usage) if stream else _whole(_response(name, usage), usage)
        case "POST", "messages":
            return _message_stream(name, usage) if stream else _whole(_message(name, usage), usage)
        case "POST", "messages/count_tokens":
            return _whole({"input_tokens": usage.input_tokens}, None)
        case "POST", "embeddings":
            inputs = asked.get("input")
            return _embeddings(name, usage, len(inputs) if isinstance(inputs, list) else 1, asked)
        case "POST", "rerank":
            counted = Usage(usage.input_tokens, 0)
            results = [{"index": 0, "relevance_score": 0.9, "document": {"text": "first"}}]
            tokens = {"prompt_tokens": counted.input_tokens, "total_tokens": counted.input_tokens}
            return _whole({"id": "rerank-1", "model": name, "usage": tokens, "results": results}, counted)
        case _:
            return _uncharged(method, endpoint, query, name, usage)


def error_document(status: int, path: str) -> JsonDict:
    """An error body in the dialect that speaks on `path`."""
    message = f"scripted {status}"
    if "/messages" in path:
        return {"type": "error", "error": {"type": "api_error", "message": message}, "request_id": "req_upstream"}
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


def compact(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def sse(  # one parameter for each field that the format has
    data: str | bytes, *, event: str | None = None, id_: str | None = None, comment: str | None = None, end: str = "\n"
) -> bytes:
    """One server-sent event; a line break in `data` starts a further data line, `end` is the line end."""
    text = data.decode() if isinstance(data, bytes) else data
    lines = [] if comment is None else [f": {comment}"]
    lines += [] if event is None else [f"event: {event}"]
    lines += [] if id_ is None else [f"id: {id_}"]
    lines += [f"data: {line}" for line in text.split("\n")]
    return (end.join(lines) + end + end).encode()


def _asked(body: bytes) -> JsonDict:
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _whole(document: JsonDict, usage: Usage | None) -> DefaultAnswer:
    return DefaultAnswer(compact(document), usage=usage)


def openai_usage(usage: Usage) -> JsonDict:
    """`usage` as chat completions report it: `prompt_tokens` includes what was cached."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens, "audio_tokens": 0},
    }


def responses_usage(usage: Usage) -> JsonDict:
    """`usage` as the responses API reports it."""
    details = {"cached_tokens": usage.cached_tokens, "cache_write_tokens": usage.cache_write_tokens}
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": details,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def anthropic_usage(usage: Usage) -> JsonDict:
    """`usage` as Anthropic reports it: `input_tokens` excludes what was read from or written to the cache."""
    return {
        "input_tokens": usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
    }


def _chat_head(name: str, kind: str) -> JsonDict:
    return {"id": "chatcmpl-upstream", "object": kind, "created": CREATED, "model": name}


def _chat(name: str, usage: Usage) -> JsonDict:
    message = {"role": "assistant", "content": TEXT, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return {**_chat_head(name, "chat.completion"), "choices": [choice], "usage": openai_usage(usage)}


def _chat_stream(name: str, usage: Usage, *, told: bool) -> DefaultAnswer:
    head = _chat_head(name, "chat.completion.chunk")
    tail: JsonDict = {"usage": None} if told else {}
    deltas: list[tuple[JsonDict, str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": word}, None) for word in WORDS]
    deltas.append(({}, "stop"))
    chunks = [
        {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}], **tail}
        for delta, finish in deltas
    ]
    if told:
        chunks.append({**head, "choices": [], "usage": openai_usage(usage)})
    return DefaultAnswer(chunks=(*(sse(compact(chunk)) for chunk in chunks), sse("[DONE]")), usage=usage)


def _completion_head(name: str) -> JsonDict:
    return {"id": "cmpl-upstream", "object": "text_completion", "created": CREATED, "model": name}


def _completion(name: str, usage: Usage) -> JsonDict:
    choice = {"text": TEXT, "index": 0, "logprobs": None, "finish_reason": "stop"}
    return {**_completion_head(name), "choices": [choice], "usage": openai_usage(usage)}


def _completion_stream(name: str, usage: Usage, *, told: bool) -> DefaultAnswer:
    tail: JsonDict = {"usage": None} if told else {}
    pieces = [(word, None) for word in WORDS] + [("", "stop")]
    chunks = [
        {
            **_completion_head(name),
            "choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": finish}],
            **tail,
        }
        for text, finish in pieces
    ]
    if told:
        chunks.append({**_completion_head(name), "choices": [], "usage": openai_usage(usage)})
    return DefaultAnswer(chunks=(*(sse(compact(chunk)) for chunk in chunks), sse("[DONE]")), usage=usage)


def _item(text: str, status: str) -> JsonDict:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    content = [part] if text else []
    return {"id": "msg_upstream", "type": "message", "status": status, "role": "assistant", "content": content}


def _response(name: str, usage: Usage | None, text: str = TEXT, status: str = "completed") -> JsonDict:
    return {
        "id": "resp_upstream",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": name,
        "output": [_item(text, status)] if text else [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": None if usage is None else responses_usage(usage),
    }


def _response_stream(name: str, usage: Usage) -> DefaultAnswer:
    begun = _response(name, None, text="", status="in_progress")
    place = {"item_id": "msg_upstream", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "annotations": [], "logprobs": []}
    events: list[tuple[str, JsonDict]] = [
        ("response.created", {"response": begun}),
        ("response.in_progress", {"response": begun}),
        ("response.output_item.added", {"output_index": 0, "item": _item("", "in_progress")}),
        ("response.content_part.added", {**place, "part": {**part, "text": ""}}),
        *(("response.output_text.delta", {**place, "delta": word, "logprobs": []}) for word in WORDS),
        ("response.output_text.done", {**place, "text": TEXT, "logprobs": []}),
        ("response.content_part.done", {**place, "part": {**part, "text": TEXT}}),
        ("response.output_item.done", {"output_index": 0, "item": _item(TEXT, "completed")}),
        ("response.completed", {"response": _response(name, usage)}),
    ]
    chunks = (
        sse(compact({"type": kind, "sequence_number": number, **fields_}), event=kind)
        for number, (kind, fields_) in enumerate(events)
    )
    return DefaultAnswer(chunks=tuple(chunks), usage=usage)


def _message(name: str, usage: Usage) -> JsonDict:
    return {
        "id": "msg_upstream",
        "type": "message",
        "role": "assistant",
        "model": name,
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": anthropic_usage(usage),
    }


def _message_stream(name: str, usage: Usage) -> DefaultAnswer:
    opening = {**anthropic_usage(usage), "output_tokens": 1}
    message = {**_message(name, usage), "content": [], "stop_reason": None, "usage": opening}
    events: list[tuple[str, JsonDict]] = [
        ("message_start", {"message": message}),
        ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
        ("ping", {}),
        *(("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": word}}) for word in WORDS),
        ("content_block_stop", {"index": 0}),
        (
            "message_delta",
            {
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {"output_tokens": usage.output_tokens},
            },
        ),
        ("message_stop", {}),
    ]
    chunks = tuple(sse(compact({"type": kind, **fields_}), event=kind) for kind, fields_ in events)
    return DefaultAnswer(chunks=chunks, usage=usage)


def _embeddings(name: str, usage: Usage, inputs: int, asked: JsonDict) -> DefaultAnswer:
    vector: object = "AACAPwAAAAA=" if asked.get("encoding_format") == "base64" else [1.0, 0.0]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index in range(inputs)]
    tokens = {"prompt_tokens": usage.input_tokens, "total_tokens": usage.input_tokens}
    document = {"object": "list", "data": data, "model": name, "usage": tokens}
    return _whole(document, Usage(usage.input_tokens, 0))


def _uncharged(method: str, endpoint: str, query: str, name: str, usage: Usage) -> DefaultAnswer:
    first, _, rest = endpoint.partition("/")
    match method, first:
        case "GET", "responses" if rest and "stream=true" in query:
            return DefaultAnswer(chunks=_response_stream(name, usage).chunks)
        case "GET", "responses" if rest and "/" not in rest:
            return _whole(_response(name, usage), None)
        case "DELETE", _:
            return _whole({"id": rest, "object": first.removesuffix("s"), "deleted": True}, None)
        case "POST", "moderations":
            return _whole({"id": "modr-1", "model": name, "results": [{"flagged": False, "categories": {}}]}, None)
        case "POST", "images":
            return _whole({"created": CREATED, "data": [{"b64_json": "aGk="}]}, None)
        case "POST", "audio":
            return _whole({"text": TEXT}, None)
        case "POST", "files":
            document = {"id": "file-1", "object": "file", "bytes": 4, "created_at": CREATED, "filename": "a.jsonl"}
            return _whole({**document, "purpose": "batch", "status": "processed"}, None)
        case _, "batches" if method == "POST" or rest:
            document = {"id": "batch_1", "object": "batch", "endpoint": "/v1/chat/completions", "status": "validating"}
            window = {"input_file_id": "file-1", "completion_window": "24h", "created_at": CREATED}
            return _whole({**document, **window}, None)
        case "GET", "models":
            model = {"id": "upstream-model", "object": "model", "created": CREATED, "owned_by": "upstream"}
            return _whole({"object": "list", "data": [model]}, None)
        case "GET", _:
            return _whole({"object": "list", "data": [], "has_more": False}, None)
        case _:
            return _whole({"object": first, "id": f"{first}-1"}, None)
