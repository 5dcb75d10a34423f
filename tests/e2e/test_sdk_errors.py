"""Refusals and failures as the official SDKs raise them: the right class, a stable code, the id of the request.

The surprising thing: Anthropic's SDK reads that id from the header `request-id` and from no other, so a refusal in its
dialect bears it beside `x-request-id`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import pytest

from tests.gateway import KEY, NARROW_KEY, PROVIDER_SECRET, Gateway, config, digest, free_port
from tests.upstream import RecordingUpstream, Reply
from tests.upstream_answers import compact

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("error")]

MAX_BODY_BYTES = 65536
USER: Any = [{"role": "user", "content": "What is an Envoy?"}]
CHAT: dict[str, Any] = {"model": "gpt-test", "messages": USER}
MESSAGES: dict[str, Any] = {"model": "claude-test", "max_tokens": 64, "messages": USER}
INVALID = "invalid_request_error"


@pytest.fixture(scope="module")
def upstream() -> Iterator[RecordingUpstream]:
    with RecordingUpstream() as recording:
        yield recording


@pytest.fixture(scope="module")
def gateway(upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    secret = {"env": "PROVIDER_KEY"}
    nowhere = f"http://127.0.0.1:{free_port()}"
    sections = config(
        providers={
            "acme": {"kind": "openai", "endpoint": f"{upstream.url}/v1", "api_key": secret},
            "claude": {"kind": "anthropic", "endpoint": upstream.url, "api_key": secret},
            "gone": {"kind": "openai", "endpoint": f"{nowhere}/v1"},
            "gone-too": {"kind": "anthropic", "endpoint": nowhere},
        },
        models={
            "gpt-test": {"targets": [{"provider": "acme"}]},
            "claude-test": {"targets": [{"provider": "claude"}]},
            "narrow": {"targets": [{"provider": "acme"}, {"provider": "claude"}]},
            "down": {"targets": [{"provider": "gone"}, {"provider": "gone-too"}]},
        },
        teams={
            "all": {"models": ["*"], "default_provider": "acme", "keys": [{"id": "all", "sha256": digest(KEY)}]},
            "narrow": {"models": ["narrow"], "keys": [{"id": "narrow", "sha256": digest(NARROW_KEY)}]},
        },
        listen={"max_body_bytes": MAX_BODY_BYTES},
    )
    with Gateway(tmp_path_factory.mktemp("sdk-errors"), sections) as running:
        yield running


@pytest.fixture(autouse=True)
def _anew(upstream: RecordingUpstream) -> None:
    upstream.behave_normally()
    upstream.clear()


def openai_client(gateway: Gateway, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def anthropic_client(gateway: Gateway, key: str = KEY) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=gateway.url, api_key=key, max_retries=0)


@dataclass(frozen=True)
class Raised:
    """What a call with `change` made to it must raise. `error` is the class by its name in both SDKs."""

    error: str
    status: int
    code: str
    kind: str
    change: dict[str, Any]
    key: str = KEY
    param: str | None = None


REFUSED = {
    "a wrong key": Raised("AuthenticationError", 401, "invalid_api_key", "authentication_error", {}, key="sk-wrong"),
    "a key in capitals": Raised("AuthenticationError", 401, "invalid_api_key", "authentication_error", {}, KEY.upper()),
    "a shorter key": Raised("AuthenticationError", 401, "invalid_api_key", "authentication_error", {}, KEY[:-1]),
    "another model's key": Raised(
        "PermissionDeniedError", 403, "model_not_allowed", "permission_error", {}, NARROW_KEY, "model"
    ),
    "no such model": Raised(
        "NotFoundError", 404, "model_not_found", "not_found_error", {"model": "nope"}, param="model"
    ),
    "a model in capitals": Raised(
        "NotFoundError", 404, "model_not_found", "not_found_error", {"model": "GPT-TEST"}, param="model"
    ),
    "a wrong type": Raised("BadRequestError", 400, "invalid_type", INVALID, {"messages": "Hi"}, param="messages"),
    "a field left out": Raised("BadRequestError", 400, "missing_field", INVALID, {"messages": None}, param="messages"),
    "a twin in capitals": Raised(
        "BadRequestError", 400, "duplicate_key", INVALID, {"extra_body": {"MODEL": "narrow"}}, param="model"
    ),
    "too large a body": Raised(
        "APIStatusError", 413, "body_too_large", "request_too_large", {"metadata": {"user_id": "x" * MAX_BODY_BYTES}}
    ),
    "a compressed body": Raised(
        "APIStatusError",
        415,
        "unsupported_content_encoding",
        INVALID,
        {"extra_headers": {"content-encoding": "gzip"}},
    ),
    "a body that is not JSON": Raised(
        "APIStatusError", 415, "unsupported_content_type", INVALID, {"extra_headers": {"content-type": "text/plain"}}
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_raises_openais_own_error_and_reaches_no_provider(
    gateway: Gateway, upstream: RecordingUpstream, case: str
) -> None:
    refused = REFUSED[case]
    with openai_client(gateway, refused.key) as sdk, pytest.raises(getattr(openai, refused.error)) as caught:
        sdk.chat.completions.create(**{**CHAT, **refused.change})
    _is_openai_refusal(caught.value, refused.status, refused.code, refused.param)
    assert upstream.requests == []


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_raises_anthropics_own_error_and_reaches_no_provider(
    gateway: Gateway, upstream: RecordingUpstream, case: str
) -> None:
    refused = REFUSED[case]
    with anthropic_client(gateway, refused.key) as sdk, pytest.raises(getattr(anthropic, refused.error)) as caught:
        sdk.messages.create(**{**MESSAGES, **refused.change})
    _is_anthropic_refusal(caught.value, refused.status, refused.code, refused.kind)
    assert upstream.requests == []


def test_two_credentials_that_differ_are_an_authentication_error(gateway: Gateway, upstream: RecordingUpstream) -> None:
    with openai_client(gateway) as sdk:
        with pytest.raises(openai.AuthenticationError) as caught:
            sdk.chat.completions.create(**CHAT, extra_headers={"x-api-key": NARROW_KEY})
        _is_openai_refusal(caught.value, 401, "conflicting_credentials")
        assert upstream.requests == []
        assert sdk.chat.completions.create(**CHAT, extra_headers={"x-api-key": KEY}).choices


def test_a_dialect_that_no_provider_of_the_model_speaks_is_a_bad_request_error(
    gateway: Gateway, upstream: RecordingUpstream
) -> None:
    with openai_client(gateway) as sdk, pytest.raises(openai.BadRequestError) as of_openai:
        sdk.chat.completions.create(**{**CHAT, "model": "claude-test"})
    _is_openai_refusal(of_openai.value, 400, "dialect_not_supported", "model")
    with anthropic_client(gateway) as claude, pytest.raises(anthropic.BadRequestError) as of_anthropic:
        claude.messages.create(**{**MESSAGES, "model": "gpt-test"})
    _is_anthropic_refusal(of_anthropic.value, 400, "dialect_not_supported", INVALID)
    assert upstream.requests == []


def test_a_path_that_does_not_exist_is_a_not_found_error(gateway: Gateway) -> None:
    with openai_client(gateway) as sdk, pytest.raises(openai.NotFoundError) as of_openai:
        sdk.post("/nowhere", cast_to=object, body={})
    _is_openai_refusal(of_openai.value, 404, "unknown_path")
    with anthropic_client(gateway) as claude, pytest.raises(anthropic.NotFoundError) as of_anthropic:
        claude.post("/v1/messages/nowhere", cast_to=object, body={})
    _is_anthropic_refusal(of_anthropic.value, 404, "unknown_path", "not_found_error")


def test_a_body_that_grows_too_large_without_telling_its_length_is_the_same_error(
    gateway: Gateway, upstream: RecordingUpstream
) -> None:
    def chunks() -> Iterator[bytes]:
        yield from [b"x" * 1024] * (MAX_BODY_BYTES // 1024 + 1)

    headers = {"content-type": "application/json"}
    with openai_client(gateway) as sdk, pytest.raises(openai.APIStatusError) as of_openai:
        sdk.post("/chat/completions", cast_to=object, content=chunks(), options={"headers": headers})
    _is_openai_refusal(of_openai.value, 413, "body_too_large")
    with anthropic_client(gateway) as claude, pytest.raises(anthropic.ContentTooLargeError) as of_anthropic:
        claude.post("/v1/messages", cast_to=object, content=chunks(), options={"headers": headers})
    _is_anthropic_refusal(of_anthropic.value, 413, "body_too_large", "request_too_large")
    assert upstream.requests == []


@dataclass(frozen=True)
class Failed:
    """What a provider's `answered` status comes to for the client."""

    answered: int
    status: int
    code: str
    openai_error: type[openai.APIStatusError]
    anthropic_error: type[anthropic.APIStatusError]
    kind: str


