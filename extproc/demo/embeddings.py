"""OpenAI's `/v1/embeddings`: vectors by feature hashing, so that texts which share words lie close together.

Source: OpenAI API reference, embeddings; Weinberger et al., "Feature Hashing for Large Scale Multitask Learning"
(2009). The surprising thing: the official SDK asks for base64 unless told otherwise, and both encodings must hold the
same little-endian 32-bit floats.
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from functools import lru_cache
from typing import Literal

from pydantic import Field

from extproc.demo.completions import Texts, texts_of
from extproc.demo.tokens import Split
from extproc.demo.wire import Wire, dump, invalid

DEFAULT_DIMENSIONS = 256
MAX_DIMENSIONS = 3072
MAX_INPUTS = 2048
COORDINATES_PER_TOKEN = 8


class EmbeddingRequest(Wire):
    model: str = Field(min_length=1)
    input: Texts
    dimensions: int | None = Field(None, ge=1, le=MAX_DIMENSIONS)
    encoding_format: Literal["float", "base64"] = "float"


def vector(text: str, dimensions: int, split: Split) -> list[float]:
    """A unit vector of 32-bit floats that depends on the text's tokens alone, whatever their case and order."""
    coordinates = [0.0] * dimensions
    for piece in split(text):
        for place, sign in _features(piece.strip().casefold()):
            coordinates[place % dimensions] += sign
    norm = math.sqrt(math.fsum(value * value for value in coordinates))
    if norm == 0.0:
        coordinates[0], norm = 1.0, 1.0
    packed = struct.pack(f"<{dimensions}f", *(value / norm for value in coordinates))
    return list(struct.unpack(f"<{dimensions}f", packed))


@lru_cache(maxsize=65536)
def _features(token: str) -> tuple[tuple[int, float], ...]:
    digest = hashlib.shake_256(token.encode()).digest(4 * COORDINATES_PER_TOKEN)
    words = struct.unpack(f"<{COORDINATES_PER_TOKEN}I", digest)
    return tuple((word >> 1, 1.0 if word & 1 else -1.0) for word in words)


def body(request: EmbeddingRequest, split: Split) -> bytes:
    """The answer, in the encoding asked for. Raises `wire.Refused` for an empty input or too many of them."""
    inputs = texts_of(request.input, split)
    if not inputs or len(inputs) > MAX_INPUTS or any(tokens == 0 for _, tokens in inputs):
        raise invalid(f"input must be 1 to {MAX_INPUTS} texts, none of them empty", "input")
    tokens = sum(count for _, count in inputs)
    data = []
    for index, (text, _) in enumerate(inputs):
        numbers = vector(text, request.dimensions or DEFAULT_DIMENSIONS, split)
        as_base64 = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
        embedding = as_base64 if request.encoding_format == "base64" else numbers
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return dump({"object": "list", "data": data, "model": request.model, "usage": usage})
