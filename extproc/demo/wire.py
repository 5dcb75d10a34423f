"""What the demo provider's wire formats share: strict request models, message content, JSON and SSE bytes.

The surprising thing: requests are checked as strictly as the real APIs check them (a number in a string is refused),
since a demo that forgives a mistake teaches it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from extproc.demo.answers import Tool, ToolChoice
from extproc.errors import Code, Refusal

JsonDict = dict[str, Any]
Count = Annotated[int, Field(ge=1)]


class Refused(Exception):  # noqa: N818 - it carries a Refusal, as the project's vocabulary has it
    """A request that the demo provider turns away; `server` renders the refusal in the path's dialect."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Wire(BaseModel):
    """A request body: known fields are checked strictly, unknown ones pass, as new SDKs send new ones."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class StreamOptions(Wire):
    include_usage: bool = False


@dataclass(frozen=True, slots=True)
class Stamp:
    """What makes one answer unlike another: `serial` goes into its ids, `created` is unix time in seconds."""

    serial: str
    created: int

    @classmethod
    def at(cls, created: int) -> Stamp:
        return cls(secrets.token_hex(12), created)


Request = TypeVar("Request", bound=Wire)


def parse(shape: type[Request], body: bytes) -> Request:
    """`body` as `shape`. Raises `Refused` naming the first field that is missing or wrong."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(Refusal(Code.INVALID_JSON, "The body is not valid JSON.")) from None
    if not isinstance(document, dict):
        raise Refused(Refusal(Code.INVALID_TYPE, "The body must be a JSON object."))
    try:
        return shape.model_validate(document)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        code = Code.MISSING_FIELD if first["type"] == "missing" else Code.INVALID_TYPE
        param = _param(first["loc"], document)
        raise Refused(Refusal(code, f"{param or 'body'}: {first['msg']}", param)) from None


def _param(place: tuple[int | str, ...], document: object) -> str | None:
    """The dotted path of a mistake, without the names of union members that pydantic puts among its steps."""
    steps = []
    for step in place:
        match document:
            case dict():
                document = document.get(step)
            case list() if isinstance(step, int) and step < len(document):
                document = document[step]
            case _:
                break
        steps.append(str(step))
    return ".".join(steps) or None


def dump(document: object) -> bytes:
    """Compact JSON. Lone surrogates, which UTF-8 cannot carry, become question marks."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(document: object, name: str | None = None) -> bytes:
    """One server-sent event, with an `event:` line for the dialects that name theirs."""
    return (b"" if name is None else f"event: {name}\n".encode()) + b"data: " + dump(document) + b"\n\n"


def text_of(content: object) -> tuple[str, int]:
    """The text of a message's content (a string, or a list of parts of any dialect), and its number of images."""
    if isinstance(content, str):
        return content, 0
    texts: list[str] = []
    images = 0
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, Mapping) else None
        match kind:
            case "text" | "input_text" | "output_text":
                texts.append(str(part.get("text", "")))
            case "image_url" | "input_image" | "image":
                images += 1
            case "refusal":
                texts.append(str(part.get("refusal", "")))
            case _:
                texts.append(as_text(part))
    return "\n".join(texts), images


def as_text(value: object) -> str:
    """Anything declared or passed as JSON, as the text whose tokens are counted."""
    return value if isinstance(value, str) else dump(value).decode()


def declared(*parts: object) -> str:
    """The JSON text of what a prompt declares besides its messages; nothing for what is absent or empty."""
    return "".join(as_text(part) for part in parts if part)


def tools_of(tools: Iterable[JsonDict], schema_key: str) -> tuple[Tool, ...]:
    """The callable tools among flat tool declarations; hosted ones (without a schema) are not the caller's to run."""
    return tuple(
        Tool(str(tool.get("name", "")), tool.get(schema_key) or {})
        for tool in tools
        if tool.get("type", "custom") in ("function", "custom") and isinstance(tool.get(schema_key) or {}, dict)
    )


def tool_choice_of(choice: str | JsonDict | None, tools: tuple[Tool, ...]) -> ToolChoice:
    """Any dialect's `tool_choice`. Raises `Refused` when it names a tool that was not declared."""
    mode = choice if isinstance(choice, str) else "auto" if choice is None else str(choice.get("type"))
    named = choice.get("function", choice).get("name") if isinstance(choice, dict) else None
    if named is not None and mode in ("function", "tool"):
        if all(tool.name != named for tool in tools):
            raise invalid(f"tool_choice names {named!r}, which is not among the tools", "tool_choice")
        return ToolChoice("required", str(named))
    if mode in ("required", "any"):
        if not tools:
            raise invalid("tool_choice needs tools", "tool_choice")
        return ToolChoice("required")
    return ToolChoice("none" if mode == "none" else "auto")


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def invalid(message: str, param: str | None = None) -> Refused:
    """A refusal (400) of a request that is well formed and cannot be served."""
    return Refused(Refusal(Code.INVALID_REQUEST, message, param))
