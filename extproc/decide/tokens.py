"""Tokens: how many input tokens a request has, counted before it is sent.

The step of decide after policy: limits and budgets stand on it. `estimate` answers from experience; this module counts,
with the model's own vocabulary, by the rule the provider publishes, and says where it had to guess. The surprising
thing: above a few kilobytes the count leaves the event loop, and beyond a megabyte of text only every eighth piece is
counted, so one huge prompt can hold up neither its neighbours nor a core.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any

from extproc.decide import images, vocabulary
from extproc.decide.prompts import COUNTED

__all__ = ["COUNTED", "TokenCount", "TokenCounter", "count_input_tokens"]

EXACT_CHARS = 1_000_000
"""Text counted in full; of what follows, one piece in `SAMPLE_EVERY` stands for all."""
SAMPLE_EVERY = 8
INLINE_BYTES = 4_096
"""Bodies up to this size are counted on the event loop: at most some 0.3 ms."""

CLAUDE_FACTOR = 1.25
"""Claude's tokens for each o200k token, up to 4.6. Its tokeniser is not public; comparisons of the two vendors' own
counts give 1.16 (English) to 1.30 (code)."""
CLAUDE_4_7_FACTOR = 1.6
"""The tokeniser of 4.7 and later gives 1.0 to 1.35 times as many, says Anthropic."""

MOST_TEXT_BYTES = 8 * 1024 * 1024
"""Text beyond every model's context window; it is not worth a core."""
UNCOUNTED_TOKENS_PER_BYTE = 0.5
"""What a byte counts where nothing is counted: above every kind of text measured (JSON: 0.45)."""


@dataclass(frozen=True, slots=True)
class TokenCount:
    """`exact`: the model's own vocabulary and a published rule gave every token; a provider may still add a few."""

    tokens: int
    exact: bool


def count_input_tokens(endpoint: str, body: Mapping[str, Any], model: str) -> TokenCount | None:
    """Input tokens of a parsed request body.

    `endpoint` is one of chat, responses, completions, embeddings, messages, count_tokens; any other gives None: nothing
    is known about its tokens. `model` is the name that the provider knows. Any JSON is taken, whatever its types and
    depth; the work is linear in its size. Blocks: see `TokenCounter` for the event loop.

    Raises:
        VocabularyError: at the first use, when the installed vocabulary is not the published one.
    """
    walk = COUNTED.get(endpoint)
    if walk is None:
        return None
    tally = _RequestTally(model, claude=walk is COUNTED["messages"])
    walk(body, tally)
    return tally.total()


class _RequestTally:
    """The sum over one request. Texts are counted piece by piece; those beyond `EXACT_CHARS` by samples."""

    __slots__ = (
        "_counted_chars", "_exact", "_factor", "_is_claude", "_known", "_model", "_rest_pieces", "_sampled_chars",
        "_sampled_tokens", "_skipped_chars", "_text_tokens", "_tokens", "encoding",
    )  # fmt: skip

    _KNOWN_CHARS = 64

    def __init__(self, model: str, *, claude: bool) -> None:
        encoding, named = vocabulary.encoding_for(model)
        self.encoding: vocabulary.EncodingName = encoding
        self._model = model
        self._is_claude = not named and (claude or "claude" in model)
        self._factor = _claude_factor(model) if self._is_claude else 1.0
        self._exact = named
        self._known: dict[str, int] = {}
        self._tokens = self._text_tokens = self._counted_chars = 0
        self._rest_pieces = self._skipped_chars = self._sampled_chars = self._sampled_tokens = 0

    def text(self, text: object) -> None:
        if not isinstance(text, str) or not text:
            return
        for piece in vocabulary.pieces(text):
            if self._counted_chars < EXACT_CHARS:
                self._counted_chars += len(piece)
                self._text_tokens += self._count(piece)
            else:
                self._sample(piece)

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def estimate(self, tokens: int = 0) -> None:
        self._tokens += tokens
        self._exact = False

    def image(self, *, url: object = None, data: object = None, detail: object = None) -> None:
        size = None
        if isinstance(data, str):
            size = images.size_of_base64(data)
        elif isinstance(url, str):
            size = images.size_of_data_url(url)
        if self._is_claude:
            self.estimate(images.anthropic_image_tokens(self._model, size))
        else:
            self._exact = self._exact and (size is not None or detail == "low")
            self.add(images.openai_image_tokens(self._model, detail, size))

    def total(self) -> TokenCount:
        text_tokens = float(self._text_tokens)
        if self._skipped_chars:
            chars, tokens = self._sampled_chars, self._sampled_tokens
            if not chars:
                chars, tokens = self._counted_chars, self._text_tokens
            text_tokens += self._skipped_chars * tokens / chars
        return TokenCount(
            tokens=max(0, self._tokens) + ceil(text_tokens * self._factor),
            exact=self._exact and not self._skipped_chars,
        )

    def _sample(self, piece: str) -> None:
        self._rest_pieces += 1
        if self._rest_pieces % SAMPLE_EVERY:
            self._skipped_chars += len(piece)
            return
        tokens = self._count(piece)
        self._sampled_chars += len(piece)
        self._sampled_tokens += tokens
        self._text_tokens += tokens

    def _count(self, piece: str) -> int:
        if len(piece) > self._KNOWN_CHARS:
            return vocabulary.count_piece(self.encoding, piece)
        # Roles, and the names and types of schemas, come again and again.
        tokens = self._known.get(piece)
        if tokens is None:
            tokens = self._known[piece] = vocabulary.count_piece(self.encoding, piece)
        return tokens


def _claude_factor(model: str) -> float:
    return CLAUDE_4_7_FACTOR if (images.claude_version(model) or (0, 0)) >= (4, 7) else CLAUDE_FACTOR


class TokenCounter:
    """Counts off the event loop: small bodies at once, others in `threads` threads, at most `waiting` of them.

    tiktoken leaves the interpreter lock while it encodes, so the loop goes on. What is too long for every model, or
    comes when `waiting` bodies are not yet counted, is taken at `UNCOUNTED_TOKENS_PER_BYTE`: a flood must not use up
    Envoy's `message_timeout`. One event loop owns an instance.
    """

    def __init__(self, threads: int = 1, waiting: int = 64) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokens")
        self._most_waiting = waiting
        self._waiting = 0

    async def preload(self) -> None:
        """Loads the vocabularies in a thread. For a worker's start: loading holds the interpreter lock at times."""
        await asyncio.get_running_loop().run_in_executor(self._pool, vocabulary.preload)

    async def count(self, endpoint: str, body: Mapping[str, Any], model: str, *, text_bytes: int) -> TokenCount | None:
        """`count_input_tokens` for a body of `text_bytes` bytes, those of pictures left out (`non_text_bytes`)."""
        if endpoint not in COUNTED:
            return None
        if text_bytes <= INLINE_BYTES and vocabulary.is_loaded(vocabulary.encoding_for(model)[0]):
            return count_input_tokens(endpoint, body, model)
        if text_bytes > MOST_TEXT_BYTES or self._waiting >= self._most_waiting:
            return TokenCount(ceil(text_bytes * UNCOUNTED_TOKENS_PER_BYTE), exact=False)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, count_input_tokens, endpoint, body, model)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Ends the threads; counts that have not begun are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
