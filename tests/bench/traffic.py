"""The bytes that pass: chat requests of any size, and the answers of the fast upstream. Built once, sent many times.

Shared by `upstream` and `load`. The surprising thing: a request tells the upstream how to answer in the text of its
first message (`chunks=20`), because that is all that every gateway passes on as it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, cycle

MODEL = "gpt-4o-mini"
HOLD = -1
"""As a number of chunks: one, and then silence until the client leaves."""
MARK = b"chunks="
MARK_WITHIN_BYTES = 2048
"""The upstream looks for the mark in this much of a body, so that it need not keep large ones."""

_PROSE = (
    "The gateway reads who asks and what for, decides once, and then leaves the bytes to the proxy. A request that "
    "nobody may send never reaches a provider, and one that is sent is written down with what it used and cost. "
)
_MESSAGE_BYTES = 1500
_TOKENS_PER_BYTE = 0.21


@dataclass(frozen=True, slots=True)
class Chat:
    """Chat requests of one kind: `body_bytes` each, with `keys` keys and `models` models in turn.

    `key` and `model` are formats that take a number, or plain text; the numbers are apart by the strides. `chunks` 0
    asks for JSON, any other number for a stream.
    """

    key: str
    model: str = MODEL
    body_bytes: int = 2048
    chunks: int = 0
    keys: int = 1
    models: int = 1
    key_stride: int = 1
    model_stride: int = 1
    headers: tuple[str, ...] = ()

    def requests(self, port: int) -> list[bytes]:
        """Every distinct request, as the bytes on a connection to `port`."""
        models = [_named(self.model, number * self.model_stride) for number in range(self.models)]
        keys = [_named(self.key, number * self.key_stride) for number in range(self.keys)]
        bodies = [chat_body(model, self.body_bytes, self.chunks) for model in models]
        pairs = (
            (keys[number % self.keys], bodies[number % self.models]) for number in range(max(len(keys), len(models)))
        )
        return [_head(port, key, body, self.headers) + body for key, body in pairs]


def _named(form: str, number: int) -> str:
    return form.format(number) if "{" in form else form


def _head(port: int, key: str, body: bytes, headers: tuple[str, ...]) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"host: 127.0.0.1:{port}",
        f"authorization: Bearer {key}",
        "content-type: application/json",
        "accept: application/json",
        "user-agent: OpenAI/Python 2.0.0",
        *headers,
        f"content-length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def chat_body(model: str, size_bytes: int, chunks: int) -> bytes:
    """A chat request of `size_bytes`, to the byte where it is at least 300: a talk in messages of about 1.5 KB."""
    prose = cycle(_PROSE)
    messages = [
        {"role": "system", "content": "You are a careful assistant."},
        {"role": "user", "content": f"chunks={chunks} "},
    ]
    document = {"model": model, "messages": messages, "temperature": 0.2, "max_tokens": 256, "stream": chunks != 0}
    for turn in count():
        missing = size_bytes - len(json.dumps(document, separators=(",", ":")))
        if missing <= 0:
            break
        messages[-1]["content"] += "".join(next(prose) for _ in range(min(missing, _MESSAGE_BYTES)))
        if missing > _MESSAGE_BYTES + 100:
            messages.append({"role": ("assistant", "user")[turn % 2], "content": ""})
    return json.dumps(document, separators=(",", ":")).encode()


@lru_cache
def json_answer(request_bytes: int) -> bytes:
    """A chat completion of about 2 KB with the usage of a request of that size, head and all."""
    text = (_PROSE * 8)[:1600]
    answer = {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1767225600,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": _usage(request_bytes),
    }
    body = json.dumps(answer, separators=(",", ":")).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def stream_head() -> bytes:
    """Status and headers of a stream."""
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def stream_chunk() -> bytes:
    """One event of a stream, as one chunk of the transfer encoding."""
    return _chunk(_event([{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]))


@lru_cache
def stream_end(request_bytes: int) -> bytes:
    """The usage event, `[DONE]` and the end of the transfer encoding."""
    return _chunk(_event([], usage=_usage(request_bytes))) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _event(choices: list[dict[str, object]], **more: object) -> bytes:
    head = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1767225600, "model": MODEL}
    return b"data: " + json.dumps({**head, "choices": choices, **more}, separators=(",", ":")).encode() + b"\n\n"


def _usage(request_bytes: int) -> dict[str, int]:
    """In proportion to the request, as a provider's is: the gateway learns from it, and counts anew if surprised."""
    asked = round(request_bytes * _TOKENS_PER_BYTE)
    return {"prompt_tokens": asked, "completion_tokens": 300, "total_tokens": asked + 300}


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)
