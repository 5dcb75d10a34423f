"""The vocabularies are tiktoken's own, need no network, and take any text in bounded pieces."""

from __future__ import annotations

import base64
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from extproc.decide import vocabulary
from extproc.decide.vocabulary import PIECE_CHARS, count_text, encoding_for, pieces

ENCODINGS: tuple[vocabulary.EncodingName, ...] = ("o200k_base", "cl100k_base")
HOSTILE = {
    "one letter": "a",
    "capitals": "A",
    "spaces": " ",
    "tabs": "\t",
    "no-break spaces": "\xa0",
    "newlines": "\n",
    "line ends": "\r\n",
    "newline and space": "\n ",
    "punctuation": "!",
    "digits": "1",
    "combining marks": "\u0301",
    "alternating": "aA",
    "ideographs": "中",
    "joined emoji": "👨\u200d",
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_vocabulary_is_what_tiktoken_publishes(name: vocabulary.EncodingName, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes: list[str] = []

    def table(_url: str, expected_hash: str) -> dict[bytes, int]:
        hashes.append(expected_hash)
        return {}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", table)
    published = openai_public.ENCODING_CONSTRUCTORS[name]()
    source = vocabulary._SOURCES[name]
    assert hashes == [source.sha256]
    assert published["pat_str"] == source.pattern
    assert published["special_tokens"] == dict(source.special_tokens)


def test_known_encodings_come_out() -> None:
    cl100k = vocabulary.vocabulary("cl100k_base")  # the cookbook's own examples
    assert cl100k.encode_ordinary("tiktoken is great!") == [83, 1609, 5963, 374, 2294, 0]
    assert cl100k.encode_ordinary("antidisestablishmentarianism") == [519, 85342, 34500, 479, 8997, 2191]
    assert vocabulary.vocabulary("o200k_base").encode_ordinary("hello world") == [24912, 2375]


def test_loading_needs_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a vocabulary was asked for over the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(vocabulary, "_loaded", {})
    vocabulary.preload()
    assert all(vocabulary.is_loaded(name) for name in ENCODINGS)


def test_a_table_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(vocabulary._SOURCES["cl100k_base"], sha256="0" * 64)
    monkeypatch.setattr(vocabulary, "_loaded", {})
    monkeypatch.setitem(vocabulary._SOURCES, "cl100k_base", other)
    with pytest.raises(vocabulary.VocabularyError, match="cl100k_base"):
        vocabulary.vocabulary("cl100k_base")


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|im_start|>system", "a <|endofprompt|> b", "\ud800 half a pair"])
def test_special_names_and_broken_characters_count_as_text(text: str) -> None:
    for name in ENCODINGS:
        assert count_text(name, text) > 1


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("gpt-4o", ("o200k_base", True)),
        ("gpt-4o-mini-2024-07-18", ("o200k_base", True)),
        ("chatgpt-4o-latest", ("o200k_base", True)),
        ("openai/gpt-4o", ("o200k_base", True)),
        ("gpt-4.1", ("o200k_base", True)),
        ("gpt-5.1", ("o200k_base", True)),
        ("o1", ("o200k_base", True)),
        ("o3-pro", ("o200k_base", True)),
        ("o4-mini", ("o200k_base", True)),
        ("gpt-oss-120b", ("o200k_base", True)),
        ("gpt-4", ("cl100k_base", True)),
        ("gpt-4-turbo", ("cl100k_base", True)),
        ("gpt-3.5-turbo", ("cl100k_base", True)),
        ("ft:gpt-3.5-turbo:acme::1", ("cl100k_base", True)),
        ("text-embedding-3-small", ("cl100k_base", True)),
        ("text-embedding-ada-002", ("cl100k_base", True)),
        ("text-davinci-003", ("o200k_base", False)),
        ("claude-sonnet-4-5", ("o200k_base", False)),
        ("", ("o200k_base", False)),
        ("x" * 100_000, ("o200k_base", False)),
    ],
)
def test_encoding_follows_the_model(model: str, expected: tuple[str, bool]) -> None:
    assert encoding_for(model) == expected


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_text_reaches_the_encoder_in_more_than_one_bounded_piece(unit: str) -> None:
    text = (unit * 1_000_000)[:1_000_000]
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= PIECE_CHARS
    assert len(cut) <= len(text) // (PIECE_CHARS - 2_048) + 1


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_cutting_hostile_text_changes_the_count_by_a_token_a_cut(unit: str, name: vocabulary.EncodingName) -> None:
    text = (unit * 100_000)[:100_000]
    whole = len(vocabulary.vocabulary(name).encode_ordinary(text))
    cuts = len(list(pieces(text))) - 1
    assert abs(count_text(name, text) - whole) <= 2 * cuts


def test_a_million_blanks_are_counted_where_tiktoken_alone_panics() -> None:
    assert count_text("o200k_base", " " * 1_000_000) > 0


def test_cutting_real_text_changes_nothing() -> None:
    source = Path(openai_public.__file__).read_text() * 20
    assert len(list(pieces(source))) > 5
    for name in ENCODINGS:
        assert count_text(name, source) == len(vocabulary.vocabulary(name).encode_ordinary(source))


def test_no_cut_falls_inside_a_gap() -> None:
    text = f"word{' ' * 40}" * 3_000
    cut = list(pieces(text))
    assert len(cut) > 5
    assert all(piece.startswith(" " * 40) for piece in cut[1:])
    for name in ENCODINGS:
        assert count_text(name, text) == len(vocabulary.vocabulary(name).encode_ordinary(text))


def test_cutting_through_a_text_without_blanks_adds_a_token_at_most() -> None:
    source = base64.b64encode(b"end" * 4_500).decode()
    assert len(list(pieces(source))) == 2
    for name in ENCODINGS:
        assert 0 <= count_text(name, source) - len(vocabulary.vocabulary(name).encode_ordinary(source)) <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["word", " ", "\n", "  ", ".", "'s", "9", "中", "\u0301", "A"]), max_size=60))
def test_a_cut_before_a_blank_after_a_non_blank_is_exact(parts: list[str]) -> None:
    text = "".join(parts)
    for name in ENCODINGS:
        encode = vocabulary.vocabulary(name).encode_ordinary
        for at in range(1, len(text)):
            if not text[at - 1].isspace() and text[at] == " ":
                assert encode(text[:at]) + encode(text[at:]) == encode(text)