UNAVAILABLE = (openai.InternalServerError, anthropic.ServiceUnavailableError, "overloaded_error")
FAILURES = [
    Failed(429, 429, "rate_limited", openai.RateLimitError, anthropic.RateLimitError, "rate_limit_error"),
    Failed(401, 502, "provider_auth", openai.InternalServerError, anthropic.InternalServerError, "api_error"),
    Failed(403, 502, "provider_auth", openai.InternalServerError, anthropic.InternalServerError, "api_error"),
    *(Failed(answered, 503, "all_targets_failed", *UNAVAILABLE) for answered in (408, 500, 503, 529)),
]


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: str(case.answered))
def test_a_failing_provider_raises_the_sdks_own_error_names_it_and_shows_no_secret(
    gateway: Gateway, upstream: RecordingUpstream, case: Failed
) -> None:
    headers = (("retry-after", "7"), ("request-id", "req_its_own"), ("www-authenticate", PROVIDER_SECRET))
    upstream.behave(Reply(status=case.answered, body=f'{{"error":"{PROVIDER_SECRET}"}}'.encode(), headers=headers))
    with openai_client(gateway) as sdk, pytest.raises(case.openai_error) as of_openai:
        sdk.chat.completions.create(**CHAT)
    _is_openai_refusal(of_openai.value, case.status, case.code)
    assert "acme" in of_openai.value.message
    with anthropic_client(gateway) as claude, pytest.raises(case.anthropic_error) as of_anthropic:
        claude.messages.create(**MESSAGES)
    _is_anthropic_refusal(of_anthropic.value, case.status, case.code, case.kind)
    assert "claude" in of_anthropic.value.response.text
    for answer in (of_openai.value.response, of_anthropic.value.response):
        assert PROVIDER_SECRET not in answer.text + repr(answer.headers)
        assert answer.headers.get("retry-after") == ("7" if case.answered in (429, 503) else None)


