"""Images: how many input tokens a picture costs, by the rule its provider publishes.

Used by the token count of decide. Only the picture's header is decoded, and only out of the request itself: a picture
behind a URL is never fetched and counts as the dearest that its detail level allows. The surprising thing: two rules
live side by side at OpenAI (512 px tiles, 32 px patches), and which one holds depends on the model's name alone.

Sources: OpenAI's guide "Images and vision", section "Calculating costs"; Anthropic's guide "Vision", section
"Evaluate image size".
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor, sqrt

_HEADER_CHARS = 64
_JPEG_CHARS = 262_144
"""A JPEG's size stands behind its EXIF and colour profile; pictures with more before it count as unknown."""
_LONGEST_URL_PREFIX = 256
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels, both above zero."""

    width: int
    height: int


def size_of_data_url(url: str) -> Size | None:
    """The picture's size from a base64 data URL; None for any other URL and for headers that are not understood."""
    comma = url.find(",", 0, _LONGEST_URL_PREFIX)
    if comma < 0 or url[:5].lower() != "data:" or not url[:comma].lower().endswith(";base64"):
        return None
    return size_of_base64(url, start=comma + 1)


def size_of_base64(data: str, *, start: int = 0) -> Size | None:
    """The size of the PNG, JPEG, GIF or WebP whose base64 text begins at `start`. Decodes at most 256 KiB of it."""
    header = _decoded(data[start : start + _HEADER_CHARS])
    if header[:2] == b"\xff\xd8":
        header = _decoded(data[start : start + _JPEG_CHARS])
    size = size_of_header(header)
    return size if size and size.width > 0 and size.height > 0 else None


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text[: len(text) // 4 * 4])
    except ValueError:
        return b""


def size_of_header(header: bytes) -> Size | None:
    """Width and height from the first bytes of an image file, or None."""
    if header[:8] == b"\x89PNG\r\n\x1a\n" and len(header) >= 24:
        return Size(int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big"))
    if header[:6] in (b"GIF87a", b"GIF89a") and len(header) >= 10:
        return Size(int.from_bytes(header[6:8], "little"), int.from_bytes(header[8:10], "little"))
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP" and len(header) >= 30:
        return _size_of_webp(header)
    if header[:2] == b"\xff\xd8":
        return _size_of_jpeg(header)
    return None


def _size_of_webp(header: bytes) -> Size | None:
    match header[12:16]:
        case b"VP8 ":  # RFC 6386, section 9.1
            width, height = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
            return Size(width & 0x3FFF, height & 0x3FFF)
        case b"VP8L":
            bits = int.from_bytes(header[21:25], "little")
            return Size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        case b"VP8X":
            return Size(int.from_bytes(header[24:27], "little") + 1, int.from_bytes(header[27:30], "little") + 1)
        case _:
            return None


_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x01}


def _size_of_jpeg(header: bytes) -> Size | None:
    """Walks the segments (ITU T.81, annex B) up to the first start of frame."""
    at = 2
    while at + 9 <= len(header):
        if header[at] != 0xFF:
            return None
        marker = header[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _WITHOUT_LENGTH:
            at += 2
        elif marker in _START_OF_FRAME:
            return Size(int.from_bytes(header[at + 7 : at + 9], "big"), int.from_bytes(header[at + 5 : at + 7], "big"))
        else:
            at += 2 + int.from_bytes(header[at + 2 : at + 4], "big")
    return None


@dataclass(frozen=True, slots=True)
class _Tiles:
    """`base` tokens, and `tile` tokens for each 512 px square after scaling to 2048 px and 768 px."""

    base: int
    tile: int


@dataclass(frozen=True, slots=True)
class _Patches:
    """`multiplier` tokens for each 32 px square, after scaling to the edge and the number of patches allowed."""

    multiplier: float = 1.0
    high: tuple[int, int] = (2048, 1536)
    original: tuple[int, int] | None = None
    auto_is_original: bool = False


_LOW_PATCHES = (512, 256)
_NO_LIMIT = (65_536, 10_000)
"""gpt-5.6 scales nothing down at detail original. 10,000 patches, its predecessor's cap, stands in: a bound is due."""

# The first name that the model's begins with counts.
_OPENAI_RULES: tuple[tuple[str, _Tiles | _Patches], ...] = (
    ("gpt-4o-mini", _Tiles(2833, 5667)),
    ("gpt-4.1-mini", _Patches(1.62)),
    ("gpt-4.1-nano", _Patches(2.46)),
    ("o4-mini", _Patches(1.72)),
    ("gpt-5-mini", _Patches(1.62)),
    ("gpt-5-nano", _Patches(2.46)),
    ("gpt-5.4-mini", _Patches(1.62)),
    ("gpt-5.4-nano", _Patches(2.46)),
    ("gpt-5.4", _Patches(high=(2048, 2500), original=(6000, 10_000))),
    ("gpt-5.5", _Patches(high=(2048, 2500), original=(6000, 10_000), auto_is_original=True)),
    ("gpt-5.6", _Patches(high=(2048, 2500), original=_NO_LIMIT, auto_is_original=True)),
    ("gpt-5.2", _Patches()),
    ("gpt-5-codex", _Patches()),
    ("gpt-5.1-codex", _Patches()),
    ("gpt-5", _Tiles(70, 140)),
    ("o1", _Tiles(75, 150)),
    ("o3", _Tiles(75, 150)),
    ("computer-use-preview", _Tiles(65, 129)),
)
_DEFAULT_RULE = _Tiles(85, 170)
_MOST_TILES = 8


@lru_cache(maxsize=1024)
def _openai_rule(model: str) -> _Tiles | _Patches:
    name = model.rpartition("/")[2].removeprefix("ft:")
    return next((rule for prefix, rule in _OPENAI_RULES if name.startswith(prefix)), _DEFAULT_RULE)


def openai_image_tokens(model: str, detail: object, size: Size | None) -> int:
    """Input tokens of one picture. `detail` as the client sent it; `size` None gives the most it can be."""
    rule = _openai_rule(model)
    match rule:
        case _Tiles():
            if detail == "low":
                return rule.base
            return rule.base + rule.tile * (_tiles(size) if size else _MOST_TILES)
        case _Patches():
            edge, budget = _patch_limits(rule, detail)
            patches = _patches(size, edge, budget) if size else budget
            return ceil(patches * rule.multiplier - _EPSILON)


def _tiles(size: Size) -> int:
    scale = min(1.0, 2048 / max(size.width, size.height))
    scale = min(scale, 768 / min(size.width, size.height))
    return _squares(size, scale, 512)


def _patch_limits(rule: _Patches, detail: object) -> tuple[int, int]:
    if detail == "low":
        return _LOW_PATCHES
    original = detail == "original" or (rule.auto_is_original and detail != "high")
    return rule.original if original and rule.original else rule.high


def _patches(size: Size, edge: int, budget: int) -> int:
    scale = min(1.0, edge / max(size.width, size.height))
    if _squares(size, scale, 32) <= budget:
        return _squares(size, scale, 32)
    scale = min(scale, sqrt(budget * 32 * 32 / (size.width * size.height)))
    scale *= min(_whole(size.width * scale / 32), _whole(size.height * scale / 32))
    return min(budget, _squares(size, scale, 32))


def _whole(patches: float) -> float:
    """What a side must shrink by to hold a whole number of patches; a side below one patch stays."""
    return min(1.0, floor(patches + _EPSILON) / patches) if patches >= 1 else 1.0


def _squares(size: Size, scale: float, side: int) -> int:
    """Squares of `side` pixels that cover the scaled picture, whose sides are whole pixels (as billed: rounded)."""
    across, down = (max(1, ceil(round(pixels * scale) / side)) for pixels in (size.width, size.height))
    return across * down


_CLAUDE_VERSION = re.compile(r"claude-(?:[a-z]+-)?(\d{1,2})(?:[-.](\d{1,2})(?!\d))?")


@lru_cache(maxsize=1024)
def claude_version(model: str) -> tuple[int, int] | None:
    """(4, 5) for `claude-sonnet-4-5-20250929`, (5, 0) for `claude-opus-5`, None where the name says none."""
    found = _CLAUDE_VERSION.search(model[:256])
    return (int(found[1]), int(found[2] or 0)) if found else None


def anthropic_image_tokens(model: str, size: Size | None) -> int:
    """One token for each 28 px square, after scaling to the model's limits; `size` None gives the most it can be."""
    high = (claude_version(model) or (0, 0)) >= (4, 7)
    edge, budget = (2576, 4784) if high else (1568, 1568)
    if size is None:
        return budget
    scale = min(1.0, edge / max(size.width, size.height), sqrt(budget * 28 * 28 / (size.width * size.height)))
    return min(budget, _squares(size, scale, 28))
