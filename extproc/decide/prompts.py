"""Prompts: what in a request becomes input tokens, for each endpoint's body, added up in a `Tally`.

Called by `tokens.count_input_tokens` with a body that the client wrote, so every field may be of any type: what is not
of the documented type adds nothing, and the provider will refuse it. The surprising thing: no function here calls
itself. Tool schemas and content blocks nest as deep as a client likes, so each walk keeps its own stack.

Sources: OpenAI's cookbook, "How to count tokens with tiktoken" (3 tokens a message, 1 a name, 3 for the reply, and the
constants of function definitions); Anthropic's "Tool use" (tokens of the hidden system prompt). What neither publishes
is estimated, and the tally says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, Protocol

import msgspec

from extproc.decide.vocabulary import EncodingName

Json = Any
_MESSAGE_TOKENS = 3
_REPLY_TOKENS = 3
_CALL_TOKENS = 3
_FUNCTION_TOKENS: Mapping[EncodingName, int] = {"o200k_base": 7, "cl100k_base": 10}
_FUNCTIONS_END_TOKENS = 12
_PROPERTY_TOKENS = 3
_ENUM_TOKENS, _ENUM_ITEM_TOKENS = -3, 3

_CLAUDE_MESSAGE_TOKENS, _CLAUDE_REPLY_TOKENS = 4, 3
_CLAUDE_TOOLS_TOKENS = 346

_AUDIO_BYTES_PER_TOKEN = 800
"""10 tokens a second (OpenAI) of MP3 at 64 kbit/s; uncompressed audio has fewer tokens for its bytes."""
_FILE_BYTES_PER_TOKEN = 20
"""A PDF page is some 80 kB and, as text and picture, some 4,000 tokens."""
_PAGE_TOKENS, _MOST_FILE_TOKENS, _UNSEEN_FILE_TOKENS = 1_500, 450_000, 15_000
_LONGEST_INTEGER_BITS = 10_000


class Tally(Protocol):
    """Where a walk puts what it finds."""

    @property
    def encoding(self) -> EncodingName: ...

    def text(self, text: object) -> None:
        """Adds a text's tokens; anything but a string adds nothing."""

    def add(self, tokens: int) -> None:
        """Adds tokens that a published rule names."""

    def estimate(self, tokens: int = 0) -> None:
        """Adds tokens that no published rule names; the total is inexact from here on."""

    def image(self, *, url: object = None, data: object = None, detail: object = None) -> None:
        """Adds a picture: by URL (a data URL holds its size), or by its base64 data."""


def chat(body: Mapping[str, Json], tally: Tally) -> None:
    """`/v1/chat/completions`."""
    for message in _maps(body.get("messages")):
        _message(message, tally)
        for call in _maps(message.get("tool_calls")):
            _call(_map(call.get("function")) or _map(call.get("custom")), tally)
        if "function_call" in message:
            _call(_map(message["function_call"]), tally)
    tally.add(_REPLY_TOKENS)
    _tools(body.get("tools"), tally)
    _functions(list(_maps(body.get("functions"))), tally)
    _choice(body, tally)
    response_format = _map(body.get("response_format"))
    if response_format.get("type") == "json_schema":
        _json(response_format.get("json_schema"), tally)


def responses(body: Mapping[str, Json], tally: Tally) -> None:
    """`/v1/responses`. What the provider keeps (a conversation, a prompt template) cannot be seen here."""
    if isinstance(body.get("instructions"), str):
        _message({"role": "system", "content": body["instructions"]}, tally)
    if isinstance(body.get("input"), str):
        _message({"role": "user", "content": body["input"]}, tally)
    for item in _maps(body.get("input")):
        _item(item, tally)
    tally.add(_REPLY_TOKENS)
    _tools(body.get("tools"), tally)
    _choice(body, tally)
    text_format = _map(_map(body.get("text")).get("format"))
    if text_format.get("type") == "json_schema":
        _json(text_format, tally)
    if any(body.get(name) is not None for name in ("previous_response_id", "conversation", "prompt")):
        tally.estimate()


def completions(body: Mapping[str, Json], tally: Tally) -> None:
    """`/v1/completions`: texts or token arrays, one or several."""
    _texts_or_tokens(body.get("prompt"), tally)
    tally.text(body.get("suffix"))


def embeddings(body: Mapping[str, Json], tally: Tally) -> None:
    """`/v1/embeddings`: texts or token arrays, one or several."""
    _texts_or_tokens(body.get("input"), tally)


