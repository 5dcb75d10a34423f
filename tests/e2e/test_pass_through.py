"""Every other OpenAI endpoint: routed by model where the body names one, else to the team's default provider.

The surprising thing: what names no model needs a key that may use every model. A batch file can name any.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.gateway import KEY, NARROW_KEY, PROVIDER_SECRET, Gateway, config, digest
from tests.upstream import Recorded, RecordingUpstream, Reply
from tests.upstream_answers import TEXT, compact

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("error")]

ORPHAN_KEY = "sk-test-no-default-provider"
CLAUDE_KEY = "sk-test-default-speaks-anthropic"
BINARY = bytes(range(256)) * 40
PNG = ("a.png", b"\x89PNG\r\n\x1a\n" + BINARY, "image/png")


@pytest.fixture(scope="module")
def upstream() -> Iterator[RecordingUpstream]:
    with RecordingUpstream() as recording:
        yield recording


@pytest.fixture(scope="module")
def gateway(upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    secret = {"env": "PROVIDER_KEY"}
    sections = config(
        providers={
            "acme": {"kind": "openai", "endpoint": f"{upstream.url}/v1", "api_key": secret},
            "other": {"kind": "openai", "endpoint": f"{upstream.url}/other/v1", "api_key": secret},
            "claude": {"kind": "anthropic", "endpoint": upstream.url, "api_key": secret},
        },
        models={
            "gpt-test": {"targets": [{"provider": "acme"}]},
            "alias": {"targets": [{"provider": "other", "model": "real-model"}]},
            "narrow": {"targets": [{"provider": "acme"}]},
        },
        teams={
            "all": {"models": ["*"], "default_provider": "acme", "keys": [{"id": "all", "sha256": digest(KEY)}]},
            "narrow": {
                "models": ["narrow"],
                "default_provider": "acme",
                "keys": [{"id": "narrow", "sha256": digest(NARROW_KEY)}],
            },
            "orphan": {"models": ["*"], "keys": [{"id": "orphan", "sha256": digest(ORPHAN_KEY)}]},
            "claude": {
                "models": ["*"],
                "default_provider": "claude",
                "keys": [{"id": "claude", "sha256": digest(CLAUDE_KEY)}],
            },
        },
    )
    with Gateway(tmp_path_factory.mktemp("pass-through"), sections) as running:
        yield running


@pytest.fixture(autouse=True)
def _anew(upstream: RecordingUpstream) -> None:
    upstream.behave_normally()
    upstream.clear()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as sdk:
        yield sdk


def last(upstream: RecordingUpstream, method: str, path: str) -> Recorded:
    """The last request that the provider got, with its own credential and not the client's."""
    request = upstream.wait_for_requests(1)[-1]
    assert (request.method, request.path) == (method, path)
    assert request.values("authorization") == [f"Bearer {PROVIDER_SECRET}"]
    assert KEY.encode() not in request.raw_head + request.body
    return request


# Endpoints that name a model


def test_an_image_is_generated_with_and_without_a_model(client: openai.OpenAI, upstream: RecordingUpstream) -> None:
    assert client.images.generate(model="alias", prompt="A fox").data
    assert last(upstream, "POST", "/other/v1/images/generations").json == {"model": "real-model", "prompt": "A fox"}
    assert client.images.generate(prompt="A fox").data
    assert last(upstream, "POST", "/v1/images/generations").json == {"prompt": "A fox"}


def test_an_image_edit_reaches_the_provider_byte_for_byte_but_for_its_model(
    client: openai.OpenAI, upstream: RecordingUpstream
) -> None:
    assert client.images.edit(model="gpt-test", image=PNG, prompt="Blue ☃").data
    plain = last(upstream, "POST", "/v1/images/edits")
    assert PNG[1] in plain.body
    assert client.images.edit(model="alias", image=PNG, prompt="Blue ☃").data
    renamed = last(upstream, "POST", "/other/v1/images/edits")
    assert renamed.header("content-length") == str(len(renamed.body))
    swapped = _own_boundary(renamed).replace(b"\r\n\r\nreal-model\r\n", b"\r\n\r\ngpt-test\r\n")
    assert swapped == _own_boundary(plain)


@pytest.mark.parametrize("endpoint", ["transcriptions", "translations"])
def test_audio_is_sent_as_a_multipart_form(client: openai.OpenAI, upstream: RecordingUpstream, endpoint: str) -> None:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # OpenAI's own word on translations
        audio: Any = getattr(client.audio, endpoint)
        assert audio.create(model="alias", file=("a.wav", io.BytesIO(BINARY), "audio/wav")).text == TEXT
    sent = last(upstream, "POST", f"/other/v1/audio/{endpoint}")
    assert BINARY in sent.body
    assert b"\r\n\r\nreal-model\r\n" in sent.body


