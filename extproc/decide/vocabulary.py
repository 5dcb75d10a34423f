"""Vocabularies: which byte-pair encoding a model uses, and how many tokens a text has in it.

The token count of decide stands on this. The rank tables come out of the installed package `bpe-openai` and are checked
against the sha256 that tiktoken publishes, so nothing is ever downloaded; tiktoken does the encoding. The surprising
thing: tiktoken panics on a run of about a million blanks (its regex engine runs out of stack) and merges a run without
breaks in more than linear time, so a text is cut into pieces of bounded length first (`pieces`).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path
from threading import Lock
from typing import Literal

from tiktoken import Encoding
from tiktoken.model import encoding_name_for_model

EncodingName = Literal["o200k_base", "cl100k_base"]
DEFAULT: EncodingName = "o200k_base"

PIECE_CHARS = 16_384
"""Longest text handed to the byte-pair encoder at once, in characters."""
_SEARCH_CHARS = 2_048
_LONGEST_MODEL_NAME = 256


@dataclass(frozen=True, slots=True)
class _Source:
    """What tiktoken's own constructor of an encoding is given, but for the rank table itself."""

    sha256: str
    pattern: str
    special_tokens: tuple[tuple[str, int], ...]


_SOURCES: dict[EncodingName, _Source] = {
    # Hashes, patterns and special tokens as in tiktoken_ext/openai_public.py; a test compares them.
    "o200k_base": _Source(
        sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        pattern="|".join(
            (
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"\p{N}{1,3}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
                r"\s*[\r\n]+",
                r"\s+(?!\S)",
                r"\s+",
            )
        ),
        special_tokens=(("<|endoftext|>", 199999), ("<|endofprompt|>", 200018)),
    ),
    "cl100k_base": _Source(
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        pattern=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
            r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
        ),
        special_tokens=(
            ("<|endoftext|>", 100257),
            ("<|fim_prefix|>", 100258),
            ("<|fim_middle|>", 100259),
            ("<|fim_suffix|>", 100260),
            ("<|endofprompt|>", 100276),
        ),
    ),
}

_loaded: dict[EncodingName, Encoding] = {}
_loading = Lock()


class VocabularyError(RuntimeError):
    """The installed rank table is not the one that tiktoken publishes. `extproc` must not start with it."""


@lru_cache(maxsize=1024)
def encoding_for(model: str) -> tuple[EncodingName, bool]:
    """The encoding of `model`, and whether tiktoken's own table names it (False: `DEFAULT` is a guess).

    A provider's prefix (`openai/gpt-4o`) is not part of the name.
    """
    try:
        found = encoding_name_for_model(model[-_LONGEST_MODEL_NAME:].rpartition("/")[2])
    except KeyError:
        return DEFAULT, False
    match found:
        case "cl100k_base":
            return "cl100k_base", True
        case "o200k_base" | "o200k_harmony":  # harmony differs in its special tokens alone
            return "o200k_base", True
        case _:  # encodings of models that are gone
            return DEFAULT, False


def vocabulary(name: EncodingName) -> Encoding:
    """The encoding, loaded at its first use and kept.

    Loading takes some 0.3 s for o200k, half of it inside one call that holds the interpreter lock: see `preload`.

    Raises:
        VocabularyError: the package's table has another hash.
        importlib.metadata.PackageNotFoundError: `bpe-openai` is not installed.
    """
    found = _loaded.get(name)
    if found is None:
        with _loading:
            found = _loaded.get(name)
            if found is None:
                found = _loaded[name] = _build(name)
    return found


def is_loaded(name: EncodingName) -> bool:
    return name in _loaded


def preload() -> None:
    """Loads every vocabulary; for a worker's start, before it takes requests."""
    for name in _SOURCES:
        vocabulary(name)


def _build(name: EncodingName) -> Encoding:
    source = _SOURCES[name]
    # Located and not imported: importing the package would map 70 MB of its own encoder.
    packed = Path(str(distribution("bpe-openai").locate_file(f"bpe_openai/data/{name}.tiktoken.gz")))
    table = gzip.decompress(packed.read_bytes())
    if hashlib.sha256(table).hexdigest() != source.sha256:
        raise VocabularyError(f"the rank table of {name} in package bpe-openai is not the published one")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in table.splitlines())}
    return Encoding(name, pat_str=source.pattern, mergeable_ranks=ranks, special_tokens=dict(source.special_tokens))


_BEFORE_A_WORD = re.compile(r"(?s:.*)\S(?= )")


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most `PIECE_CHARS` characters, which together are the text.

    A cut between a non-blank and a blank never changes the count: no pre-token of either encoding holds a blank after
    a non-blank, and none looks behind. A text without such a place in the last 2,048 characters of a piece is cut
    where the piece ends, which adds at most one token for each such cut, on the average of hostile texts (measured).
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        limit = start + PIECE_CHARS
        found = _BEFORE_A_WORD.match(text, limit - _SEARCH_CHARS, limit + 1)
        end = found.end() if found else limit
        yield text[start:end]
        start = end
    yield text[start:]


def count_piece(name: EncodingName, piece: str) -> int:
    """Tokens of one piece. A special token's name in the text counts as the text that it is."""
    return len(vocabulary(name).encode_ordinary(piece))


def count_text(name: EncodingName, text: str) -> int:
    """Tokens of a text of any length, in time linear in it. tiktoken leaves the interpreter lock while it counts."""
    return sum(count_piece(name, piece) for piece in pieces(text))
