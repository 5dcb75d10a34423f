"""What decide turns away: each refusal's code, status and shape, in both dialects."""

from __future__ import annotations

from typing import Any

import pytest

from extproc.decide.refusals import unavailable
from extproc.errors import Code, Dialect
from extproc.exchange import Respond
from tests.deciding import ALL, CHAT, NARROW, assert_refusal, outcome

REFUSED: list[tuple[str, dict[str, Any] | bytes, dict[str, Any], Code]] = [
    ("no key", CHAT, {"key": None}, Code.MISSING_KEY),
    ("wrong key", CHAT, {"key": "sk-nobody"}, Code.INVALID_KEY),
    ("no scheme", CHAT, {"key": None, "authorization": ALL}, Code.INVALID_KEY),
    ("two credentials", CHAT, {"x_api_key": NARROW}, Code.CONFLICTING_CREDENTIALS),
    ("wrong key before unknown path", CHAT, {"path": "/nowhere", "key": "sk-nobody"}, Code.INVALID_KEY),
    ("unknown path", CHAT, {"path": "/nowhere"}, Code.UNKNOWN_PATH),
    ("method", CHAT, {"method": "PUT"}, Code.METHOD_NOT_ALLOWED),
    ("text", CHAT, {"content_type": "text/plain"}, Code.UNSUPPORTED_CONTENT_TYPE),
    ("charset", CHAT, {"content_type": "application/json; charset=utf-16"}, Code.UNSUPPORTED_CONTENT_TYPE),
    ("gzip", CHAT, {"content_encoding": "gzip"}, Code.UNSUPPORTED_CONTENT_ENCODING),
    ("identity, gzip", CHAT, {"content_encoding": "identity, gzip"}, Code.UNSUPPORTED_CONTENT_ENCODING),
    ("declared length", CHAT, {"content_length": "1001"}, Code.BODY_TOO_LARGE),
    ("no length", CHAT, {"content_length": "-1"}, Code.BODY_TOO_LARGE),
    ("longer than declared", {**CHAT, "x": "x" * 1000}, {}, Code.BODY_TOO_LARGE),
    ("no JSON", b"{", {}, Code.INVALID_JSON),
    ("no body", b"", {}, Code.INVALID_JSON),
    ("an array", b"[]", {}, Code.INVALID_JSON),
    ("twins", b'{"model":"plain","model":"alias","messages":[]}', {}, Code.DUPLICATE_KEY),
    ("case twins", {**CHAT, "Model": "alias"}, {}, Code.DUPLICATE_KEY),
    ("model no text", {**CHAT, "model": 1}, {}, Code.INVALID_TYPE),
    ("stream no boolean", {**CHAT, "stream": "true"}, {}, Code.INVALID_TYPE),
    ("no model", {"messages": []}, {}, Code.MISSING_FIELD),
    ("null model", {**CHAT, "model": None}, {}, Code.MISSING_FIELD),
    ("no messages", {"model": "plain"}, {}, Code.MISSING_FIELD),
    ("unknown model", {**CHAT, "model": "nope"}, {}, Code.MODEL_NOT_FOUND),
    ("spaces", {**CHAT, "model": " plain"}, {}, Code.MODEL_NOT_FOUND),
    ("line break", {**CHAT, "model": "glob-\n"}, {}, Code.MODEL_NOT_FOUND),
    ("endless name", {**CHAT, "model": "glob-" + "x" * 300}, {}, Code.MODEL_NOT_FOUND),
    ("a model of others", {**CHAT, "model": "alias"}, {"key": NARROW}, Code.MODEL_NOT_ALLOWED),
    ("a denied model", {**CHAT, "model": "glob-secret"}, {"key": NARROW}, Code.MODEL_NOT_ALLOWED),
    ("dialect", {**CHAT, "model": "sonnet"}, {}, Code.DIALECT_NOT_SUPPORTED),
]


@pytest.mark.parametrize(("body", "headers", "code"), [it[1:] for it in REFUSED], ids=[it[0] for it in REFUSED])
@pytest.mark.parametrize("dialect", Dialect)
async def test_what_is_refused_has_its_code_in_the_clients_dialect(
    body: dict[str, Any] | bytes, headers: dict[str, Any], code: Code, dialect: Dialect
) -> None:
    where: dict[str, Any] = {} if dialect is Dialect.OPENAI else {"path": "/v1/messages", "anthropic_version": "1"}
    if dialect is Dialect.ANTHROPIC and code is Code.DIALECT_NOT_SUPPORTED:
        body = {**CHAT, "model": "plain"}
    refused = await outcome(body, **{**where, **headers})
    assert_refusal(refused, code, dialect)


async def test_a_refusal_shows_no_secret_and_no_more_than_the_beginning_of_a_name() -> None:
    refused = await outcome({**CHAT, "model": "\u202e" + "x" * 5000})
    assert isinstance(refused, Respond)
    assert len(refused.body) < 400
    assert ALL.encode() not in refused.body
    assert "\u202e" not in refused.body.decode()


@pytest.mark.parametrize("dialect", Dialect)
def test_when_deciding_breaks_the_answer_is_closed_and_tells_nothing(dialect: Dialect) -> None:
    assert_refusal(unavailable(dialect, "id-1"), Code.GATEWAY_UNAVAILABLE, dialect)
