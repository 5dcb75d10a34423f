"""The smallest value that a JSON schema accepts: what the demo provider passes to tools and answers as `json_schema`.

It knows the keywords that OpenAI's and Anthropic's strict modes accept, and `$ref`. The surprising thing: it fills
every property when a schema requires none, because a tool called with `{}` shows a newcomer nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import cast

MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_CHARS = 100_000
"""Bounds of the work one schema may cause, far above what real tools need."""

FORMATS = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "P1D",
    "email": "demo@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
}

# Short, so that no pattern can make the search slow: backtracking is exponential in the text's length at worst.
PATTERN_SAMPLES = (
    "demo", "a", "A", "1", "Demo", "DEMO", "AB", "ABC", "ab", "abc", "10", "123", "1234", "12345", "123456", "12345678",
    "1.0", "1.0.0", "v1.0.0", "a-b", "a_b", "abc-123", "ABC-123", "AB-1234", "a@b.co", "/a", "/a/b", "a/b", "#a0a0a0",
    "00:00", "00:00:00", "2026-01-01", "+15550100", "http://a.bc", "https://a.bc", "",
)  # fmt: skip


class UnsatisfiableError(ValueError):
    """No value is known that the schema accepts. The message names the place and is safe to show."""


def minimal(schema: Mapping[str, object]) -> object:
    """A value valid under `schema`, the same each time. Raises `UnsatisfiableError`."""
    return _Maker(schema).value(schema, "schema", 0)


class _Maker:
    def __init__(self, root: Mapping[str, object]) -> None:
        self._root = root
        self._left = MAX_VALUES

    def value(self, schema: object, where: str, depth: int) -> object:
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            raise UnsatisfiableError(f"{where}: deeper than {MAX_DEPTH} levels or more than {MAX_VALUES} values")
        if not isinstance(schema, Mapping):
            if schema is False:
                raise UnsatisfiableError(f"{where}: accepts nothing")
            return "demo"
        resolved = self._flat(cast(Mapping[str, object], schema), where, depth)
        for keyword in ("const", "default"):
            if keyword in resolved:
                return resolved[keyword]
        for keyword in ("enum", "examples"):
            choices = resolved.get(keyword)
            if isinstance(choices, list) and choices:
                return choices[0]
        for keyword in ("anyOf", "oneOf"):
            branches = resolved.get(keyword)
            if isinstance(branches, list) and branches:
                return self._first(resolved, keyword, branches, where, depth)
        return self._typed(resolved, where, depth)

    def _flat(self, schema: Mapping[str, object], where: str, depth: int) -> Mapping[str, object]:
        """`schema` with `$ref` and `allOf` merged in; the outer keywords win, properties and requirements add up."""
        if depth > MAX_DEPTH:
            raise UnsatisfiableError(f"{where}: references nested deeper than {MAX_DEPTH}")
        parts: list[object] = [self._pointed(schema["$ref"], where)] if "$ref" in schema else []
        all_of = schema.get("allOf")
        parts += all_of if isinstance(all_of, list) else []
        own = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
        for part in parts:
            if isinstance(part, Mapping):
                own = _merged(self._flat(cast(Mapping[str, object], part), where, depth + 1), own)
        return own

    def _pointed(self, reference: object, where: str) -> Mapping[str, object]:
        target: object = self._root
        for step in str(reference).removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            raise UnsatisfiableError(f"{where}: cannot resolve {reference}")
        return cast(Mapping[str, object], target)

    def _first(
        self, schema: Mapping[str, object], keyword: str, branches: list[object], where: str, depth: int
    ) -> object:
        outer = {key: value for key, value in schema.items() if key != keyword}
        failure: UnsatisfiableError | None = None
        # Simple branches first, so that a recursive type ends: `Node | None` becomes null.
        for branch in sorted(branches, key=lambda it: isinstance(it, Mapping) and ("$ref" in it or "properties" in it)):
            try:
                inner = self._flat(branch, where, depth) if isinstance(branch, Mapping) else branch
                candidate = _merged(inner, outer) if isinstance(inner, Mapping) else inner
                return self.value(candidate, f"{where}.{keyword}", depth + 1)
            except UnsatisfiableError as problem:
                failure = problem
        raise failure or UnsatisfiableError(f"{where}: no branch of {keyword}")

    def _typed(self, schema: Mapping[str, object], where: str, depth: int) -> object:  # noqa: PLR0911 - one a type
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((name for name in kind if name != "null"), "null")
        match kind:
            case "object":
                return self._object(schema, where, depth)
            case "array":
                return self._array(schema, where, depth)
            case "string":
                return _string(schema, where)
            case "integer" | "number":
                return _number(schema, whole=kind == "integer", where=where)
            case "boolean":
                return True
            case "null":
                return None
            case _:
                implied = "object" if "properties" in schema else "array" if "items" in schema else "string"
                return self._typed({**schema, "type": implied}, where, depth)

    def _object(self, schema: Mapping[str, object], where: str, depth: int) -> dict[str, object]:
        properties = schema.get("properties")
        known: Mapping[str, object] = properties if isinstance(properties, Mapping) else {}
        required = schema.get("required")
        names = [str(name) for name in required] if isinstance(required, list) else list(known)
        extra = schema.get("additionalProperties", True)
        return {name: self.value(known.get(name, extra), f"{where}.{name}", depth + 1) for name in names}

    def _array(self, schema: Mapping[str, object], where: str, depth: int) -> list[object]:
        prefix = schema.get("prefixItems")
        shapes = list(prefix) if isinstance(prefix, list) else []
        least = max(_integer(schema.get("minItems"), 0), len(shapes))
        if least > MAX_VALUES:
            raise UnsatisfiableError(f"{where}: more than {MAX_VALUES} items")
        shapes += [schema.get("items", True)] * (least - len(shapes))
        items = [self.value(shape, f"{where}[{index}]", depth + 1) for index, shape in enumerate(shapes)]
        if schema.get("uniqueItems") is True:
            items = [_distinct(item, index, schema) for index, item in enumerate(items)]
            if len({repr(item) for item in items}) != len(items):
                raise UnsatisfiableError(f"{where}: {least} unique items")
        return items


def _merged(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    merged = {**base, **over}
    if isinstance(inner := base.get("properties"), Mapping) and isinstance(outer := over.get("properties"), Mapping):
        merged["properties"] = {**inner, **outer}
    if isinstance(inner := base.get("required"), list) and isinstance(outer := over.get("required"), list):
        merged["required"] = list(dict.fromkeys([*inner, *outer]))
    return merged


def _distinct(item: object, index: int, schema: Mapping[str, object]) -> object:
    items = schema.get("items")
    choices = items.get("enum") if isinstance(items, Mapping) else None
    if isinstance(choices, list):
        return choices[min(index, len(choices) - 1)]
    match item:
        case bool():
            return index == 0
        case int() | float():
            return item + index
        case str():
            return f"{item}{index}" if index else item
        case _:
            return item


def _string(schema: Mapping[str, object], where: str) -> str:
    least, most = _integer(schema.get("minLength"), 0), _integer(schema.get("maxLength"), 1 << 20)
    if least > MAX_CHARS:
        raise UnsatisfiableError(f"{where}: more than {MAX_CHARS} characters")
    text = FORMATS.get(str(schema.get("format")), "demo"[: max(most, 0)])
    pattern = schema.get("pattern")
    if not isinstance(pattern, str):
        text = text.ljust(least, "o")
        if len(text) > most:
            raise UnsatisfiableError(f"{where}: a string of at most {most} characters")
        return text
    try:
        found = re.compile(pattern)
    except re.error as problem:
        raise UnsatisfiableError(f"{where}: the pattern is no regular expression") from problem
    for sample in (text, *PATTERN_SAMPLES, *("a" * least, "1" * least)):
        if least <= len(sample) <= most and found.search(sample):
            return sample
    raise UnsatisfiableError(f"{where}: the demo provider knows no text for the pattern {pattern!r}")


def _number(schema: Mapping[str, object], *, whole: bool, where: str) -> int | float:
    low = max(_bound(schema.get("minimum"), -math.inf), _bound(schema.get("exclusiveMinimum"), -math.inf))
    high = min(_bound(schema.get("maximum"), math.inf), _bound(schema.get("exclusiveMaximum"), math.inf))
    step = _bound(schema.get("multipleOf"), 1.0 if whole else 0.0)
    for start in (1.0, low, high):
        if math.isinf(start):
            continue
        grain = step or 1.0
        near = math.ceil(start / grain) * grain
        for candidate in (start, near, near + grain, near - grain, start + (high - low) / 2):
            number = int(candidate) if math.isfinite(candidate) and candidate == int(candidate) else candidate
            if _accepts(schema, number, whole=whole):
                return number
    raise UnsatisfiableError(f"{where}: a number within the bounds")


def _accepts(schema: Mapping[str, object], number: float, *, whole: bool) -> bool:
    multiple = _bound(schema.get("multipleOf"), 0.0)
    return (
        math.isfinite(number)
        and (not whole or isinstance(number, int))
        and number >= _bound(schema.get("minimum"), -math.inf)
        and number <= _bound(schema.get("maximum"), math.inf)
        and number > _bound(schema.get("exclusiveMinimum"), -math.inf)
        and number < _bound(schema.get("exclusiveMaximum"), math.inf)
        and (not multiple or (number / multiple).is_integer())
    )


def _bound(value: object, absent: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else absent


def _integer(value: object, absent: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else absent