def test_a_provider_that_can_not_be_reached_is_a_server_error_that_names_it(gateway: Gateway) -> None:
    with openai_client(gateway) as sdk, pytest.raises(openai.InternalServerError) as of_openai:
        sdk.chat.completions.create(**{**CHAT, "model": "down"})
    _is_openai_refusal(of_openai.value, 503, "all_targets_failed")
    assert "gone (no answer)" in of_openai.value.message
    with anthropic_client(gateway) as claude, pytest.raises(anthropic.ServiceUnavailableError) as of_anthropic:
        claude.messages.create(**{**MESSAGES, "model": "down"})
    _is_anthropic_refusal(of_anthropic.value, 503, "all_targets_failed", "overloaded_error")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, "BadRequestError"),
        (404, "NotFoundError"),
        (409, "ConflictError"),
        (413, "APIStatusError"),
        (422, "UnprocessableEntityError"),
    ],
)
def test_a_providers_own_refusal_of_the_request_is_passed_on_as_it_is(
    gateway: Gateway, upstream: RecordingUpstream, status: int, error: str
) -> None:
    said = {"error": {"message": "its own words", "type": "its_type", "param": "p", "code": "its_code"}}
    upstream.behave(Reply(status=status, body=compact(said), headers=(("request-id", "req_its_own"),)))
    with openai_client(gateway) as sdk, pytest.raises(getattr(openai, error)) as of_openai:
        sdk.chat.completions.create(**CHAT)
    assert (of_openai.value.code, of_openai.value.param, of_openai.value.type) == ("its_code", "p", "its_type")
    assert json.loads(of_openai.value.response.text) == said
    with anthropic_client(gateway) as claude, pytest.raises(getattr(anthropic, error)) as of_anthropic:
        claude.messages.create(**MESSAGES)
    assert (of_anthropic.value.body, of_anthropic.value.request_id) == (said, "req_its_own")
    assert len(upstream.requests) == 2


def _is_openai_refusal(error: openai.APIStatusError, status: int, code: str, param: str | None = None) -> None:
    assert (error.status_code, error.code, error.param) == (status, code, param)
    assert error.request_id
    assert error.request_id in error.message


def _is_anthropic_refusal(error: anthropic.APIStatusError, status: int, code: str, kind: str) -> None:
    assert error.status_code == status
    assert isinstance(error.body, dict)
    assert (error.body["error"]["type"], error.body["error"]["code"]) == (kind, code)
    assert error.request_id
    assert error.request_id == error.body["request_id"] == error.response.headers["x-request-id"]
