"""Counting holds up neither the event loop nor a core: bodies leave the loop, and huge texts are sampled."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from extproc.decide import tokens, vocabulary
from extproc.decide.tokens import EXACT_CHARS, TokenCount, TokenCounter, count_input_tokens


def count(endpoint: str, body: dict[str, Any]) -> TokenCount:
    counted = count_input_tokens(endpoint, body, "gpt-4o")
    assert counted is not None
    return counted


def words(text: str) -> int:
    return len(vocabulary.vocabulary("o200k_base").encode_ordinary(text))


def test_work_on_a_huge_text_is_bounded_and_the_rest_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = vocabulary.count_piece

    def counted(name: vocabulary.EncodingName, piece: str) -> int:
        sizes.append(len(piece))
        return encode(name, piece)

    monkeypatch.setattr(vocabulary, "count_piece", counted)
    unit = "The quick brown fox jumps over the lazy dog. "
    text = unit * (4 * EXACT_CHARS // len(unit))
    counted_tokens = count("completions", {"prompt": text})
    assert not counted_tokens.exact
    assert abs(counted_tokens.tokens - words(unit.rstrip()) * len(text) / len(unit)) < counted_tokens.tokens * 0.001
    assert max(sizes) <= vocabulary.PIECE_CHARS
    assert sum(sizes) < EXACT_CHARS + 3 * EXACT_CHARS / tokens.SAMPLE_EVERY + 2 * vocabulary.PIECE_CHARS


def test_the_rest_is_judged_by_itself_and_not_by_the_beginning() -> None:
    cheap, dear = "a" * EXACT_CHARS, "\ue000" * (2 * EXACT_CHARS)
    assert count("completions", {"prompt": [cheap, dear]}).tokens > 2 * EXACT_CHARS


def test_repeated_names_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = vocabulary.count_piece

    def spy(name: vocabulary.EncodingName, piece: str) -> int:
        seen.append(piece)
        return encode(name, piece)

    monkeypatch.setattr(vocabulary, "count_piece", spy)
    assert count("chat", {"messages": [{"role": "user", "content": "hi"}] * 50}).tokens == 50 * 5 + 3
    assert seen == ["user", "hi"]


LARGE = {"prompt": "hello world " * 2_000}
SMALL = {"prompt": "hello world"}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads in which counts ran."""
    names: list[str] = []
    really = count_input_tokens

    def noted(endpoint: str, body: dict[str, Any], model: str) -> TokenCount | None:
        names.append(threading.current_thread().name)
        return really(endpoint, body, model)

    monkeypatch.setattr(tokens, "count_input_tokens", noted)
    return names


async def test_small_bodies_are_counted_on_the_loop_and_large_ones_off_it(threads: list[str]) -> None:
    counter = TokenCounter()
    await counter.preload()
    small = await counter.count("completions", SMALL, "gpt-4o", text_bytes=30)
    large = await counter.count("completions", LARGE, "gpt-4o", text_bytes=24_000)
    counter.close()
    assert (small, large) == (TokenCount(2, exact=True), count_input_tokens("completions", LARGE, "gpt-4o"))
    assert threads[0] == threading.current_thread().name
    assert threads[1].startswith("tokens")


async def test_nothing_is_counted_on_the_loop_before_the_vocabulary_is_there(
    threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "_loaded", {})
    counter = TokenCounter()
    assert await counter.count("completions", SMALL, "gpt-4o", text_bytes=30) == TokenCount(2, exact=True)
    counter.close()
    assert threads[0].startswith("tokens")


async def test_a_flood_and_a_text_for_no_model_are_taken_by_their_bytes(threads: list[str]) -> None:
    counter = TokenCounter(waiting=2)
    counts = await asyncio.gather(
        *(counter.count("completions", LARGE, "gpt-4o", text_bytes=24_000) for _ in range(5)),
    )
    by_bytes = TokenCount(12_000, exact=False)
    assert [counted == by_bytes for counted in counts] == [False, False, True, True, True]
    assert await counter.count("completions", LARGE, "gpt-4o", text_bytes=24_000) != by_bytes
    assert len(threads) == 3
    assert await counter.count("chat", {}, "gpt-4o", text_bytes=10_000_000) == TokenCount(5_000_000, exact=False)
    assert await counter.count("files", {}, "gpt-4o", text_bytes=10_000_000) is None
    assert len(threads) == 3
    counter.close()
