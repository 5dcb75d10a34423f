"""Pictures cost what their provider's guide says, and their size is read from their first bytes alone."""

from __future__ import annotations

import base64
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.decide.images import (
    Size,
    anthropic_image_tokens,
    claude_version,
    openai_image_tokens,
    size_of_base64,
    size_of_data_url,
    size_of_header,
)


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + bytes(9)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + bytes(20)


def jpeg(width: int, height: int, profile_bytes: int = 16) -> bytes:
    profile = b""
    while profile_bytes > 0:
        part = min(profile_bytes, 65_533)
        profile += b"\xff\xe2" + struct.pack(">H", part + 2) + b"\xff" * part
        profile_bytes -= part
    frame = b"\xff\xff\xc2" + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(9)  # with a fill byte
    return b"\xff\xd8" + profile + frame


def webp(kind: bytes, payload: bytes) -> bytes:
    return b"RIFF" + bytes(4) + b"WEBP" + kind + bytes(4) + payload + bytes(10)


def lossless(width: int, height: int) -> bytes:
    return b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little")


def extended(width: int, height: int) -> bytes:
    return bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


@pytest.mark.parametrize(
    "picture",
    [
        png(640, 480),
        gif(640, 480),
        jpeg(640, 480),
        jpeg(640, 480, profile_bytes=150_000),
        webp(b"VP8 ", bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", 640 | 0x4000, 480)),
        webp(b"VP8L", lossless(640, 480)),
        webp(b"VP8X", extended(640, 480)),
    ],
    ids=["png", "gif", "jpeg", "jpeg with a long profile", "webp lossy", "webp lossless", "webp extended"],
)
def test_size_is_read_from_the_header(picture: bytes) -> None:
    encoded = base64.b64encode(picture).decode()
    assert size_of_base64(encoded) == Size(640, 480)
    assert size_of_data_url(f"data:image/any;base64,{encoded}") == Size(640, 480)
    assert size_of_data_url(f"DATA:image/any;charset=x;BASE64,{encoded}") == Size(640, 480)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "https://example.com/a.png",
        "data:image/png,plain",
        "data:image/png;base64,",
        "data:image/png;base64,é",
        "data:image/png;base64," + base64.b64encode(png(0, 480)).decode(),
        "data:image/jpeg;base64," + base64.b64encode(jpeg(640, 480, profile_bytes=400_000)).decode(),
        "data:" + "x" * 10_000 + ";base64,AAAA",
    ],
)
def test_size_is_unknown_where_no_header_says_it(url: str) -> None:
    assert size_of_data_url(url) is None


@given(st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff", b"RIFF....WEBPVP8L", b"GIF89a"]))
def test_broken_headers_never_raise(tail: bytes, start: bytes) -> None:
    size_of_header(start + tail)
    size_of_base64(base64.b64encode(start + tail).decode())


@pytest.mark.parametrize(
    ("model", "detail", "size", "tokens"),
    [
        ("gpt-4o", "high", Size(1024, 1024), 765),  # the guide's own three examples
        ("gpt-4o", "high", Size(2048, 4096), 1105),
        ("gpt-4o", "low", Size(4096, 8192), 85),
        ("gpt-4o", None, Size(1024, 1024), 765),
        ("gpt-4o", "high", Size(100, 100), 255),
        ("gpt-4o", "high", None, 1445),
        ("gpt-4o", "low", None, 85),
        ("gpt-4.1", "high", Size(2049, 513), 1445),  # as billed: 512.7 pixels are 513, two tiles
        ("gpt-4.1", "high", Size(2050, 513), 765),  # and 512.4 are 512, one tile
        ("gpt-4o-mini", "low", None, 2833),
        ("gpt-4o-mini-2024-07-18", "high", Size(1024, 1024), 2833 + 4 * 5667),
        ("gpt-5", "high", Size(1024, 1024), 70 + 4 * 140),
        ("o1", "high", Size(1024, 1024), 75 + 4 * 150),
        ("openai/o3", "low", None, 75),
        ("ft:gpt-4o-2024-08-06:acme::1", "low", None, 85),
        ("gpt-5.2", "high", Size(1024, 1024), 1024),  # the guide's two examples of patches
        ("gpt-5.2", "high", Size(1800, 2400), 1452),
        ("gpt-4.1-mini", "high", Size(1024, 1024), 1659),
        ("gpt-4.1-mini", "high", Size(1800, 2400), 2353),
        ("gpt-4.1-mini", "high", Size(4000, 1474), 2489),  # billed 2488, where OpenAI's own calculator says 2348
        ("gpt-4.1-nano", "high", Size(1024, 1024), 2520),
        ("gpt-5-mini", "low", Size(4000, 4000), 415),
        ("o4-mini", "high", None, 2642),
        ("gpt-5.4", "auto", Size(6000, 6000), 2500),
        ("gpt-5.4", "original", Size(3200, 3200), 10_000),
        ("gpt-5.5", None, Size(3200, 3200), 10_000),
        ("gpt-5.5", "high", None, 2500),
        ("gpt-5-mini", "original", None, 2489),
        ("llava", "high", Size(1024, 1024), 765),
    ],
)
def test_openai_tokens_are_the_guides(model: str, detail: str | None, size: Size | None, tokens: int) -> None:
    assert openai_image_tokens(model, detail, size) == tokens


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        ("claude-sonnet-4-5", Size(1000, 1000), 1296),
        ("claude-sonnet-4-5", Size(1092, 1092), 1521),
        ("claude-sonnet-4-5", Size(8000, 8000), 1568),
        ("claude-sonnet-4-5", None, 1568),
        ("claude-opus-4-7", Size(1920, 1080), 2691),
        ("claude-opus-4-7", Size(3840, 2160), 4784),
        ("claude-opus-5", None, 4784),
        ("unnamed", None, 1568),
    ],
)
def test_anthropic_tokens_are_the_guides(model: str, size: Size | None, tokens: int) -> None:
    assert anthropic_image_tokens(model, size) == tokens


@pytest.mark.parametrize(
    ("model", "version"),
    [
        ("claude-sonnet-4-5-20250929", (4, 5)),
        ("claude-3-5-sonnet-20241022", (3, 5)),
        ("claude-sonnet-4-20250514", (4, 0)),
        ("anthropic.claude-opus-4-7-v1:0", (4, 7)),
        ("claude-opus-5", (5, 0)),
        ("claude-instant", None),
    ],
)
def test_claude_version_is_in_the_name(model: str, version: tuple[int, int] | None) -> None:
    assert claude_version(model) == version


MODELS = st.sampled_from(["gpt-4o", "gpt-4o-mini", "gpt-4.1-mini", "gpt-5.4", "gpt-5.6", "o4-mini", "o1", "x"])
DETAILS = st.sampled_from(["low", "high", "auto", "original", None, 7])
SIDES = st.integers(1, 2**32)


@given(MODELS, DETAILS, SIDES, SIDES)
def test_an_unseen_picture_is_never_cheaper_than_a_seen_one(
    model: str, detail: object, width: int, height: int
) -> None:
    seen = openai_image_tokens(model, detail, Size(width, height))
    assert 0 < seen <= openai_image_tokens(model, detail, None)
    for claude in ("claude-sonnet-4-5", "claude-opus-4-7"):
        assert 0 < anthropic_image_tokens(claude, Size(width, height)) <= anthropic_image_tokens(claude, None)
