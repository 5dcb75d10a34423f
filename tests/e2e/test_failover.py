"""Failover on the real Envoy: which failures move a request on, what each attempt carries, how targets share requests.

What a client is told when all fail is in test_failures. The surprising thing: the first provider may be killed under
load without one later request noticing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import anthropic
import httpx
import pytest

from tests.e2e.failing import CHAT, FIRST_BYTE_S, IMPATIENT_S, SECOND_SECRET, Lab, failover_lab, served_by
from tests.gateway import KEY, PROVIDER_SECRET
from tests.upstream import Reply

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with failover_lab(tmp_path_factory.mktemp("failover")) as lab:
        yield lab


@pytest.fixture
def lab(started: Lab) -> Lab:
    started.forget()
    return started


# What moves a request on


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529, 408, 429])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_status_is_retried_on_the_next_target(lab: Lab, status: int, stream: bool) -> None:
    lab.first.behave(Reply(status=status))
    assert served_by(lab.chat(lab.fresh(), stream=stream)) == "second"
    assert len(lab.first.requests) == len(lab.second.requests) == 1
    assert lab.first.requests[0].body == lab.second.requests[0].body


@pytest.mark.parametrize("model", ["from-closed", "from-unresolved", "from-distrusted"])
def test_a_provider_that_can_not_be_connected_to_is_passed_over(lab: Lab, model: str) -> None:
    assert served_by(lab.chat(model)) == "light"
    assert not lab.secure.requests


@pytest.mark.parametrize(
    "failure",
    [Reply(reset_before_headers=True), Reply(raw=b""), Reply(raw=b"SSH-2.0-OpenSSH_9.7\r\n")],
    ids=["reset", "closed without an answer", "no HTTP"],
)
def test_a_connection_that_gives_no_answer_is_retried(lab: Lab, failure: Reply) -> None:
    lab.first.behave(failure)
    assert served_by(lab.chat(lab.fresh())) == "second"


@pytest.mark.parametrize(
    ("kind", "limit_s", "second"),
    [
        ("pair", FIRST_BYTE_S, "second"),
        ("impatient-model", IMPATIENT_S, "second"),
        ("impatient-provider", IMPATIENT_S, "light"),
    ],
)
def test_no_headers_within_first_byte_s_is_retried(lab: Lab, kind: str, limit_s: float, second: str) -> None:
    lab.first.behave(Reply(stall_before_headers=True))
    model = kind if kind == "impatient-provider" else lab.fresh(kind)
    began = time.monotonic()
    assert served_by(lab.chat(model, stream=True)) == second
    assert limit_s * 0.95 <= time.monotonic() - began < limit_s + 1.0
    lab.first.wait_for(lambda: lab.first.requests[0].client_left)


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
@pytest.mark.parametrize("single", [False, True])
def test_a_providers_verdict_on_the_request_passes_unchanged(lab: Lab, status: int, single: bool) -> None:
    body = b'{"error": {"message" :"your fault","code":null}}  '
    lab.first.behave(Reply(status=status, body=body, headers=(("content-type", "application/json"),)))
    answer = lab.chat("alone" if single else lab.fresh())
    assert (answer.status_code, answer.content) == (status, body)
    assert answer.headers["x-extproc-provider"].startswith("lonely" if single else "first")
    assert not lab.second.requests


def test_an_endless_failure_is_left_for_the_next_target(lab: Lab) -> None:
    lab.first.behave(Reply(status=500, chunks=(b"x" * 4096,), endless=True))
    assert served_by(lab.chat(lab.fresh(), stream=True)) == "second"
    lab.first.wait_for(lambda: lab.first.requests[0].client_left, 3.0)


# What each attempt carries


def test_each_attempt_has_its_own_credential_host_path_and_headers(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    assert served_by(lab.chat(lab.fresh())) == "second"
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
    client.messages.create(model=lab.fresh("claude"), max_tokens=5, messages=[{"role": "user", "content": "hi"}])
    one, two = lab.first.requests[0], lab.second.requests[0]
    assert (one.path, two.path) == ("/v1/messages", "/tenant/v1/messages")
    assert (one.values("x-api-key"), two.values("x-api-key")) == ([PROVIDER_SECRET], [SECOND_SECRET])
    assert (one.header("authorization"), two.header("authorization")) == (None, None)


def test_the_query_reaches_every_attempt(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    body = {"model": lab.fresh(), "messages": []}
    assert lab.http.post(f"{CHAT}?api-version=2&x=%20y", json=body).status_code == 200
    assert [it.query for it in (lab.first.requests[0], lab.second.requests[0])] == ["api-version=2&x=%20y"] * 2


def test_a_target_is_asked_by_its_own_model_name_and_else_byte_for_byte(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    model = lab.fresh("renamed").encode()
    text = b'"messages":[{"role":"user","content":"\\"model\\": \\"%b\\" 1e400"}], "seed": -0}' % model
    body = b'{"model" : "%b",  ' + text
    answer = lab.http.post(CHAT, content=body % model, headers={"content-type": "application/json"})
    assert served_by(answer) == "second"
    assert answer.headers["x-extproc-model"] == "a-longer-name-at-second"
    assert lab.first.requests[0].body == body % b"name-at-first"
    assert lab.second.requests[0].body == body % b"a-longer-name-at-second"


def test_a_form_is_sent_on_with_the_targets_own_model_name(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    sound = bytes(range(256)) * 2000
    answer = lab.http.post(
        "/v1/audio/transcriptions",
        data={"model": lab.fresh("renamed")},
        files={"file": ("a.wav", sound, "audio/wav")},
    )
    assert served_by(answer) == "second"
    one, two = lab.first.requests[0], lab.second.requests[0]
    assert sound in one.body
    assert one.body.count(b"name-at-first") == 1
    assert two.body == one.body.replace(b"name-at-first", b"a-longer-name-at-second")
    assert two.values("content-length") == [str(len(two.body))]


@pytest.mark.parametrize("kind", ["pair", "renamed"])
@pytest.mark.parametrize("failure", [Reply(status=503), Reply(reset_before_headers=True)], ids=["503", "reset"])
def test_a_large_body_is_whole_at_the_second_attempt(lab: Lab, kind: str, failure: Reply) -> None:
    lab.first.behave(failure)
    text = "".join(f"{number:07x}\n" for number in range(2_000_000 // 8))
    answer = lab.http.post(CHAT, json={"model": lab.fresh(kind), "messages": [{"role": "user", "content": text}]})
    assert served_by(answer) == "second"
    assert lab.second.requests[0].json["messages"][0]["content"] == text


def test_a_private_authority_is_trusted_for_an_address_and_for_a_name(lab: Lab) -> None:
    assert served_by(lab.chat("secure")) == "secure"
    assert served_by(lab.chat("secure-by-name")) == "secure_by_name"
    hosts = [it.header("host") for it in lab.secure.requests]
    assert hosts == [f"127.0.0.1:{lab.secure.port}", f"localhost:{lab.secure.port}"]


# Weights


def test_weights_share_the_first_attempts(lab: Lab) -> None:
    number = 320
    with ThreadPoolExecutor(8) as pool:
        served = list(pool.map(lambda _: served_by(lab.chat("weighted")), range(number)))
    # Binomial, p = 3/4: 4 standard deviations (31) of 240. A right gateway fails once in 15,000 runs.
    assert abs(served.count("heavy") - number * 3 / 4) <= 31
    assert set(served) == {"heavy", "light"}


def test_the_loser_of_the_draw_is_tried_before_a_lower_priority(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    assert {served_by(lab.chat("weighted")) for _ in range(12)} == {"light"}
    lab.second.behave(Reply(status=500))
    assert served_by(lab.chat("weighted")) == "secure"


# Under load


def test_every_request_that_begins_after_the_first_provider_died_succeeds_on_the_second(lab: Lab) -> None:
    threads, died, model = 16, time.monotonic() + 1.0, lab.limited()

    def load(number: int) -> list[tuple[float, int, str]]:
        seen = []
        with httpx.Client(base_url=lab.gateway.url, headers={"authorization": f"Bearer {KEY}"}, timeout=15) as http:
            while (began := time.monotonic()) < died + 1.5:
                answer = http.post(CHAT, json={"model": model, "messages": [], "stream": number % 2 == 0})
                seen.append((began, answer.status_code, answer.headers.get("x-extproc-provider", "")[:6]))
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
    assert any(provider == "first-" for _, _, provider in results)


def test_a_provider_that_came_back_is_tried_first_again(lab: Lab) -> None:
    model = lab.fresh()
    lab.first.stop()
    assert served_by(lab.chat(model)) == "second"
    lab.first.start()
    assert served_by(lab.chat(model)) == "first"
