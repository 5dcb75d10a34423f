"""JSON bodies: what can be read in two ways is refused, what can not goes upstream byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.e2e.threats import BODY, CHAT, JSON, MESSAGES, World, bearer, post, running
from tests.upstream import Recorded

pytestmark = pytest.mark.e2e

MESSAGES_FIELD = b'"messages":[{"role":"user","content":"hi"}]'
JSON_PATHS = (
    *("/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages", "/v1/messages/count_tokens", CHAT),
    *("/v1/moderations", "/v1/rerank", "/v1/images/generations", "/v1/audio/speech", "/v1/files"),
)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("json")) as world:
        yield world


@pytest.fixture
def world(started: World) -> World:
    started.forget()
    return started


def named(model: str, *, ascii_only: bool = False) -> bytes:
    """A chat request for `model`, as JSON has it."""
    return (
        b'{"model":'
        + json.dumps(model, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        + b","
        + MESSAGES_FIELD
        + b"}"
    )


def with_field(field: bytes) -> bytes:
    return BODY[:-1] + b"," + field + b"}"


TWICE = {
    "model, another": with_field(b'"model":"narrow"'),
    "model, the same": with_field(b'"model":"demo"'),
    "model, escaped": with_field(b'"\\u006dodel":"narrow"'),
    "model, all escaped": with_field(b'"\\u006d\\u006F\\u0064\\u0065\\u006c":"narrow"'),
    "model, escaped first": b'{"\\u006dodel":"narrow",' + BODY[1:],
    "model, in front": b'{"model":"narrow",' + BODY[1:],
    "messages": with_field(b'"messages":[]'),
    "temperature": with_field(b'"temperature":1,"temperature":2'),
    "a key of its own": with_field(b'"x":1,"x":1'),
    "an empty key": with_field(b'"":1,"":2'),
    "a key with a NUL": with_field(b'"\\u0000":1,"\\u0000":2'),
    "Model": with_field(b'"Model":"narrow"'),
    "MODEL": with_field(b'"MODEL":"narrow"'),
    "mOdel, escaped": with_field(b'"m\\u004fdel":"narrow"'),
    "Messages": with_field(b'"Messages":[]'),
    "long s": with_field('"ſtream":true'.encode()),
    "long s, escaped": with_field(b'"me\\u017f\\u017fages":[]'),
    "Stream_Options": with_field(b'"Stream_Options":{}'),
}


def test_a_key_given_twice_or_in_two_cases_is_refused(world: World) -> None:
    world.refuse({name: post(CHAT, body) for name, body in TWICE.items()}, 400, "duplicate_key")


def test_a_key_given_twice_is_refused_on_every_endpoint(world: World) -> None:
    body = b'{"model":"demo","model":"demo","messages":[],"input":"x","prompt":"x","purpose":"batch"}'
    world.refuse({path: post(path, body) for path in JSON_PATHS}, 400, "duplicate_key")
    extra = body.replace(b'"model":"demo","model"', b'"x":1,"x":2,"model"')
    world.refuse({path: post(path, extra) for path in JSON_PATHS}, 400, "duplicate_key")
    cased = body.replace(b'"model":"demo","model"', b'"MODEL"')
    world.refuse({path: post(path, cased) for path in JSON_PATHS}, 400, "duplicate_key")


def test_a_case_variant_instead_of_the_model_chooses_none(world: World) -> None:
    cased = (b"Model", b"MODEL", b"m\\u004fdel")
    cases = {repr(key): post(CHAT, BODY.replace(b'"model"', b'"' + key + b'"')) for key in cased}
    world.refuse(cases, 400, "duplicate_key")
    alike = [
        json.dumps(key, ensure_ascii=False).encode()
        for key in ("model ", " model", "modеl", "ｍｏｄｅｌ", "mod\u200bel")
    ]
    world.refuse({repr(key): post(CHAT, BODY.replace(b'"model"', key)) for key in alike}, 400, "missing_field")


NOT_JSON = {
    "empty": b"",
    "white space": b" \n",
    "BOM": b"\xef\xbb\xbf" + BODY,
    "BOM inside": BODY.replace(b'{"model"', b'{\xef\xbb\xbf"model"'),
    "UTF-16": BODY.decode().encode("utf-16"),
    "UTF-16 without a mark": BODY.decode().encode("utf-16-le"),
    "UTF-32": BODY.decode().encode("utf-32"),
    "Latin-1": with_field('"user":"é"'.encode("latin-1")),
    "overlong UTF-8": with_field(b'"user":"\xc0\xae"'),
    "surrogate in UTF-8": with_field(b'"user":"\xed\xa0\x80"'),
    "lone surrogate": with_field(b'"user":"\\ud800"'),
    "lone surrogate in a key": with_field(b'"\\udfff":1'),
    "lone surrogate in the model": BODY.replace(b"demo", b"demo\\ud800"),
    "NaN": with_field(b'"temperature":NaN'),
    "nested NaN": with_field(b'"metadata":{"a":[NaN]}'),
    "Infinity": with_field(b'"temperature":-Infinity'),
    "leading zero": with_field(b'"seed":01'),
    "hex": with_field(b'"seed":0x1'),
    "plus": with_field(b'"seed":+1'),
    "single quotes": b"{'model':'demo'}",
    "no quotes": b"{model:1}",
    "comment": BODY[:-1] + b"/* */}",
    "trailing comma": BODY[:-1] + b",}",
    "trailing bytes": BODY + b"x",
    "two objects": BODY + BODY,
    "trailing NUL": BODY + b"\0",
    "cut off": BODY[:-1],
    "bad escape": with_field(b'"user":"\\q"'),
    "raw line break": with_field(b'"user":"a\nb"'),
    "raw NUL": with_field(b'"user":"a\0b"'),
    "depth 10,000": with_field(b'"metadata":' + b"[" * 10_000 + b"]" * 10_000),
    "depth of objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "never closed": with_field(b'"metadata":' + b"[" * 30_000),
    "array": b"[" + BODY + b"]",
    "string": b'"' + b"demo" + b'"',
    "number": b"1",
    "null": b"null",
    "true": b"true",
    "form": b"model=demo&messages=hi",
    "too many keys": b"{" + b",".join(b'"k%d":1' % at for at in range(2000)) + b"}",
}


def test_what_is_not_one_json_object_is_refused_and_the_worker_lives(world: World) -> None:
    workers = world.gateway.workers()
    world.refuse({name: post(CHAT, body) for name, body in NOT_JSON.items()}, 400, "invalid_json")
    world.refuse({name: post(MESSAGES, body) for name, body in list(NOT_JSON.items())[:12]}, 400, "invalid_json")
    world.deliver({"benign": post()})
    assert world.gateway.workers() == workers


WRONG_TYPES = {
    "model a number": BODY.replace(b'"demo"', b"1"),
    "model an array": BODY.replace(b'"demo"', b'["demo"]'),
    "model an object": BODY.replace(b'"demo"', b'{"id":"demo"}'),
    "model true": BODY.replace(b'"demo"', b"true"),
    "messages a string": BODY.replace(MESSAGES_FIELD, b'"messages":"hi"'),
    "stream a string": with_field(b'"stream":"true"'),
    "stream a number": with_field(b'"stream":1'),
    "stream_options an array": with_field(b'"stream_options":[]'),
    "max_tokens a float": with_field(b'"max_tokens":1.5'),
    "tools an object": with_field(b'"tools":{}'),
    "n a string": with_field(b'"n":"2"'),
}


def test_fields_of_the_wrong_type_are_refused(world: World) -> None:
    world.refuse({name: post(CHAT, body) for name, body in WRONG_TYPES.items()}, 400, "invalid_type")
    missing = {"no model": b"{" + MESSAGES_FIELD + b"}", "null": BODY.replace(b'"demo"', b"null"), "none": b"{}"}
    world.refuse({name: post(CHAT, body) for name, body in missing.items()}, 400, "missing_field")


INTACT = {
    "integer above 2^53": with_field(b'"seed":9007199254740993'),
    "integer above 2^64": with_field(b'"seed":12345678901234567890123'),
    "minus zero": with_field(b'"top_k":-0,"temperature":-0.0'),
    "1.0 and exponents": with_field(b'"temperature":1.0,"top_p":1E-2,"x":1e999'),
    "many digits": with_field(b'"temperature":0.1000000000000000055511151231257827'),
    "escapes": with_field(b'"user":"\\u0041\\/\\b\\f\\t\\uD83D\\uDE00\\u00e9"'),
    "escaped keys": with_field(b'"\\u0075ser":"a","metadata":{"\\u0061":1}'),
    "white space": b' \r\n\t{ \n"model" :\t"demo" ,\r\n ' + MESSAGES_FIELD + b"\n}\r\n ",
    "nested twins": with_field(b'"metadata":{"a":"1","a":"2"},"tools":[{"Name":"x","name":"y","name":"z"}]'),
    "nested model": with_field(b'"metadata":{"model":"narrow","MODEL":"x"}'),
    "model in a string": with_field(b'"user":"\\",\\"model\\":\\"narrow\\""'),
    "model in a key": with_field(b'"x\\",\\"model":"narrow"'),
    "depth 500": with_field(b'"x":' + b"[" * 500 + b"]" * 500),
    "emoji and combining": with_field('"user":"👩‍👩‍👧 é ａ"'.encode()),
    "noncharacters": with_field('"user":"\ufffe\uffff\u0000"'.replace("\u0000", "\\u0000").encode()),
    "unknown fields": with_field(b'"x_vendor":{"a":[null,true,false]},"":1,"a b":2'),
    "null fields": with_field(b'"temperature":null,"stream":null,"tools":null,"max_tokens":null'),
    "DEL": with_field(b'"user":"\x7f"'),
    "key order": b"{" + MESSAGES_FIELD + b',"model":"demo"}',
}


def test_legal_oddities_go_upstream_byte_for_byte(world: World) -> None:
    seen = world.deliver({name: post(CHAT, body) for name, body in INTACT.items()})
    assert [one.body for one in seen] == list(INTACT.values())


def test_where_the_model_is_renamed_all_other_bytes_stay(world: World) -> None:
    bodies = {name: body.replace(b'"demo"', b'"renamed"') for name, body in INTACT.items()}
    expected = [body.replace(b'"demo"', b'"other-name"') for body in INTACT.values()]
    seen = world.deliver({name: post(CHAT, body) for name, body in bodies.items()})
    assert [one.body for one in seen] == expected
    for one in seen:
        assert one.header("content-length") in (None, str(len(one.body)))


def test_an_escaped_name_is_the_name_that_it_spells(world: World) -> None:
    escaped = {"value": BODY.replace(b"demo", b"\\u0064emo"), "key": BODY.replace(b"model", b"\\u006dodel")}
    seen = world.deliver({name: post(CHAT, body) for name, body in escaped.items()})
    assert [one.body for one in seen] == list(escaped.values())
    (renamed,) = world.deliver({"": post(CHAT, escaped["key"].replace(b"demo", b"\\u0072enamed"))})
    assert renamed.body == escaped["key"].replace(b"demo", b"other-name")


UNKNOWN = [
    "Demo",
    "DEMO",
    " demo",
    "demo ",
    "demo\n",
    "\tdemo",
    "demo\r\nx-evil: 1",
    "demo\0",
    "dem\u200bo",
    "ｄｅｍｏ",
    "dеmo",
]
UNKNOWN += [
    "demo\u0301",
    "",
    " ",
    "de*o",
    "*",
    "any",
    "any/x\n",
    "any/\r\nx: y",
    "any/\u2028",
    "any/\x7f",
    "any/" + "x" * 300,
]
UNKNOWN += ["x" * 60_000, "../demo", "demo/", "\ufeffdemo", "demo\U000e0041", "any/\u202e"]


def test_model_names_match_exactly(world: World) -> None:
    answers = world.refuse({repr(name)[:40]: post(CHAT, named(name)) for name in UNKNOWN}, 404, "model_not_found")
    for answer in answers:
        assert len(answer.body) < 600
        assert {"x-evil", "x"}.isdisjoint(name.lower() for name, _ in answer.headers)


def test_names_of_a_glob_pass_as_they_are(world: World) -> None:
    names = ["any/x", "any/ x", "any/Größe-模型", "any/x;y%20z", "any/../x", 'any/"quoted"', "any/" + "x" * 200]
    seen = world.deliver({name: post(CHAT, named(name)) for name in names})
    assert [one.json["model"] for one in seen] == names
    assert [one.body for one in seen] == [named(name) for name in names]
    assert not [one for one in seen if one.header("x-extproc-model")]


def test_a_refused_model_is_in_the_ledger_as_it_was_asked_for(world: World) -> None:
    for name in ("unknown", "Größe\n\0", "x" * 60_000):
        (answer,) = world.refuse({"": post(CHAT, named(name))}, 404, "model_not_found")
        (row,) = world.gateway.rows(f"request_id = '{answer.header('x-request-id')}'")
        assert row["alias"] == name.replace("\0", "\ufffd")[:256]


def test_text_that_looks_like_a_field_does_not_choose(world: World) -> None:
    prompt = json.dumps('{"model":"narrow"}, "model": "narrow"').encode()
    body = b'{"messages":[{"role":"user","content":' + prompt + b'}],"model":"renamed"}'
    (seen,) = world.deliver({"": post(CHAT, body)})
    assert seen.body == body.replace(b'"renamed"', b'"other-name"')


def test_usage_is_asked_for_behind_all_that_the_client_wrote(world: World) -> None:
    def changed(body: bytes) -> bytes:
        (seen,) = world.deliver({"": post(CHAT, body)})
        return bytes(seen.body)

    stream = with_field(b'"seed":9007199254740993,"stream":true')
    asked = b',"stream_options":{"include_usage":true}}'
    assert changed(stream) == stream[:-1] + asked
    own = with_field(b'"stream":true,"stream_options":{"include_usage":true , "x":1.0}')
    assert changed(own) == own
    assert changed(own.replace(b"true ,", b"false ,")) == own
    empty = with_field(b'"stream_options":{ },"stream":true')
    assert json.loads(changed(empty))["stream_options"] == {"include_usage": True}
    assert changed(empty).startswith(empty[: empty.index(b"{ }") + 2])


def test_content_type_names_the_bytes_that_are_read(world: World) -> None:
    types = [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
    ]
    seen: list[Recorded] = world.deliver({each: _typed(each) for each in types})
    assert [one.header("content-type") for one in seen] == types


def _typed(content_type: str) -> bytes:
    return post(auth=[bearer()]).replace(f"{JSON[0]}: {JSON[1]}".encode(), f"content-type: {content_type}".encode())