def test_speech_comes_back_byte_for_byte(client: openai.OpenAI, upstream: RecordingUpstream) -> None:
    upstream.behave(Reply(body=BINARY, headers=(("content-type", "audio/mpeg"),)))
    answer = client.audio.speech.create(model="alias", voice="alloy", input="Hello")
    assert answer.read() == BINARY
    assert answer.response.headers["content-type"] == "audio/mpeg"
    assert last(upstream, "POST", "/other/v1/audio/speech").json["model"] == "real-model"


def test_streamed_speech_comes_back_byte_for_byte(client: openai.OpenAI, upstream: RecordingUpstream) -> None:
    upstream.behave(Reply(chunks=(BINARY, BINARY), headers=(("content-type", "audio/mpeg"),), chunk_bytes=777))
    with client.audio.speech.with_streaming_response.create(model="gpt-test", voice="alloy", input="Hello") as answer:
        assert b"".join(answer.iter_bytes()) == BINARY * 2


def test_moderations_name_a_model_or_none(client: openai.OpenAI, upstream: RecordingUpstream) -> None:
    assert client.moderations.create(model="alias", input="Hello").results
    assert last(upstream, "POST", "/other/v1/moderations").json == {"model": "real-model", "input": "Hello"}
    assert client.moderations.create(input="Hello").results
    assert last(upstream, "POST", "/v1/moderations").json == {"input": "Hello"}


def test_rerank_is_routed_by_its_model_and_charged(gateway: Gateway, upstream: RecordingUpstream) -> None:
    body = {"model": "alias", "query": "fox", "documents": ["first", "second"]}
    answer = httpx.post(f"{gateway.url}/v1/rerank", json=body, headers={"authorization": f"Bearer {KEY}"})
    assert answer.json()["results"][0]["document"] == {"text": "first"}
    assert last(upstream, "POST", "/other/v1/rerank").json == {**body, "model": "real-model"}
    row = gateway.wait_for_rows(1, f"request_id = '{answer.headers['x-request-id']}'")[0]
    assert (row["endpoint"], row["input_tokens"], row["provider"]) == ("rerank", 11, "other")


def test_an_endpoint_that_names_a_model_obeys_the_keys_models(gateway: Gateway, upstream: RecordingUpstream) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=NARROW_KEY, max_retries=0) as narrow:
        assert narrow.images.edit(model="narrow", image=PNG, prompt="x").data
        with pytest.raises(openai.PermissionDeniedError):
            narrow.images.edit(model="alias", image=PNG, prompt="x")
        with pytest.raises(openai.PermissionDeniedError):
            narrow.images.edit(image=PNG, prompt="x")
    assert len(upstream.requests) == 1


# Endpoints that name none


def test_stored_responses_are_read_streamed_cancelled_and_deleted(
    client: openai.OpenAI, upstream: RecordingUpstream
) -> None:
    assert client.responses.retrieve("resp_1", include=["message.input_image.image_url"]).output_text == TEXT
    assert "include" in last(upstream, "GET", "/v1/responses/resp_1").query
    with client.responses.retrieve("resp_1", stream=True) as events:
        assert [event.type for event in events][-1] == "response.completed"
    upstream.behave(Reply(body=compact(client.responses.retrieve("resp_1").to_dict())), path="*/cancel")
    assert client.responses.cancel("resp_1").id == "resp_upstream"
    last(upstream, "POST", "/v1/responses/resp_1/cancel")
    assert list(client.responses.input_items.list("resp_1", limit=3)) == []
    assert last(upstream, "GET", "/v1/responses/resp_1/input_items").query == "limit=3"
    client.responses.delete("resp_1")
    last(upstream, "DELETE", "/v1/responses/resp_1")


def test_files_are_uploaded_listed_read_and_deleted(client: openai.OpenAI, upstream: RecordingUpstream) -> None:
    line = json.dumps({"custom_id": "1", "body": {"model": "any-model-at-all"}}).encode() + b"\n"
    assert client.files.create(file=("batch.jsonl", line), purpose="batch").id == "file-1"
    assert line in last(upstream, "POST", "/v1/files").body
    assert list(client.files.list(purpose="batch")) == []
    assert last(upstream, "GET", "/v1/files").query == "purpose=batch"
    upstream.behave(Reply(body=BINARY, headers=(("content-type", "application/octet-stream"),)), path="*/content")
    assert client.files.content("file-1").read() == BINARY
    assert client.files.delete("file-1").deleted
    last(upstream, "DELETE", "/v1/files/file-1")


