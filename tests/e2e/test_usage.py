"""One request, one row: what the ledger says of each kind of answer, ending and refusal, through the real Envoy.

The surprising thing: usage is exact wherever the provider told it, even to a client that hung up at the last event;
only what nobody told is estimated, and then says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import anthropic
import httpx
import openai
import pytest

from tests.gateway import KEY, NARROW_KEY, TEAMS, Gateway, config, digest
from tests.upstream import RecordingUpstream, Reply, Usage, sse
from tests.upstream_answers import anthropic_usage, default_answer

pytestmark = pytest.mark.e2e

SPENT = Usage(5000, 400, cached_tokens=2000, cache_write_tokens=1000, reasoning_tokens=300)
COLUMNS = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "priced", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "priced", "prompt": "hi"},
    "/v1/responses": {"model": "priced", "input": "hi"},
    "/v1/embeddings": {"model": "priced", "input": "hi"},
    "/v1/messages": {"model": "claude", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
}
TOLD = {
    "/v1/chat/completions": (5000, 400, 2000, 0, 300),
    "/v1/completions": (5000, 400, 2000, 0, 300),
    "/v1/responses": (5000, 400, 2000, 1000, 300),
    "/v1/embeddings": (5000, 0, 0, 0, 0),
    "/v1/messages": (5000, 400, 2000, 1000, 0),
}
PRICES = {
    "first/served-*": {"input": 2.5, "output": 10, "cached_input": 0.25, "cache_write": 5},
    "anthropic/*": {"input": 3, "output": 15, "cached_input": 0.3, "cache_write": 3.75},
}


PAIRS = ("errs", "resets", "stalls", "errs-too")
"""Models, and their first providers: one for each way to fail, because a provider that keeps failing is tried last."""


def _pair(provider: str) -> dict[str, Any]:
    second = {"provider": "second", "model": "other", "priority": 1}
    return {"targets": [{"provider": provider, "model": "served-1"}, second]}


class HasHeaders(Protocol):
    """An answer of any client: the SDKs bring an HTTP library of their own."""

    @property
    def headers(self) -> Mapping[str, str]: ...


class Lab(NamedTuple):
    gateway: Gateway
    first: RecordingUpstream
    second: RecordingUpstream
    http: httpx.Client


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with RecordingUpstream(usage=SPENT) as first, RecordingUpstream(usage=SPENT) as second:
        sections = config(
            providers={
                "first": {"kind": "openai", "endpoint": f"{first.url}/v1"},
                "second": {"kind": "openai", "endpoint": f"{second.url}/v1"},
                "anthropic": {"kind": "anthropic", "endpoint": first.url},
                **{name: {"kind": "openai", "endpoint": f"{first.url}/v1"} for name in PAIRS},
            },
            models={
                "priced": {"targets": [{"provider": "first", "model": "served-1"}]},
                "narrow": {"targets": [{"provider": "second"}]},
                "demo": {"targets": [{"provider": "second"}]},
                "claude": {"targets": [{"provider": "anthropic", "model": "claude-sonnet-4-5"}]},
                **{name: _pair(name) for name in PAIRS},
            },
            prices=PRICES,
            teams={
                **TEAMS,
                "stored": {
                    "models": ["*"],
                    "default_provider": "first",
                    "keys": [{"id": "st", "sha256": digest("st")}],
                },
            },
            timeouts={"first_byte_s": 2, "stream_idle_s": 3},
            listen={"max_body_bytes": 100_000},
        )
        with (
            Gateway(tmp_path_factory.mktemp("usage"), sections) as gateway,
            httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {KEY}"}, timeout=15) as http,
        ):
            yield Lab(gateway, first, second, http)


@pytest.fixture
def lab(started: Lab) -> Lab:
    for upstream in (started.first, started.second):
        upstream.behave_normally()
        upstream.clear()
    return started


def row_of(lab: Lab, answer: HasHeaders) -> dict[str, Any]:
    return lab.gateway.wait_for_rows(1, f"request_id = '{answer.headers['x-request-id']}'")[0]


def post(lab: Lab, path: str = "/v1/chat/completions", **more: Any) -> dict[str, Any]:
    """The row of one request that was read to its end."""
    return row_of(lab, lab.http.post(path, json={**BODIES[path], **more}))


def used(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in COLUMNS)


STREAMS = [path for path in BODIES if path != "/v1/embeddings"]


@pytest.mark.parametrize(("path", "stream"), [(path, False) for path in BODIES] + [(path, True) for path in STREAMS])
def test_usage_is_exact_and_apart(lab: Lab, path: str, stream: bool) -> None:
    row = post(lab, path, **({"stream": True} if stream else {}))
    assert used(row) == TOLD[path]
    assert (row["outcome"], row["estimated"], row["status"], row["stream"]) == ("ok", 0, 200, int(stream))


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_whose_usage_the_client_asked_for_is_as_exact(lab: Lab, path: str) -> None:
    options = {"stream_options": {"include_usage": True}} if "completions" in path else {}
    row = post(lab, path, stream=True, **options)
    assert (used(row), row["estimated"]) == (TOLD[path], 0)


@pytest.mark.parametrize(
    "charset", ["application/json", "application/json;charset=UTF-8", "Application/JSON ; charset=utf-8"]
)
@pytest.mark.parametrize("path", BODIES)
def test_usage_is_read_whatever_the_charset(lab: Lab, path: str, charset: str) -> None:
    lab.first.behave(Reply(headers=(("content-type", charset),)))
    assert used(post(lab, path)) == TOLD[path]


def test_cost_is_the_priced_sum_to_the_nano_usd(lab: Lab) -> None:
    row = post(lab, "/v1/responses")
    # 2,000 fresh at 2.5, 2,000 cached at 0.25, 1,000 written at 5, 400 out at 10 USD per million.
    assert (row["cost_nusd"], row["price_source"]) == (5_000_000 + 500_000 + 5_000_000 + 4_000_000, "override")
    row = post(lab, "/v1/messages", stream=True)
    assert row["cost_nusd"] == 6_000_000 + 600_000 + 3_750_000 + 6_000_000


def test_a_model_without_a_price_is_reported_and_not_free(lab: Lab) -> None:
    row = post(lab, model="demo")
    assert (row["price_source"], row["cost_nusd"], row["input_tokens"]) == ("unpriced", None, 5000)


def test_the_row_tells_who_asked_for_what(lab: Lab) -> None:
    lab.first.model = "served-1-2026-01-01"
    try:
        row = post(lab)
    finally:
        lab.first.model = None
    told: dict[str, Any] = {
        "team": "search",
        "project": "indexer",
        "user_id": "ada",
        "agent": "bot",
        "key_id": "search-all",
    }
    told |= {"dialect": "openai", "endpoint": "chat", "alias": "priced", "provider": "first"}
    told |= {"model_asked": "served-1", "model_returned": "served-1-2026-01-01", "attempts": 1, "tried": "first:200"}
    assert {name: row[name] for name in told} == told
    assert row["code"] is None
    assert row["response_bytes"] > row["request_bytes"] > 50


def test_times_are_those_of_the_answer(lab: Lab) -> None:
    lab.first.behave(Reply(before_headers_s=0.3, chunk_delay_s=0.05))
    began = time.monotonic()
    row = post(lab, stream=True)
    lasted_s = time.monotonic() - began
    assert 0.3 <= row["first_byte_s"] < row["duration_s"] <= lasted_s
    assert row["duration_s"] > 0.7


# Hanging up, leaving, breaking


def test_an_sdk_that_hangs_up_at_done_is_charged_exactly(lab: Lab) -> None:
    # What comes behind [DONE] is never read: the SDK closes the connection there.
    chunks = (*_chunks("/v1/chat/completions"), *[b": tail\n\n"] * 50)
    lab.first.behave(Reply(chunks=chunks, chunk_delay_s=0.02))
    client = openai.OpenAI(base_url=f"{lab.gateway.url}/v1", api_key=KEY, max_retries=0)
    messages: Any = BODIES["/v1/chat/completions"]["messages"]
    with client.chat.completions.create(model="priced", messages=messages, stream=True) as stream:
        assert all(chunk.choices for chunk in stream)
    row = row_of(lab, stream.response)
    assert lab.first.requests[0].client_left
    assert (used(row), row["outcome"], row["estimated"]) == (TOLD["/v1/chat/completions"], "ok", 0)


def test_the_anthropic_sdk_is_charged_exactly(lab: Lab) -> None:
    client = anthropic.Anthropic(base_url=lab.gateway.url, api_key=KEY, max_retries=0)
    messages: Any = BODIES["/v1/messages"]["messages"]
    with client.messages.stream(model="claude", max_tokens=9, messages=messages) as stream:
        assert stream.get_final_message().usage.output_tokens == 400
    row = row_of(lab, stream.response)
    assert (used(row), row["outcome"], row["estimated"]) == (TOLD["/v1/messages"], "ok", 0)


def _chunks(path: str) -> tuple[bytes, ...]:
    asked = {**BODIES[path], "stream": True, "stream_options": {"include_usage": True}}
    return default_answer("POST", path, "", json.dumps(asked).encode(), usage=SPENT, model="served-1").chunks


def leave_after(lab: Lab, path: str, events: int) -> dict[str, Any]:
    """The row of a client that leaves once it has so many events."""
    body, heard = {**BODIES[path], "stream": True}, b""
    with lab.http.stream("POST", path, json=body) as answer:
        received = answer.iter_raw()
        while heard.count(b"\n\n") < events:
            heard += next(received)
    return row_of(lab, answer)


@pytest.mark.parametrize("path", STREAMS)
def test_a_client_that_leaves_early_is_charged_by_estimate(lab: Lab, path: str) -> None:
    lab.first.behave(Reply(chunks=_chunks(path), stall_after=6))
    row = leave_after(lab, path, 3)
    assert (row["outcome"], row["estimated"], row["status"]) == ("client_left", 1, 200)
    assert min(row["input_tokens"], row["output_tokens"]) > 0


def test_what_was_told_before_the_client_left_is_kept(lab: Lab) -> None:
    lab.first.behave(Reply(chunks=_chunks("/v1/messages"), stall_after=6))
    row = leave_after(lab, "/v1/messages", 3)
    assert (row["input_tokens"], row["cached_tokens"], row["cache_write_tokens"]) == (5000, 2000, 1000)
    assert (row["model_returned"], row["estimated"]) == ("served-1", 1)


def test_usage_in_every_chunk_does_not_make_a_part_the_whole(lab: Lab) -> None:
    spoken = {"choices": [{"index": 0, "delta": {"content": "word"}}]}
    counted = [{**spoken, "usage": {"prompt_tokens": 30, "completion_tokens": number}} for number in range(1, 9)]
    lab.first.behave(Reply(chunks=tuple(sse(json.dumps(chunk)) for chunk in counted), stall_after=8))
    row = leave_after(lab, "/v1/chat/completions", 8)
    assert (row["outcome"], row["estimated"], row["input_tokens"]) == ("client_left", 1, 30)
    assert row["output_tokens"] >= 8


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_that_breaks_is_charged_by_estimate(lab: Lab, path: str) -> None:
    lab.first.behave(Reply(chunks=_chunks(path), reset_after=6, chunk_delay_s=0.01))
    body = {**BODIES[path], "stream": True}
    with lab.http.stream("POST", path, json=body) as answer, pytest.raises(httpx.RemoteProtocolError):
        answer.read()
    row = row_of(lab, answer)
    assert (row["outcome"], row["estimated"], row["output_tokens"] > 0) == ("broken", 1, True)


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_that_breaks_behind_its_last_word_is_charged_exactly(lab: Lab, path: str) -> None:
    chunks = _chunks(path)
    lab.first.behave(Reply(chunks=(*chunks, b": x\n\n"), reset_after=len(chunks), chunk_delay_s=0.01))
    body = {**BODIES[path], "stream": True}
    with lab.http.stream("POST", path, json=body) as answer, pytest.raises(httpx.RemoteProtocolError):
        answer.read()
    row = row_of(lab, answer)
    assert (used(row), row["outcome"], row["estimated"]) == (TOLD[path], "broken", 0)


def test_a_provider_that_tells_no_usage_is_charged_by_estimate(lab: Lab) -> None:
    lab.first.behave(Reply(body=b'{"choices":[{"message":{"content":"some words"}}]}'))
    row = post(lab)
    assert (row["outcome"], row["estimated"], row["price_source"]) == ("ok", 1, "override")
    assert min(row["input_tokens"], row["output_tokens"], row["cost_nusd"]) > 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_compressed_answer_is_never_free(lab: Lab, stream: bool) -> None:
    lab.first.behave(Reply(gzip=True))
    answer = lab.http.post("/v1/chat/completions", json={**BODIES["/v1/chat/completions"], "stream": stream})
    assert answer.status_code == 200
    assert b"recording" in answer.content  # httpx has unpacked it
    assert lab.first.requests[0].values("accept-encoding") == []
    row = row_of(lab, answer)
    assert (row["outcome"], row["cost_nusd"] > 0) == ("ok", True)
    assert row["estimated"] == 1 or used(row) == TOLD["/v1/chat/completions"]


def test_usage_that_the_last_event_tells_anew_replaces_the_first(lab: Lab) -> None:
    _, *middle, _, stop = _chunks("/v1/messages")
    final = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": anthropic_usage(SPENT)}
    begun = {
        "type": "message_start",
        "message": {"model": "served-1", "usage": {"input_tokens": 0, "output_tokens": 0}},
    }
    chunks = (
        sse(json.dumps(begun), event="message_start"),
        *middle,
        sse(json.dumps(final), event="message_delta"),
        stop,
    )
    lab.first.behave(Reply(chunks=chunks))
    row = post(lab, "/v1/messages", stream=True)
    assert (used(row), row["estimated"]) == (TOLD["/v1/messages"], 0)


# What costs nothing


def test_what_a_provider_does_not_charge_is_not_charged(lab: Lab) -> None:
    stored = {"authorization": "Bearer st"}
    messages = {"model": "claude", "messages": [{"role": "user", "content": "hi"}]}
    answers = [
        lab.http.get("/v1/responses/resp_1", headers=stored),
        lab.http.get("/v1/responses/resp_1?stream=true", headers=stored),
        lab.http.delete("/v1/responses/resp_1", headers=stored),
        lab.http.post("/v1/messages/count_tokens", json=messages),
        lab.http.post("/v1/responses/input_tokens", json={"model": "priced", "input": "hi"}),
        lab.http.get("/v1/models"),
    ]
    for answer in answers:
        assert answer.status_code == 200
        row = row_of(lab, answer)
        assert (used(row), row["cost_nusd"], row["estimated"]) == ((None,) * 5, None, 0)
        assert row["outcome"] == "ok"


# Several attempts, refusals, failures


@pytest.mark.parametrize(
    ("model", "failure", "status"),
    [
        ("errs", Reply(status=500), "500"),
        ("resets", Reply(reset_before_headers=True), "none"),
        ("stalls", Reply(stall_before_headers=True), "none"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_first_attempt_leaves_no_mark_but_its_name(
    lab: Lab, model: str, failure: Reply, status: str, stream: bool
) -> None:
    lab.first.behave(failure)
    row = post(lab, model=model, stream=stream)
    assert (row["attempts"], row["tried"], row["code"]) == (2, f"{model}:{status},second:200", None)
    assert (row["provider"], row["model_asked"], row["status"]) == ("second", "other", 200)
    assert (row["outcome"], row["estimated"], used(row)) == ("ok", 0, TOLD["/v1/chat/completions"])


def test_when_all_fail_the_row_says_so_and_charges_nothing(lab: Lab) -> None:
    lab.first.behave(Reply(status=500))
    lab.second.behave(Reply(status=429))
    row = post(lab, model="errs-too", stream=True)
    assert (row["outcome"], row["code"], row["status"]) == ("failed", "all_targets_failed", 503)
    assert (row["tried"], row["attempts"], used(row), row["cost_nusd"]) == (
        "errs-too:500,second:429",
        2,
        (None,) * 5,
        None,
    )


@pytest.mark.parametrize(("status", "code"), [(400, None), (404, None), (401, "provider_auth"), (429, "rate_limited")])
def test_a_providers_refusal_is_failed_and_free(lab: Lab, status: int, code: str | None) -> None:
    lab.first.behave(Reply(status=status))
    row = post(lab)
    assert (row["outcome"], row["code"], row["tried"]) == ("failed", code, f"first:{status}")
    assert (row["cost_nusd"], row["estimated"]) == (None, 0)


@pytest.mark.parametrize(
    ("key", "body", "status", "expected"),
    [
        ("wrong", BODIES["/v1/chat/completions"], 401, ("invalid_api_key", None)),
        (NARROW_KEY, BODIES["/v1/chat/completions"], 403, ("model_not_allowed", "narrow")),
        (KEY, {"model": "none", "messages": []}, 404, ("model_not_found", "search")),
        (KEY, {"model": 7, "messages": []}, 400, ("invalid_type", "search")),
        (KEY, {"model": "priced", "messages": ["x" * 200_000]}, 413, ("body_too_large", "search")),
    ],
)
def test_a_refusal_has_a_code_and_no_provider(
    lab: Lab, key: str, body: dict[str, Any], status: int, expected: tuple[str, str | None]
) -> None:
    answer = lab.http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == status
    row = row_of(lab, answer)
    assert (row["outcome"], row["status"], row["code"], row["team"]) == ("refused", status, *expected)
    assert (row["provider"], row["tried"], row["attempts"], row["cost_nusd"]) == (None, None, 0, None)
    assert not lab.first.requests