def messages(body: Mapping[str, Json], tally: Tally) -> None:
    """`/v1/messages` and `/v1/messages/count_tokens`. Anthropic publishes neither its tokens nor its format."""
    tally.estimate(_CLAUDE_REPLY_TOKENS)
    _blocks(body.get("system"), tally)
    for message in _maps(body.get("messages")):
        tally.estimate(_CLAUDE_MESSAGE_TOKENS)
        _blocks(message.get("content"), tally)
    tools = list(_maps(body.get("tools")))
    if tools:
        tally.estimate(_CLAUDE_TOOLS_TOKENS)
    for tool in tools:
        tally.text(json_text(tool))


COUNTED: Mapping[str, Callable[[Mapping[str, Json], Tally], None]] = {
    "chat": chat,
    "responses": responses,
    "completions": completions,
    "embeddings": embeddings,
    "messages": messages,
    "count_tokens": messages,
}


def _message(message: Mapping[str, Json], tally: Tally) -> None:
    tally.add(_MESSAGE_TOKENS)
    tally.text(message.get("role"))
    if isinstance(message.get("name"), str):
        tally.text(message["name"])
        tally.add(1)
    for name in ("content", "refusal", "reasoning_content"):
        _parts(message.get(name), tally)


def _parts(content: Json, tally: Tally) -> None:
    """The content of an OpenAI message: a text, or parts, which do not nest."""
    tally.text(content)
    for part in _maps(content):
        match part.get("type"):
            case "text" | "input_text" | "output_text" | "summary_text" | "reasoning_text":
                tally.text(part.get("text"))
            case "refusal":
                tally.text(part.get("refusal"))
            case "image_url":
                image = _map(part.get("image_url"))
                tally.image(url=image.get("url"), detail=image.get("detail"))
            case "input_image" | "computer_screenshot":
                tally.image(url=part.get("image_url"), detail=part.get("detail"))
            case "input_audio":
                audio = _map(part.get("input_audio")) or part
                tally.estimate(_base64_bytes(audio.get("data")) // _AUDIO_BYTES_PER_TOKEN + 1)
            case "file" | "input_file":
                _file((_map(part.get("file")) or part).get("file_data"), tally)
            case _:
                _json(part, tally)


def _item(item: Mapping[str, Json], tally: Tally) -> None:
    """One element of the Responses API's `input`."""
    match item.get("type", "message"):
        case "message":
            _message(item, tally)
        case "function_call" | "custom_tool_call":
            _call(item, tally)
        case "function_call_output" | "custom_tool_call_output" | "computer_call_output":
            tally.estimate(_MESSAGE_TOKENS)
            output = item.get("output")
            _parts([output] if isinstance(output, dict) else output, tally)
        case "reasoning":
            tally.estimate(_MESSAGE_TOKENS)
            _parts(item.get("summary"), tally)
            _parts(item.get("content"), tally)
        case "item_reference":
            tally.estimate()
        case _:
            _json(item, tally)


def _call(call: Mapping[str, Json], tally: Tally) -> None:
    tally.estimate(_CALL_TOKENS)
    tally.text(call.get("name"))
    tally.text(call.get("arguments"))
    tally.text(call.get("input"))


def _choice(body: Mapping[str, Json], tally: Tally) -> None:
    for name in ("tool_choice", "function_call"):
        choice = body.get(name)
        if isinstance(choice, dict):
            tally.estimate(4)
            tally.text((_map(choice.get("function")) or choice).get("name"))
        elif choice == "none":
            tally.add(1)


def _tools(tools: Json, tally: Tally) -> None:
    functions = []
    for tool in _maps(tools):
        if tool.get("type") == "function":
            functions.append(_map(tool.get("function")) or tool)
        else:  # custom tools and the provider's own, whose prompts nobody publishes
            _json(tool, tally)
    _functions(functions, tally)


def _functions(functions: list[Mapping[str, Json]], tally: Tally) -> None:
    for function in functions:
        tally.add(_FUNCTION_TOKENS[tally.encoding])
        tally.text(f"{_line(function.get('name'))}:{_line(function.get('description'))}")
        _properties(_map(function.get("parameters")), tally)
    if functions:
        tally.add(_FUNCTIONS_END_TOKENS)


def _properties(schema: Mapping[str, Json], tally: Tally) -> None:
    """A function's parameters. The cookbook's constants cover flat ones; nested ones count the same, as an estimate."""
    waiting = [schema]
    while waiting:
        inner = waiting.pop()
        properties = _map(inner.get("properties"))
        if properties:
            tally.add(_PROPERTY_TOKENS)
        for name, value in properties.items():
            field = _map(value)
            tally.add(_PROPERTY_TOKENS)
            tally.text(f"{name}:{_line(field.get('type'))}:{_line(field.get('description'))}")
            _enum(field.get("enum"), tally)
            if field.get("properties"):
                tally.estimate()
                waiting.append(field)
            else:
                _keywords(field, tally)
        _keywords(inner, tally)


def _keywords(schema: Mapping[str, Json], tally: Tally) -> None:
    """What a schema nests by other words than `properties`: `items`, `anyOf`, `$defs`, ..."""
    for keyword, inner in schema.items():
        if isinstance(inner, dict | list) and keyword not in _SAID_ALREADY:
            _json(inner, tally)


_SAID_ALREADY = frozenset({"properties", "type", "enum", "required"})


def _enum(values: Json, tally: Tally) -> None:
    if not isinstance(values, list) or not values:
        return
    tally.add(_ENUM_TOKENS)
    for value in values:
        tally.add(_ENUM_ITEM_TOKENS)
        tally.text(value if isinstance(value, str) else json_text(value))


def _line(value: Json) -> str:
    """A name, type or description as the rendered definition holds it: without its full stop."""
    if isinstance(value, list):
        return "|".join(part for part in value if isinstance(part, str))
    return value.removesuffix(".") if isinstance(value, str) else ""


def _blocks(content: Json, tally: Tally) -> None:
    """Anthropic content: a text, or blocks, which nest in tool results and documents."""
    waiting = [content]
    while waiting:
        node = waiting.pop()
        tally.text(node)
        for block in _maps(node):
            inner = _block(block, tally)
            if inner is not None:
                waiting.append(inner)


def _block(block: Mapping[str, Json], tally: Tally) -> Json:
    """Adds one block and returns the content inside it, if it has any."""
    source = _map(block.get("source"))
    match block.get("type"):
        case "text":
            tally.text(block.get("text"))
        case "thinking":
            tally.text(block.get("thinking"))
        case "image":
            tally.image(url=source.get("url"), data=source.get("data"))
        case "document" if source.get("type") in ("text", "content"):
            tally.text(block.get("title"))
            tally.text(block.get("context"))
            tally.text(source.get("data"))
            return source.get("content")
        case "document":
            _file(source.get("data"), tally)
        case "tool_use" | "server_tool_use" | "mcp_tool_use":
            tally.text(block.get("name"))
            tally.text(json_text(block.get("input")))
        case "tool_result" | "mcp_tool_result" | "search_result":
            tally.text(block.get("title"))
            return block.get("content")
        case "redacted_thinking":  # its thinking was measured when it was output; its size bounds it
            tally.estimate(_base64_bytes(block.get("data")) // 4)
        case _:
            _json(block, tally)
    return None


def _file(data: Json, tally: Tally) -> None:
    size_bytes = _base64_bytes(data)
    if size_bytes == 0:
        tally.estimate(_UNSEEN_FILE_TOKENS)
    else:
        tally.estimate(min(_MOST_FILE_TOKENS, max(_PAGE_TOKENS, size_bytes // _FILE_BYTES_PER_TOKEN)))


def _texts_or_tokens(value: Json, tally: Tally) -> None:
    tally.text(value)
    if isinstance(value, list):
        for item in value:
            if isinstance(item, str):
                tally.text(item)
            else:
                tally.add(len(item) if isinstance(item, list) else 1)


def _json(value: Json, tally: Tally) -> None:
    """Whatever has no published rule: the tokens of its JSON text."""
    tally.estimate()
    tally.text(json_text(value))


def json_text(value: Json) -> str:
    """`value` as compact JSON; deeper than an encoder goes, its words and brackets."""
    try:
        return msgspec.json.encode(value).decode()
    except (RecursionError, ValueError, OverflowError):  # too deep, half a surrogate pair, beyond 64 bits
        return " ".join(_words(value))


def _words(value: Json) -> Iterator[str]:
    waiting: list[Iterator[Json]] = [iter((value,))]
    while waiting:
        node = next(waiting[-1], _END)
        if node is _END:
            waiting.pop()
        elif isinstance(node, dict):
            yield "{"
            waiting.append(chain.from_iterable(node.items()))
        elif isinstance(node, list):
            yield "["
            waiting.append(iter(node))
        else:
            yield _scalar(node)


_END = object()


def _scalar(value: Json) -> str:
    if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER_BITS:
        return f"{value:x}"  # decimal digits would take quadratic time
    return str(value)


def _base64_bytes(data: Json) -> int:
    return len(data) * 3 // 4 if isinstance(data, str) else 0


def _map(value: Json) -> Mapping[str, Json]:
    return value if isinstance(value, dict) else {}


def _maps(value: Json) -> Iterator[Mapping[str, Json]]:
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())
