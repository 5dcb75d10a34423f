"""What the demo provider says: from a request, stripped of its dialect, to an answer, cut into tokens.

Every wire format parses into an `Ask` and renders an `Answer`. Both are values and this module does no I/O, so an
answer depends on the request alone: the same question gets the same words, which makes it fit for tests and docs.
The surprising thing: it calls tools without understanding them. It picks a tool that the user's text names (or one
that the caller forces) and fills in the smallest arguments that the tool's JSON schema accepts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from extproc.demo.schema import minimal
from extproc.demo.tokens import Split

TOKENS_PER_MESSAGE = 3
TOKENS_PER_REPLY = 3
TOKENS_PER_IMAGE = 85
"""OpenAI's published rules: each message is framed by 3 tokens, the reply is primed with 3, a low-detail image is 85.
Source: the OpenAI cookbook's "How to count tokens with tiktoken", and the vision guide."""

SUMMARY_CHARS = 200

JsonObject = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the conversation. `images` counts what the demo provider cannot see but does charge for."""

    role: str
    text: str
    images: int = 0
    tool_result: bool = False


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the caller offers. `schema` is the JSON schema of its arguments."""

    name: str
    schema: JsonObject


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether a tool is called: never, when the text names one, always, or always the one named `name`."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request in no dialect. `max_tokens` None means no cap; `schema` is what the answer must conform to.

    `declared` is what the prompt holds besides its turns (tools, schemas) as JSON text, for the count.
    """

    model: str
    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    schema: JsonObject | None = None
    json_object: bool = False
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    declared: str = ""


class Finish(Enum):
    """Why an answer ends. Each dialect has its own word for each."""

    END = "end"
    LENGTH = "length"
    STOP_SEQUENCE = "stop_sequence"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: `pieces`, one for each token, are its text or, when `tool` is set, that tool's arguments as JSON.

    `input_tokens` and `output_tokens` are what the usage reports; a tool's name counts towards the output. `complete`
    is False when the cap cut it short.
    """

    pieces: tuple[str, ...]
    finish: Finish
    input_tokens: int
    output_tokens: int
    tool: str | None = None
    stop_sequence: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def complete(self) -> bool:
        return self.finish is not Finish.LENGTH


def answer(ask: Ask, split: Split) -> Answer:
    """Answer `ask`. Raises `schema.UnsatisfiableError` when no value for a requested JSON schema is known."""
    input_tokens = prompt_tokens(ask, split)
    tool = _chosen_tool(ask)
    if tool is not None:
        arguments = json.dumps(minimal(tool.schema), ensure_ascii=False)
        name_tokens = len(split(tool.name))
        pieces, capped = _capped(split(arguments), None if ask.max_tokens is None else ask.max_tokens - name_tokens)
        finish = Finish.LENGTH if capped else Finish.TOOL
        produced = name_tokens + len(pieces)
        output_tokens = produced if ask.max_tokens is None else min(produced, ask.max_tokens)
        return Answer(pieces, finish, input_tokens, output_tokens, tool=tool.name)
    text, stop_sequence = _stopped(_said(ask, split), ask.stop)
    pieces, capped = _capped(split(text), ask.max_tokens)
    finish = Finish.LENGTH if capped else Finish.END if stop_sequence is None else Finish.STOP_SEQUENCE
    return Answer(pieces, finish, input_tokens, len(pieces), stop_sequence=None if capped else stop_sequence)


def prompt_tokens(ask: Ask, split: Split) -> int:
    """The prompt's tokens: roles and texts, the framing of each message, images, and the JSON of what was declared."""
    turns = sum(
        TOKENS_PER_MESSAGE + len(split(turn.role)) + len(split(turn.text)) + TOKENS_PER_IMAGE * turn.images
        for turn in ask.turns
    )
    return turns + TOKENS_PER_REPLY + len(split(ask.declared))


def _chosen_tool(ask: Ask) -> Tool | None:
    # A tool's result is always answered in text: a demo that called again would loop any agent for ever.
    if not ask.tools or ask.tool_choice.mode == "none" or (ask.turns and ask.turns[-1].tool_result):
        return None
    if ask.tool_choice.name is not None:
        return next((tool for tool in ask.tools if tool.name == ask.tool_choice.name), None)
    question = _last_question(ask).casefold()
    named = next((tool for tool in ask.tools if tool.name and tool.name.casefold() in question), None)
    return named or (ask.tools[0] if ask.tool_choice.mode == "required" else None)


def _said(ask: Ask, split: Split) -> str:
    question = _last_question(ask)
    if ask.schema is not None:
        return json.dumps(minimal(ask.schema), ensure_ascii=False)
    if ask.json_object:
        document = {"provider": "extproc demo", "model": ask.model, "you_wrote": _summary(question)}
        return json.dumps(document, ensure_ascii=False)
    if ask.turns and ask.turns[-1].tool_result:
        return f"This is the extproc demo provider. Your tool returned: {_summary(ask.turns[-1].text)}"
    lines = [
        f"This is the extproc demo provider answering as {ask.model!r}: not a language model, but a real request.",
        f"You wrote {_tokens(len(split(question)))}: {_summary(question)}",
    ]
    if ask.tools:
        lines.append(f"I call a tool when your message names it: {', '.join(tool.name for tool in ask.tools)}.")
    lines.append(
        "Try next: ask for a stream, run `extproc spend FILE --by team,model` to see what this cost, or set"
        " OPENAI_API_KEY or ANTHROPIC_API_KEY and start again to reach a real model through the same address."
    )
    return "\n".join(lines)


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _last_question(ask: Ask) -> str:
    return next((turn.text for turn in reversed(ask.turns) if turn.role == "user" and not turn.tool_result), "")


def _summary(text: str) -> str:
    flat = " ".join(text.split())
    return f'"{flat}"' if len(flat) <= SUMMARY_CHARS else f'"{flat[:SUMMARY_CHARS]}..."'


def _stopped(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    found = min(((text.find(word), word) for word in stop if word and word in text), default=None)
    return (text, None) if found is None else (text[: found[0]], found[1])


def _capped(pieces: list[str], cap: int | None) -> tuple[tuple[str, ...], bool]:
    return (tuple(pieces), False) if cap is None or len(pieces) <= cap else (tuple(pieces[: max(cap, 0)]), True)
