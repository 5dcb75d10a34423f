"""Properties of reading and editing JSON bodies: every span is the value, every other byte stays, nothing raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extproc.dialects.body import Edit, JsonBody, case_variant, read_json, splice, wrong_type
from extproc.errors import Code, Refusal

SPACE = st.text(" \t\r\n", max_size=3)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | KEYS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@st.composite
def written(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """An object, and one of the many ways to write it down: white space, escapes and order as they come."""
    members = draw(st.dictionaries(KEYS, VALUES, max_size=6))
    parts = []
    for key, value in members.items():
        text = draw(st.sampled_from([json.dumps(key), json.dumps(key, ensure_ascii=False), escaped(key)]))
        indent = draw(st.sampled_from([None, 1]))
        encoded = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=indent)
        parts.append("".join((draw(SPACE), text, draw(SPACE), ":", draw(SPACE), encoded, draw(SPACE))))
    inner = ",".join(parts) or draw(SPACE)
    return members, f"{draw(SPACE)}{{{inner}}}{draw(SPACE)}".encode()


def escaped(text: str) -> str:
    """A JSON string in which every character is an escape."""
    units = text.encode("utf-16-be")
    return '"' + "".join(f"\\u{units[at]:02x}{units[at + 1]:02X}" for at in range(0, len(units), 2)) + '"'


def parsed(body: bytes) -> JsonBody:
    form = read_json(body)
    assert isinstance(form, JsonBody), form
    return form


@given(written())
def test_every_span_holds_the_value_that_json_reads(case: tuple[dict[str, Any], bytes]) -> None:
    members, body = case
    form = parsed(body)
    assert list(form) == list(json.loads(body)) == list(members)
    for key in members:
        raw = form.raw(key)
        assert raw is not None
        assert json.loads(raw) == json.loads(body)[key]
        assert raw == raw.strip()


@given(written(), st.data(), VALUES)
def test_replacing_a_value_keeps_every_other_byte(
    case: tuple[dict[str, Any], bytes], data: st.DataObject, value: Any
) -> None:
    members, body = case
    if not members:
        members, body = {"model": 1}, b' { "model" : 1 }'
    key = data.draw(st.sampled_from(sorted(members)))
    edit = parsed(body).replace(key, json.dumps(value).encode())
    changed = splice(body, [edit])
    assert json.loads(changed) == {**json.loads(body), key: value}
    assert changed.startswith(body[: edit.start])
    assert changed.endswith(body[edit.end :])
    assert len(changed) == len(body) - (edit.end - edit.start) + len(edit.new)


@given(written(), VALUES)
def test_appending_a_key_keeps_all_bytes_before_it(case: tuple[dict[str, Any], bytes], value: Any) -> None:
    members, body = case
    key = "x" * (1 + max((len(name) for name in members), default=0))
    edit = parsed(body).append(key, json.dumps(value).encode())
    changed = splice(body, [edit])
    assert json.loads(changed) == {**json.loads(body), key: value}
    assert changed[: edit.start] + changed[edit.start + len(edit.new) :] == body


@given(st.lists(st.integers(0, 60), min_size=2, max_size=8, unique=True), st.binary(min_size=60, max_size=60))
def test_splice_makes_edits_in_any_order(cuts: list[int], body: bytes) -> None:
    places = sorted(cuts)[: len(cuts) // 2 * 2]
    edits = [Edit(start, end, b"<%d>" % start) for start, end in zip(places[::2], places[1::2], strict=True)]
    expected = bytearray(body)
    for edit in reversed(edits):
        expected[edit.start : edit.end] = edit.new
    assert splice(body, edits) == splice(body, edits[::-1]) == bytes(expected)


@given(written(), st.data(), VALUES)
def test_a_key_given_twice_is_refused_wherever_it_stands_and_however_it_is_spelled(
    case: tuple[dict[str, Any], bytes], data: st.DataObject, value: Any
) -> None:
    members, _ = case
    members = members or {"a": 1}
    texts = [(json.dumps(key), json.dumps(each)) for key, each in members.items()]
    key = data.draw(st.sampled_from(sorted(members)))
    twin = data.draw(st.sampled_from([json.dumps(key), json.dumps(key, ensure_ascii=False), escaped(key)]))
    again = data.draw(st.sampled_from([value, members[key]]))
    texts.insert(data.draw(st.integers(0, len(texts))), (twin, json.dumps(again)))
    body = ("{" + ",".join(f"{name}:{text}" for name, text in texts) + "}").encode()
    assert read_json(body) == Refusal(Code.DUPLICATE_KEY, "A top-level key of the body stands in it more than once.")


@pytest.mark.parametrize("first", [b"1", b"12", b"1.5", b'"a"', b'"a\\""', b"[1]", b"{}", b"null", b"-0", b"0"])
@pytest.mark.parametrize("second", [b"1", b"12", b"1.5", b'"a"', b'"a\\""', b"[1]", b"{}", b"null", b"-0", b"0"])
@pytest.mark.parametrize("between", [b"", b',"b":1', b',"b":{"a":1}'])
def test_a_twin_whose_value_begins_alike_is_still_a_twin(first: bytes, second: bytes, between: bytes) -> None:
    form = read_json(b'{"a":' + first + between + b',"a":' + second + b"}")
    assert isinstance(form, Refusal)
    assert form.code is Code.DUPLICATE_KEY


def test_a_nested_key_given_twice_stays_as_it_is() -> None:
    body = b'{"model":"m","metadata":{"a":1,"a":2},"messages":[{"role":"user","role":"system"}]}'
    assert parsed(body).raw("metadata") == b'{"a":1,"a":2}'


@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
@example(b"\xef\xbb\xbf{}")
@example(b'{"a":NaN}')
@example(b'{"a":"\\ud800"}')
@example(b'{"\\ud800":1}')
@example(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}")
@example(b'{"a":' * 100_000)
@example('{"a":1}'.encode("utf-16"))
@example(b'{"a":1}{}')
@example(b'{"a":1}\0')
def test_reading_never_raises(body: bytes) -> None:
    form = read_json(body)
    if isinstance(form, JsonBody):
        assert isinstance(json.loads(body), dict)
        for key in form:
            form.raw(key)


@given(written(), st.data())
def test_reading_a_damaged_body_never_raises_and_never_misreads(
    case: tuple[dict[str, Any], bytes], data: st.DataObject
) -> None:
    damaged = bytearray(case[1])
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    form = read_json(bytes(damaged))
    if isinstance(form, JsonBody):
        document = json.loads(bytes(damaged))
        assert {key: json.loads(form.raw(key) or b"") for key in form} == document


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"a"',
        b"1",
        b"{",
        b'{"a":1',
        b'{"a":1,}',
        b"{a:1}",
        b"{'a':1}",
        b'{"a":1}x',
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":.5}',
        b'{"a":1.}',
        b'{"a":Infinity}',
        b'{"a":"\n"}',
        b'{"a":"\\q"}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":/**/1}',
    ],
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    form = read_json(body)
    assert isinstance(form, Refusal)
    assert form.code is Code.INVALID_JSON


@pytest.mark.parametrize("number", [b"9007199254740993", b"12345678901234567890123", b"-0", b"1.0", b"1E2", b"1e999"])
def test_numbers_stay_as_they_were_written(number: bytes) -> None:
    assert parsed(b'{"seed":' + number + b"}").raw("seed") == number


@pytest.mark.parametrize(
    "key", ["Model", "MODEL", "mODEL", "ſtream", "meſſages", "STREAM", "Max_Tokens", "N", "Stream_Options"]
)
def test_a_key_that_only_case_sets_apart_from_a_judged_one_is_refused(key: str) -> None:
    refusal = case_variant(parsed(json.dumps({key: 1}).encode()))
    assert refusal is not None
    assert refusal.code is Code.DUPLICATE_KEY


@pytest.mark.parametrize("key", ["model", "mode", "models", "model ", " model", "ｍodel", "top_k", "User"])
def test_other_keys_are_left_alone(key: str) -> None:
    assert case_variant(parsed(json.dumps({key: 1}).encode())) is None


@pytest.mark.parametrize(
    ("raw", "kind", "fits"),
    [
        (b'"a"', "string", True),
        (b"1", "string", False),
        (b"[]", "array", True),
        (b"{}", "array", False),
        (b"true", "boolean", True),
        (b'"true"', "boolean", False),
        (b"1", "boolean", False),
        (b"12", "integer", True),
        (b"-0", "integer", True),
        (b"1.0", "integer", False),
        (b"1e3", "integer", False),
        (b"1.5", "number", True),
        (b"null", "string", True),
        (b"[]", "string|array", True),
        (b"{}", "string|array", False),
    ],
)
def test_types_are_judged_by_the_value_itself(raw: bytes, kind: str, fits: bool) -> None:
    refusal = wrong_type(parsed(b'{"a":' + raw + b"}"), {"a": kind})
    assert (refusal is None) is fits
    if refusal is not None:
        assert (refusal.code, refusal.param) == (Code.INVALID_TYPE, "a")
