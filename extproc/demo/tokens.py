"""Tokens of the demo provider: a text cut into the pieces that a stream delivers and a usage figure counts.

The surprising thing: a piece may be empty. A character whose UTF-8 bytes span several tokens arrives whole, with the
last of them, as it does from the real APIs.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from functools import lru_cache

from extproc.decide.vocabulary import pieces, vocabulary

Split = Callable[[str], list[str]]
"""Cuts a text into one piece for each token; joined they are the text, and their number is its token count."""


@lru_cache(maxsize=1)
def o200k() -> Split:
    """The vocabulary of OpenAI's current models, which is also the one that the gateway counts with.

    Text that spells a special token is ordinary text, as it is to the APIs; lone surrogates become question marks.
    Raises what `decide.vocabulary.vocabulary` does.
    """
    encoding = vocabulary("o200k_base")

    def split(text: str) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        clean = text.encode("utf-8", "replace").decode()
        return [
            decoder.decode(token)
            for piece in pieces(clean)
            for token in encoding.decode_tokens_bytes(encoding.encode_ordinary(piece))
        ]

    return split
