"""What a client is told when providers fail: one clear answer in its own dialect, whatever the failure looked like.

The surprising thing: an answer the gateway words itself never waits for the provider's error body, which may be huge,
compressed, or have no end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest

from tests.e2e.failing import Lab, failover_lab, served_by
from tests.gateway import KEY, PROVIDER_SECRET
from tests.upstream import Reply

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with failover_lab(tmp_path_factory.mktemp("failures")) as lab:
        yield lab


@pytest.fixture
def lab(started: Lab) -> Lab:
    started.forget()
    return started


def _completion(lab: Lab, model: str, *, stream: bool = False) -> None:
    client = openai.OpenAI(base_url=f"{lab.gateway.url}/v1", api_key=KEY, max_retries=0)
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}], stream=stream)


def _message(lab: Lab, model: str) -> None:
    client = anthropic.Anthropic(base_url=lab.gateway.url, api_key=KEY, max_retries=0)
    client.messages.create(model=model, max_tokens=5, messages=[{"role": "user", "content": "hi"}])


def _is_the_gateways_own(answer: Any) -> bool:
    internal = [name for name in answer.headers if name.startswith(("x-envoy-", "x-extproc-"))]
    return not internal and answer.headers["x-request-id"] in answer.text


@pytest.mark.parametrize("failure", [Reply(status=500), Reply(reset_before_headers=True)], ids=["500", "reset"])
def test_when_all_targets_fail_both_sdks_hear_who(lab: Lab, failure: Reply) -> None:
    lab.first.behave(failure)
    lab.second.behave(failure)
    with pytest.raises(openai.InternalServerError) as told:
        _completion(lab, lab.fresh())
    assert (told.value.status_code, told.value.code) == (503, "all_targets_failed")
    assert "first-" in told.value.message
    assert "second-" in told.value.message
    assert _is_the_gateways_own(told.value.response)
    with pytest.raises(anthropic.InternalServerError) as heard:
        _message(lab, lab.fresh("claude"))
    body: Any = heard.value.body
    assert heard.value.status_code == 503
    assert (body["error"]["code"], body["error"]["type"]) == ("all_targets_failed", "overloaded_error")
    assert "first_anthropic" in body["error"]["message"]
    assert body["request_id"] == heard.value.response.headers["x-request-id"]


def test_when_none_can_be_reached_the_client_hears_who(lab: Lab) -> None:
    answer = lab.chat("none-reachable")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "all_targets_failed"
    for name in ("closed", "unresolved", "distrusted"):
        assert name in answer.json()["error"]["message"]
    assert _is_the_gateways_own(answer)


def test_a_single_target_that_does_not_answer_in_time_is_named(lab: Lab) -> None:
    lab.first.behave(Reply(stall_before_headers=True))
    answer = lab.chat("alone", stream=True)
    assert answer.status_code == 503
    assert "lonely (no answer)" in answer.json()["error"]["message"]
    assert _is_the_gateways_own(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_when_all_are_rate_limited_the_earliest_retry_after_is_told(lab: Lab, stream: bool) -> None:
    lab.first.behave(Reply(status=429, headers=(("retry-after", "30"),)))
    lab.second.behave(Reply(status=429, headers=(("retry-after", "7"),)))
    with pytest.raises(openai.RateLimitError) as told:
        _completion(lab, lab.limited(), stream=stream)
    assert told.value.code == "rate_limited"
    assert told.value.response.headers["retry-after"] == "7"
    assert _is_the_gateways_own(told.value.response)
    with pytest.raises(anthropic.RateLimitError) as heard:
        _message(lab, lab.limited("claude"))
    assert heard.value.response.headers["retry-after"] == "7"


def test_rate_limits_without_a_retry_after_invent_none(lab: Lab) -> None:
    lab.first.behave(Reply(status=429))
    answer = lab.chat("alone")
    assert answer.status_code == 429
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("single", [False, True])
def test_a_refused_credential_of_ours_is_a_502_without_the_body(lab: Lab, status: int, single: bool) -> None:
    body = f'{{"error":"Incorrect API key: {PROVIDER_SECRET}"}}'.encode()
    headers = (("www-authenticate", f"Bearer {PROVIDER_SECRET}"), ("x-detail", PROVIDER_SECRET))
    lab.first.behave(Reply(status=status, body=body, headers=headers))
    answer = lab.chat("alone" if single else lab.fresh())
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "provider_auth"
    assert ("lonely" if single else "first-") in answer.json()["error"]["message"]
    assert PROVIDER_SECRET not in answer.text + str(answer.headers)
    assert not lab.second.requests
    assert _is_the_gateways_own(answer)


BODIES = {
    "huge": Reply.huge(2_000_000),
    "endless": Reply(chunks=(b"x" * 4096,), endless=True),
    "empty": Reply(body=b""),
    "gzip": Reply(body=b'{"error":{"message":"packed"}}' * 50, gzip=True),
    "stalled": Reply(chunks=(b"half",), stall_after=1),
    "html": Reply.html_error(),
}


@pytest.mark.parametrize(
    ("status", "told", "code"),
    [(500, 503, "all_targets_failed"), (429, 429, "rate_limited"), (401, 502, "provider_auth")],
)
@pytest.mark.parametrize("body", BODIES)
def test_the_body_of_a_failure_neither_delays_nor_breaks_the_answer(
    lab: Lab, body: str, status: int, told: int, code: str
) -> None:
    lab.first.behave(replace(BODIES[body], status=status))
    began = time.monotonic()
    answer = lab.chat("alone")
    assert time.monotonic() - began < 1.0
    assert answer.status_code == told
    assert json.loads(answer.content)["error"]["code"] == code
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert "content-encoding" not in answer.headers
    # The client's connection serves on, and the provider is not left writing.
    lab.first.behave_normally()
    assert served_by(lab.chat("alone")) == "lonely"
    lab.first.wait_for(lambda: all(it.finished for it in lab.first.requests), 3.0)
