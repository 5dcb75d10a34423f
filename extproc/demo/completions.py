"""OpenAI's `/v1/completions`: the API before chat, still spoken by base models and many compatible servers.

Source: OpenAI API reference, completions. The surprising thing: it has as many choices as prompts times `n`. The
demo provider does not copy the API's default cap of 16 tokens, which would cut every answer off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import Field

from extproc.demo.answers import Answer, Ask, Turn, answer
from extproc.demo.chat import DONE, FINGERPRINT, FINISH_REASONS
from extproc.demo.tokens import Split
from extproc.demo.wire import Count, JsonDict, Stamp, StreamOptions, Wire, dump, event, stops_of

Texts = str | list[str] | list[int] | list[list[int]]
"""A prompt or an embedding's input: texts, or texts as token ids."""


class CompletionRequest(Wire):
    model: str = Field(min_length=1)
    prompt: Texts
    max_tokens: Count | None = None
    n: int | None = Field(None, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


@dataclass(frozen=True, slots=True)
class Choice:
    echoed: str
    answer: Answer


def texts_of(given: Texts, split: Split) -> list[tuple[str, int]]:
    """Each text with its token count. Token ids are counted and named, not decoded: their vocabulary is unknown."""
    if isinstance(given, str):
        return [(given, len(split(given)))]
    if given and isinstance(given[0], int):
        return [(f"a text of {len(given)} token ids", len(given))]
    return [
        (item, len(split(item))) if isinstance(item, str) else (f"a text of {len(item)} token ids", len(item))
        for item in given
        if not isinstance(item, int)
    ]


def choices_of(request: CompletionRequest, split: Split) -> list[Choice]:
    """One choice for each prompt and each of `n`. A bare prompt has no framing: its own tokens are what counts."""
    choices = []
    for text, tokens in texts_of(request.prompt, split):
        ask = Ask(request.model, (Turn("user", text),), max_tokens=request.max_tokens, stop=stops_of(request.stop))
        said = replace(answer(ask, split), input_tokens=tokens)
        choices += [Choice(text if request.echo else "", said)] * (request.n or 1)
    return choices


def body(request: CompletionRequest, choices: list[Choice], stamp: Stamp) -> bytes:
    """The whole answer as one `text_completion` object."""
    rendered = [
        _choice(index, choice.echoed + choice.answer.text, FINISH_REASONS[choice.answer.finish])
        for index, choice in enumerate(choices)
    ]
    return dump({**_head(request, stamp), "choices": rendered, "usage": _usage(request, choices)})


def events(request: CompletionRequest, choices: list[Choice], stamp: Stamp) -> Iterator[bytes]:
    """The answer as `text_completion` chunks, one choice after the other, then the usage where asked for."""
    tail: JsonDict = {"usage": None} if request.include_usage else {}
    for index, choice in enumerate(choices):
        for piece in filter(None, (choice.echoed, *choice.answer.pieces)):
            yield event({**_head(request, stamp), "choices": [_choice(index, piece, None)], **tail})
        finish = FINISH_REASONS[choice.answer.finish]
        yield event({**_head(request, stamp), "choices": [_choice(index, "", finish)], **tail})
    if request.include_usage:
        yield event({**_head(request, stamp), "choices": [], "usage": _usage(request, choices)})
    yield DONE


def _head(request: CompletionRequest, stamp: Stamp) -> JsonDict:
    return {
        "id": f"cmpl-{stamp.serial}",
        "object": "text_completion",
        "created": stamp.created,
        "model": request.model,
        "system_fingerprint": FINGERPRINT,
    }


def _choice(index: int, text: str, finish: str | None) -> JsonDict:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish}


def _usage(request: CompletionRequest, choices: list[Choice]) -> JsonDict:
    prompt_tokens = sum(choice.answer.input_tokens for choice in choices[:: request.n or 1])
    completion_tokens = sum(choice.answer.output_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
