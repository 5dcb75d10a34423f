"""Reading a JSON request body once, and changing single values in it without re-encoding the rest.

decide and adapt use this on the client's own bytes. The surprising thing: nothing nested is ever decoded here. Each
top-level value stays a slice of the original, whose exact place is found by walking from key to key, so integers
above 2^53, `-0`, escapes and white space pass as they came, and a string that merely looks like `"model":` inside a
prompt can not be mistaken for the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from extproc.errors import Code, Refusal

_DECODE_RAW = msgspec.json.Decoder(dict[str, msgspec.Raw])
_DECODE = msgspec.json.Decoder()
_KEY = re.compile(rb'[ \t\r\n]*("(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*")
_MAX_TOP_LEVEL_KEYS = 1024

_FIRST_BYTES = {
    "string": b'"',
    "array": b"[",
    "object": b"{",
    "boolean": b"tf",
    "integer": b"-0123456789",
    "number": b"-0123456789",
}
_INTEGER = re.compile(rb"-?(?:0|[1-9]\d*)")


class Edit(msgspec.Struct, frozen=True):
    """Put `new` where `body[start:end]` stands."""

    start: int
    end: int
    new: bytes


def splice(body: bytes, edits: Sequence[Edit]) -> bytes:
    """`body` with all `edits` made; they must not overlap."""
    parts: list[bytes] = []
    at = 0
    for edit in sorted(edits, key=lambda edit: edit.start):
        parts += (body[at : edit.start], edit.new)
        at = edit.end
    return b"".join((*parts, body[at:]))


class JsonBody:
    """A JSON object's top level: each value's place in the bytes, decoded only when asked for."""

    __slots__ = ("_spans", "body")

    def __init__(self, body: bytes, spans: dict[str, tuple[int, int]]) -> None:
        self.body = body
        self._spans = spans

    def __contains__(self, key: str) -> bool:
        return key in self._spans

    def __iter__(self) -> Any:
        return iter(self._spans)

    def raw(self, key: str) -> bytes | None:
        """The value's own bytes, or None where the key is absent."""
        span = self._spans.get(key)
        return None if span is None else self.body[span[0] : span[1]]

    def value(self, key: str) -> Any:
        """The decoded value, or None where the key is absent or null. For small values: `messages` is not one."""
        raw = self.raw(key)
        return None if raw is None else _DECODE.decode(raw)

    def replace(self, key: str, new: bytes) -> Edit:
        """The edit that gives an existing `key` another value."""
        start, end = self._spans[key]
        return Edit(start, end, new)

    def append(self, key: str, new: bytes) -> Edit:
        """The edit that adds `key` behind the last one, so that the bytes before it stay a cacheable prefix."""
        start = self.body.rindex(b"}")
        comma = b"," if self._spans else b""
        return Edit(start, start, comma + msgspec.json.encode(key) + b":" + new)


def read_json(body: bytes) -> JsonBody | Refusal:
    """Take a JSON object apart at its top level (RFC 8259; UTF-8 only, no byte order mark, no duplicate names)."""
    try:
        values = _DECODE_RAW.decode(body)
        if not body.isascii():
            body.decode("utf-8")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Refusal(Code.INVALID_JSON, "The body is not a JSON object in UTF-8.")
    if len(values) > _MAX_TOP_LEVEL_KEYS:
        return Refusal(Code.INVALID_JSON, f"The body has more than {_MAX_TOP_LEVEL_KEYS} top-level keys.")
    spans = _walk(body, values)
    if spans is None:
        return Refusal(Code.DUPLICATE_KEY, "A top-level key of the body stands in it more than once.")
    return JsonBody(body, spans)


def _walk(body: bytes, values: dict[str, msgspec.Raw]) -> dict[str, tuple[int, int]] | None:
    """Each value's span, or None when the text has more members than the decoder kept: a name was given twice."""
    spans: dict[str, tuple[int, int]] = {}
    at = body.index(b"{") + 1
    for key, raw in values.items():
        start = _value_start(body, at, key)
        value = bytes(raw)
        if start is None or not body.startswith(value, start):
            return None
        end = start + len(value)
        spans[key] = (start, end)
        if body[end] in b" \t\r\n":
            space = _SPACE.match(body, end)
            end = space.end() if space else end
        at = end + 1  # behind the comma, or the closing brace
    if not values:
        return spans
    return spans if body[at - 1 : at] == b"}" else None


def _value_start(body: bytes, at: int, key: str) -> int | None:
    """Where the value of the member at `at` begins, or None where that member has another name."""
    plain = b'"' + key.encode() + b'":'
    if body.startswith(plain, at):  # as encoders write it; the rest is for people's own white space and escapes
        start = at + len(plain)
        if body[start] not in b" \t\r\n":
            return start
    member = _KEY.match(body, at)
    return member.end() if member is not None and _names(member.group(1), key) else None


def _names(quoted: bytes, key: str) -> bool:
    if b"\\" not in quoted:
        return quoted[1:-1] == key.encode()
    decoded: str = _DECODE.decode(quoted)
    return decoded == key


def wrong_type(body: JsonBody, types: Mapping[str, str]) -> Refusal | None:
    """The refusal for the first field whose JSON type is not the one its endpoint gives it; null is no type."""
    for key in body:
        expected = types.get(key)
        if expected is None:
            continue
        raw = body.raw(key)
        if raw is None or raw == b"null" or _is(raw, expected):
            continue
        return Refusal(Code.INVALID_TYPE, f"'{key}' must be of type {expected.replace('|', ' or ')}.", key)
    return None


def _is(raw: bytes, expected: str) -> bool:
    for kind in expected.split("|"):
        if raw[0] in _FIRST_BYTES[kind]:
            return kind != "integer" or _INTEGER.fullmatch(raw) is not None
    return False


JUDGED = frozenset(
    (
        *("model", "stream", "stream_options", "messages", "input", "prompt", "tools"),
        *("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "system", "instructions"),
    )
)
"""Names that decide reads. A server that folds case would read `MODEL` as `model`: such twins are refused."""


def case_variant(body: JsonBody) -> Refusal | None:
    """The refusal for a key that a case-folding server would take for one that was judged (GHSA-4gph-2hhr-5mwg)."""
    for key in body:
        if key not in JUDGED and _fold(key) in JUDGED:
            return Refusal(Code.DUPLICATE_KEY, f"'{_fold(key)}' must be spelled in lower case.", _fold(key))
    return None


@lru_cache(maxsize=1024)
def _fold(key: str) -> str:
    return key.casefold()
