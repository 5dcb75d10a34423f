"""Refusals as bytes: each code in both dialects, and words that a client chose."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import Code, Dialect, Refusal, error_body, error_headers

STATUSES = {
    "missing_api_key": 401,
    "invalid_api_key": 401,
    "conflicting_credentials": 401,
    "model_not_allowed": 403,
    "model_not_found": 404,
    "unknown_path": 404,
    "method_not_allowed": 405,
    "dialect_not_supported": 400,
    "no_default_provider": 400,
    "invalid_json": 400,
    "duplicate_key": 400,
    "invalid_type": 400,
    "missing_field": 400,
    "invalid_multipart": 400,
    "invalid_request": 400,
    "body_too_large": 413,
    "unsupported_content_type": 415,
    "unsupported_content_encoding": 415,
    "provider_auth": 502,
    "rate_limited": 429,
    "all_targets_failed": 503,
    "gateway_unavailable": 503,
}
"""The contract with clients: what is here may be added to, and never renamed."""
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    502: "api_error",
}


def test_codes_and_their_statuses_are_the_contract() -> None:
    assert {code.value: Refusal(code, "").status for code in Code} == STATUSES


@pytest.mark.parametrize("code", Code)
def test_openais_clients_find_message_type_param_and_code(code: Code) -> None:
    document = json.loads(error_body(Refusal(code, "Why.", "model"), Dialect.OPENAI, "id-1"))
    error = document.pop("error")
    assert document == {}
    assert (error["message"], error["param"], error["code"]) == ("Why. (request id: id-1)", "model", code)
    assert (error["type"] == "server_error") == (STATUSES[code] >= 500)
    assert error_headers(Dialect.OPENAI, "id-1") == (("content-type", "application/json"),)


@pytest.mark.parametrize("code", Code)
def test_anthropics_clients_find_type_message_code_and_request_id(code: Code) -> None:
    document = json.loads(error_body(Refusal(code, "Why.", "model"), Dialect.ANTHROPIC, "id-1"))
    kind = ANTHROPIC_TYPES.get(STATUSES[code])
    assert document["error"].pop("type") == kind or (kind is None and STATUSES[code] == 503)
    assert document == {"type": "error", "error": {"message": "Why.", "code": code}, "request_id": "id-1"}
    assert dict(error_headers(Dialect.ANTHROPIC, "id-1"))["request-id"] == "id-1"


@given(st.text(), st.sampled_from(Dialect), st.text(alphabet=st.characters(codec="ascii")))
def test_no_text_breaks_the_document(message: str, dialect: Dialect, request_id: str) -> None:
    document = json.loads(error_body(Refusal(Code.INVALID_JSON, message), dialect, request_id))
    assert message in document["error"]["message"]