def test_batches_and_fine_tuning_jobs_reach_the_default_provider(
    client: openai.OpenAI, upstream: RecordingUpstream
) -> None:
    made = client.batches.create(input_file_id="file-1", endpoint="/v1/chat/completions", completion_window="24h")
    assert made.id == "batch_1"
    assert client.batches.retrieve("batch_1").status == "validating"
    assert client.batches.cancel("batch_1").id == "batch_1"
    assert list(client.batches.list()) == []
    assert list(client.fine_tuning.jobs.list()) == []
    last(upstream, "GET", "/v1/fine_tuning/jobs")
    client.fine_tuning.jobs.create(model="not-a-model-of-ours", training_file="file-1")
    assert last(upstream, "POST", "/v1/fine_tuning/jobs").json["model"] == "not-a-model-of-ours"


Call = tuple[str, str, dict[str, Any]]
NAMELESS_CALLS: list[Call] = [
    ("GET", "/v1/files", {}),
    ("POST", "/v1/files", {"files": {"file": ("a", b"x")}}),
    ("GET", "/v1/files/file-1/content", {}),
    ("POST", "/v1/batches", {"json": {"input_file_id": "file-1"}}),
    ("GET", "/v1/responses/resp_1", {}),
    ("DELETE", "/v1/responses/resp_1", {}),
    ("POST", "/v1/responses/resp_1/cancel", {}),
    ("GET", "/v1/fine_tuning/jobs", {}),
    ("POST", "/v1/moderations", {"json": {"input": "Hello"}}),
    ("POST", "/v1/images/generations", {"json": {"prompt": "A fox"}}),
    ("POST", "/v1/images/edits", {"files": {"image": PNG}, "data": {"prompt": "x"}}),
    ("GET", "/v1/vector_stores", {}),
    ("GET", "/v1/chat/completions", {}),
]
each_nameless_call = pytest.mark.parametrize(
    "call", NAMELESS_CALLS, ids=[f"{call[0]} {call[1]}" for call in NAMELESS_CALLS]
)


def ask(gateway: Gateway, call: Call, key: str) -> httpx.Response:
    method, path, content = call
    return httpx.request(method, gateway.url + path, headers={"authorization": f"Bearer {key}"}, **content)


@each_nameless_call
@pytest.mark.parametrize(
    ("key", "refusal"),
    [
        (NARROW_KEY, (403, "model_not_allowed")),
        (ORPHAN_KEY, (400, "no_default_provider")),
        (CLAUDE_KEY, (400, "no_default_provider")),
        ("sk-wrong", (401, "invalid_api_key")),
    ],
)
def test_what_names_no_model_is_refused_without_a_right_to_all_or_a_provider_for_it(
    gateway: Gateway, upstream: RecordingUpstream, call: Call, key: str, refusal: tuple[int, str]
) -> None:
    answer = ask(gateway, call, key)
    assert (answer.status_code, answer.json()["error"]["code"]) == refusal
    assert upstream.requests == []


@each_nameless_call
def test_the_same_passes_with_both(gateway: Gateway, upstream: RecordingUpstream, call: Call) -> None:
    answer = ask(gateway, call, KEY)
    assert (answer.status_code, answer.headers["x-extproc-provider"]) == (200, "acme")
    assert "x-extproc-model" not in answer.headers
    assert last(upstream, call[0], call[1]).target == call[1]


@pytest.mark.parametrize(
    "path", ["/v1/filesystem", "/v1/file", "/v1/organization/costs", "/v1/realtime", "/v2/files", "/files", "/"]
)
def test_a_path_that_no_table_lists_passes_for_no_key(gateway: Gateway, upstream: RecordingUpstream, path: str) -> None:
    answer = httpx.get(gateway.url + path, headers={"authorization": f"Bearer {KEY}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_path")
    assert httpx.get(gateway.url + path).status_code == 401
    assert upstream.requests == []


def _own_boundary(request: Recorded) -> bytes:
    """The body with its boundary, which each SDK call draws anew, replaced by a fixed word."""
    boundary = (request.header("content-type") or "").partition("boundary=")[2].strip('"')
    return request.body.replace(boundary.encode(), b"BOUNDARY")
