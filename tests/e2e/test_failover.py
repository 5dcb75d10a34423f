"""Failover on the real Envoy: which failures move a request on, what each attempt carries, and what a client is told.

Two recording upstreams stand behind several providers each. The surprising thing: an answer the gateway words itself
never waits for the provider's error body, which may be huge or have no end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import httpx
import openai
import pytest
import trustme

from tests.gateway import KEY, PROVIDER_SECRET, TEAMS, Gateway, config, free_port
from tests.upstream import Recorded, RecordingUpstream, Reply

pytestmark = pytest.mark.e2e

SECOND_SECRET = "second-secret-77aa"
CHAT = "/v1/chat/completions"
FIRST_BYTE_S = 1.5
IMPATIENT_S = 0.4


class Lab(NamedTuple):
    gateway: Gateway
    first: RecordingUpstream
    second: RecordingUpstream
    secure: RecordingUpstream
    http: httpx.Client


def _providers(first: str, second: str, secure: RecordingUpstream, ca: Path, other_ca: Path) -> dict[str, Any]:
    key, second_key = {"env": "PROVIDER_KEY"}, {"env": "SECOND_KEY"}
    trusted, distrusted = {"file": str(ca)}, {"file": str(other_ca)}
    by_name = f"https://localhost:{secure.port}/v1"
    return {
        "first": {"kind": "openai", "endpoint": f"{first}/v1", "api_key": key, "headers": {"x-first": "1"}},
        "second": {"kind": "openai", "endpoint": f"{second}/prefix/v1", "api_key": second_key},
        "first_anthropic": {"kind": "anthropic", "endpoint": first, "api_key": key},
        "second_anthropic": {"kind": "anthropic", "endpoint": f"{second}/tenant", "api_key": second_key},
        "impatient": {"kind": "openai", "endpoint": f"{first}/v1", "timeouts": {"first_byte_s": IMPATIENT_S}},
        "closed": {"kind": "openai", "endpoint": f"http://127.0.0.1:{free_port()}/v1"},
        "unresolved": {"kind": "openai", "endpoint": "http://no-such-host.invalid/v1"},
        "secure": {"kind": "openai", "endpoint": f"{secure.url}/v1", "ca": trusted},
        "secure_by_name": {"kind": "openai", "endpoint": by_name, "ca": trusted},
        "distrusted": {"kind": "openai", "endpoint": f"{secure.url}/v1", "ca": distrusted},
    }


def _chain(*providers: str, **more: Any) -> dict[str, Any]:
    targets = [{"provider": name, "priority": number} for number, name in enumerate(providers)]
    return {"targets": targets, **more}


def _models() -> dict[str, Any]:
    equal = {"priority": 0, "weight": 1}
    return {
        "pair": _chain("first", "second"),
        "claude": _chain("first_anthropic", "second_anthropic"),
        "alone": _chain("first"),
        "alone-claude": _chain("first_anthropic"),
        "impatient-provider": _chain("impatient", "second"),
        "impatient-model": _chain("first", "second", timeouts={"first_byte_s": IMPATIENT_S}),
        "from-closed": _chain("closed", "second"),
        "from-unresolved": _chain("unresolved", "second"),
        "secure": _chain("secure"),
        "secure-by-name": _chain("secure_by_name"),
        "from-distrusted": _chain("distrusted", "second"),
        "none-reachable": _chain("closed", "unresolved", "distrusted"),
        "renamed": {
            "targets": [
                {"provider": "first", "model": "name-at-first", "priority": 0},
                {"provider": "second", "model": "a-longer-name-at-second", "priority": 1},
            ]
        },
        "weighted": {
            "targets": [
                {"provider": "first", "weight": 3},
                {"provider": "second", "weight": 1},
                {"provider": "secure", "priority": 1},
            ]
        },
        "even": {"targets": [{"provider": "first", **equal}, {"provider": "second", **equal}]},
    }


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("failover")
    other_ca = folder / "other-ca.pem"
    trustme.CA().cert_pem.write_to_path(str(other_ca))
    with RecordingUpstream() as first, RecordingUpstream() as second, RecordingUpstream(tls=True) as secure:
        sections = config(
            providers=_providers(first.url, second.url, secure, secure.write_ca(folder), other_ca),
            models=_models(),
            teams={"search": TEAMS["search"]},
            timeouts={"first_byte_s": FIRST_BYTE_S, "stream_idle_s": 20},
        )
        with (
            Gateway(folder, sections, {"SECOND_KEY": SECOND_SECRET}) as gateway,
            httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {KEY}"}, timeout=15) as http,
        ):
            yield Lab(gateway, first, second, secure, http)


@pytest.fixture
def lab(started: Lab) -> Lab:
    for upstream in (started.first, started.second, started.secure):
        upstream.behave_normally()
        upstream.clear()
    return started


def chat(lab: Lab, model: str, **more: Any) -> httpx.Response:
    return lab.http.post(CHAT, json={"model": model, "messages": [{"role": "user", "content": "hi"}], **more})


def served_by(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    assert not [name for name in answer.headers if name.startswith("x-envoy-")]
    assert answer.headers["x-request-id"]
    assert answer.headers["x-extproc-model"]
    return answer.headers["x-extproc-provider"]


# What moves a request on


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529, 408, 429])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_status_is_retried_on_the_next_target(lab: Lab, status: int, stream: bool) -> None:
    lab.first.behave(Reply(status=status))
    answer = chat(lab, "pair", stream=stream)
    assert served_by(answer) == "second"
    assert len(lab.first.requests) == len(lab.second.requests) == 1
    assert lab.first.requests[0].body == lab.second.requests[0].body


@pytest.mark.parametrize("model", ["from-closed", "from-unresolved", "from-distrusted"])
def test_a_provider_that_can_not_be_connected_to_is_passed_over(lab: Lab, model: str) -> None:
    assert served_by(chat(lab, model)) == "second"
    assert not lab.secure.requests


def test_a_connection_reset_before_the_headers_is_retried(lab: Lab) -> None:
    lab.first.behave(Reply(reset_before_headers=True))
    assert served_by(chat(lab, "pair")) == "second"


def test_a_connection_closed_without_an_answer_is_retried(lab: Lab) -> None:
    lab.first.behave(Reply(raw=b""))
    assert served_by(chat(lab, "pair")) == "second"


def test_what_is_no_http_is_retried(lab: Lab) -> None:
    lab.first.behave(Reply(raw=b"SSH-2.0-OpenSSH_9.7\r\n"))
    assert served_by(chat(lab, "pair")) == "second"


@pytest.mark.parametrize(
    ("model", "limit_s"),
    [("pair", FIRST_BYTE_S), ("impatient-provider", IMPATIENT_S), ("impatient-model", IMPATIENT_S)],
)
def test_no_headers_within_first_byte_s_is_retried(lab: Lab, model: str, limit_s: float) -> None:
    lab.first.behave(Reply(stall_before_headers=True))
    began = time.monotonic()
    assert served_by(chat(lab, model, stream=True)) == "second"
    assert limit_s <= time.monotonic() - began < limit_s + 1.0
    lab.first.wait_for(lambda: lab.first.requests[0].client_left)


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
@pytest.mark.parametrize("model", ["pair", "alone"])
def test_a_providers_verdict_on_the_request_passes_unchanged(lab: Lab, status: int, model: str) -> None:
    body = b'{"error": {"message" :"your fault","code":null}}  '
    lab.first.behave(Reply(status=status, body=body, headers=(("content-type", "application/json"),)))
    answer = chat(lab, model)
    assert (answer.status_code, answer.content) == (status, body)
    assert answer.headers["x-extproc-provider"] == "first"
    assert not lab.second.requests


# What each attempt carries


def test_each_attempt_has_its_own_credential_host_path_and_headers(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    assert served_by(chat(lab, "pair")) == "second"
    one, two = lab.first.requests[0], lab.second.requests[0]
    assert (one.path, two.path) == (CHAT, f"/prefix{CHAT}")
    assert one.values("authorization") == [f"Bearer {PROVIDER_SECRET}"]
    assert two.values("authorization") == [f"Bearer {SECOND_SECRET}"]
    assert one.values("host") == [f"127.0.0.1:{lab.first.port}"]
    assert two.values("host") == [f"127.0.0.1:{lab.second.port}"]
    assert (one.values("x-first"), two.values("x-first")) == (["1"], [])


def test_each_anthropic_attempt_has_its_own_key_and_base_path(lab: Lab) -> None:
    lab.first.behave(Reply(status=529))
    client = anthropic.Anthropic(base_url=lab.gateway.url, api_key=KEY, max_retries=0)
    client.messages.create(model="claude", max_tokens=5, messages=[{"role": "user", "content": "hi"}])
    one, two = lab.first.requests[0], lab.second.requests[0]
    assert (one.path, two.path) == ("/v1/messages", "/tenant/v1/messages")
    assert (one.values("x-api-key"), two.values("x-api-key")) == ([PROVIDER_SECRET], [SECOND_SECRET])
    assert one.header("authorization") is two.header("authorization") is None


def test_the_query_reaches_every_attempt(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    body = {"model": "pair", "messages": []}
    assert lab.http.post(f"{CHAT}?api-version=2&x=%20y", json=body).status_code == 200
    assert [it.query for it in (lab.first.requests[0], lab.second.requests[0])] == ["api-version=2&x=%20y"] * 2


def test_a_target_is_asked_by_its_own_model_name(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    body = b'{"model" : "renamed",  "messages":[{"role":"user","content":"\\"model\\": \\"renamed\\" 1e400"}], "seed": -0}'
    answer = lab.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert served_by(answer) == "second"
    assert answer.headers["x-extproc-model"] == "a-longer-name-at-second"
    assert lab.first.requests[0].body == body.replace(b'"renamed"', b'"name-at-first"', 1)
    assert lab.second.requests[0].body == body.replace(b'"renamed"', b'"a-longer-name-at-second"', 1)


def test_a_form_is_sent_on_with_the_targets_own_model_name(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    sound = bytes(range(256)) * 2000
    answer = lab.http.post(
        "/v1/audio/transcriptions", data={"model": "renamed"}, files={"file": ("a.wav", sound, "audio/wav")}
    )
    assert served_by(answer) == "second"
    one, two = lab.first.requests[0], lab.second.requests[0]
    assert sound in one.body
    assert one.body.count(b"name-at-first") == 1
    assert two.body == one.body.replace(b"name-at-first", b"a-longer-name-at-second")
    assert two.values("content-length") == [str(len(two.body))]


@pytest.mark.parametrize("model", ["pair", "renamed"])
@pytest.mark.parametrize("failure", [Reply(status=503), Reply(reset_before_headers=True)], ids=["503", "reset"])
def test_a_large_body_is_whole_at_the_second_attempt(lab: Lab, model: str, failure: Reply) -> None:
    lab.first.behave(failure)
    text = "".join(f"{number:07x}\n" for number in range(2_000_000 // 8))
    answer = lab.http.post(CHAT, json={"model": model, "messages": [{"role": "user", "content": text}]})
    assert served_by(answer) == "second"
    assert lab.second.requests[0].json["messages"][0]["content"] == text


def test_a_private_authority_is_trusted_for_an_address_and_for_a_name(lab: Lab) -> None:
    assert served_by(chat(lab, "secure")) == "secure"
    assert served_by(chat(lab, "secure-by-name")) == "secure_by_name"
    hosts = [it.header("host") for it in lab.secure.requests]
    assert hosts == [f"127.0.0.1:{lab.secure.port}", f"localhost:{lab.secure.port}"]


# Weights


def test_weights_share_the_first_attempts(lab: Lab) -> None:
    number = 320
    with ThreadPoolExecutor(8) as pool:
        served = list(pool.map(lambda _: served_by(chat(lab, "weighted")), range(number)))
    # Binomial, p = 3/4: 4 standard deviations (31) of 240. A right gateway fails once in 15,000 runs.
    assert abs(served.count("first") - number * 3 / 4) <= 31
    assert set(served) == {"first", "second"}


def test_the_loser_of_the_draw_is_tried_before_a_lower_priority(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    assert {served_by(chat(lab, "weighted")) for _ in range(12)} == {"second"}
    lab.second.behave(Reply(status=500))
    assert served_by(chat(lab, "weighted")) == "secure"


# What the client is told


@pytest.mark.parametrize("failure", [Reply(status=500), Reply(reset_before_headers=True)], ids=["500", "reset"])
def test_when_all_targets_fail_both_sdks_hear_who(lab: Lab, failure: Reply) -> None:
    lab.first.behave(failure)
    lab.second.behave(failure)
    with pytest.raises(openai.InternalServerError) as told:
        _openai(lab).chat.completions.create(model="pair", messages=[{"role": "user", "content": "hi"}])
    assert (told.value.status_code, told.value.code) == (503, "all_targets_failed")
    assert "first" in told.value.message
    assert "second" in told.value.message
    with pytest.raises(anthropic.InternalServerError) as heard:
        _message(lab, "claude")
    body: Any = heard.value.body
    assert heard.value.status_code == 503
    assert (body["error"]["code"], body["error"]["type"]) == ("all_targets_failed", "overloaded_error")
    assert "first_anthropic" in body["error"]["message"]
    assert body["request_id"] == heard.value.response.headers["x-request-id"]


def test_when_none_can_be_reached_the_client_hears_who(lab: Lab) -> None:
    answer = chat(lab, "none-reachable")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "all_targets_failed"
    for name in ("closed", "unresolved", "distrusted"):
        assert name in answer.json()["error"]["message"]
    assert not [name for name in answer.headers if name.startswith("x-envoy-")]


@pytest.mark.parametrize("stream", [False, True])
def test_when_all_are_rate_limited_the_earliest_retry_after_is_told(lab: Lab, stream: bool) -> None:
    lab.first.behave(Reply(status=429, headers=(("retry-after", "30"),)))
    lab.second.behave(Reply(status=429, headers=(("retry-after", "7"),)))
    with pytest.raises(openai.RateLimitError) as told:
        _openai(lab).chat.completions.create(model="pair", messages=[{"role": "user", "content": "hi"}], stream=stream)
    assert told.value.code == "rate_limited"
    assert told.value.response.headers["retry-after"] == "7"
    with pytest.raises(anthropic.RateLimitError) as heard:
        _message(lab, "claude")
    assert heard.value.response.headers["retry-after"] == "7"


def test_rate_limits_without_a_retry_after_invent_none(lab: Lab) -> None:
    lab.first.behave(Reply(status=429))
    answer = chat(lab, "alone")
    assert answer.status_code == 429
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("model", ["pair", "alone"])
def test_a_refused_credential_of_ours_is_a_502_without_the_body(lab: Lab, status: int, model: str) -> None:
    body = f'{{"error":"Incorrect API key: {PROVIDER_SECRET}"}}'.encode()
    headers = (("www-authenticate", f"Bearer {PROVIDER_SECRET}"), ("x-detail", PROVIDER_SECRET))
    lab.first.behave(Reply(status=status, body=body, headers=headers))
    answer = chat(lab, model)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "provider_auth"
    assert "first" in answer.json()["error"]["message"]
    assert PROVIDER_SECRET not in answer.text + str(answer.headers)
    assert not lab.second.requests


@pytest.mark.parametrize("status", [500, 429, 401])
@pytest.mark.parametrize(
    "body",
    [
        Reply.huge(2_000_000),
        Reply(chunks=(b"x" * 4096,), endless=True),
        Reply(body=b""),
        Reply(body=b'{"error":{"message":"packed"}}' * 50, gzip=True),
        Reply(chunks=(b"half",), stall_after=1),
        Reply.html_error(),
    ],
    ids=["huge", "endless", "empty", "gzip", "stalled", "html"],
)
def test_the_body_of_a_failure_neither_delays_nor_breaks_the_answer(lab: Lab, status: int, body: Reply) -> None:
    lab.first.behave(_with_status(body, status))
    began = time.monotonic()
    answer = chat(lab, "alone")
    assert time.monotonic() - began < 1.0
    assert answer.status_code == {500: 503, 429: 429, 401: 502}[status]
    document = json.loads(answer.content)
    assert document["error"]["code"] == {500: "all_targets_failed", 429: "rate_limited", 401: "provider_auth"}[status]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert "content-encoding" not in answer.headers
    # The same connection serves on, and the failed one is left alone.
    lab.first.behave_normally()
    assert served_by(chat(lab, "alone")) == "first"
    lab.first.wait_for(lambda: all(it.finished for it in lab.first.requests), 3.0)


def test_an_endless_failure_is_left_for_the_next_target(lab: Lab) -> None:
    lab.first.behave(Reply(status=500, chunks=(b"x" * 4096,), endless=True))
    assert served_by(chat(lab, "pair", stream=True)) == "second"
    lab.first.wait_for(lambda: lab.first.requests[0].client_left, 3.0)


def _with_status(reply: Reply, status: int) -> Reply:
    from dataclasses import replace

    return replace(reply, status=status)


def _openai(lab: Lab) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{lab.gateway.url}/v1", api_key=KEY, max_retries=0)


def _message(lab: Lab, model: str) -> None:
    client = anthropic.Anthropic(base_url=lab.gateway.url, api_key=KEY, max_retries=0)
    client.messages.create(model=model, max_tokens=5, messages=[{"role": "user", "content": "hi"}])


# Under load


def test_every_request_that_begins_after_the_first_provider_died_succeeds_on_the_second(lab: Lab) -> None:
    threads, died = 16, time.monotonic() + 1.0

    def load(number: int) -> list[tuple[float, int, str]]:
        seen = []
        with httpx.Client(base_url=lab.gateway.url, headers={"authorization": f"Bearer {KEY}"}, timeout=15) as http:
            while (began := time.monotonic()) < died + 1.5:
                body = {"model": "pair", "messages": [], "stream": number % 2 == 0}
                answer = http.post(CHAT, json=body)
                seen.append((began, answer.status_code, answer.headers.get("x-extproc-provider", "")))
        return seen

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(load, number) for number in range(threads)]
        time.sleep(max(0.0, died - time.monotonic()))
        lab.first.stop()
        stopped = time.monotonic()
        results = [seen for future in running for seen in future.result()]
    lab.first.start()
    after = [(status, provider) for began, status, provider in results if began > stopped]
    assert len(after) > threads
    assert set(after) == {(200, "second")}
    assert any(provider == "first" for _, _, provider in results)


def test_a_provider_that_came_back_is_tried_first_again(lab: Lab) -> None:
    lab.first.stop()
    assert served_by(chat(lab, "pair")) == "second"
    lab.first.start()
    assert served_by(chat(lab, "pair")) == "first"
