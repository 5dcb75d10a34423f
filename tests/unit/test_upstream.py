"""The recording upstream records and sends exactly the bytes it says: a recorder that tidies proves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import httpx
import openai
import pytest

from tests.upstream import NOTHING, RecordingUpstream, Reply, Usage, sse
from tests.upstream_answers import TEXT

CHAT = "/v1/chat/completions"
USER: Any = [{"role": "user", "content": "Hi"}]
USAGE = Usage(input_tokens=100, output_tokens=20, cached_tokens=30, cache_write_tokens=10, reasoning_tokens=5)


@pytest.fixture
def upstream() -> Iterator[RecordingUpstream]:
    with RecordingUpstream(usage=USAGE) as running:
        yield running


@pytest.fixture
def http(upstream: RecordingUpstream) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=upstream.url, timeout=10) as client:
        yield client


def exchange(upstream: RecordingUpstream, request: bytes) -> bytes:
    """Send raw bytes and read until the upstream closes."""
    with socket.create_connection((upstream.host, upstream.port), timeout=10) as raw:
        raw.sendall(request)
        received = bytearray()
        while data := raw.recv(65536):
            received += data
        return bytes(received)


def test_a_request_is_recorded_byte_for_byte(upstream: RecordingUpstream) -> None:
    head = (
        b"POST /v1//chat/%63ompletions?a=1&a=%202 HTTP/1.1\r\nHOST: x\r\nX-Twice: 1\r\nx-tWICE:  2\t\r\n"
        b"x-latin: \xe9\r\nContent-Length: 9\r\nConnection: close\r\n\r\n"
    )
    exchange(upstream, head + b'{"a": -0}')
    [request] = upstream.requests
    assert request.raw_head == head
    assert (request.method, request.target) == ("POST", "/v1//chat/%63ompletions?a=1&a=%202")
    assert (request.path, request.query) == ("/v1//chat/%63ompletions", "a=1&a=%202")
    assert request.headers[:3] == [("HOST", "x"), ("X-Twice", "1"), ("x-tWICE", "2")]
    assert request.values("x-twice") == ["1", "2"]
    assert request.header("X-LATIN") == "é"
    assert (request.body, request.completed, request.client_left) == (b'{"a": -0}', True, False)


def test_a_chunked_body_is_kept_as_framed_and_as_meant(upstream: RecordingUpstream) -> None:
    framed = b"3;ext=1\r\n{}\n\r\n1\r\n \r\n0\r\nx-trailer: 1\r\n\r\n"
    exchange(upstream, b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + framed)
    [request] = upstream.requests
    assert (request.body, request.raw_body) == (b"{}\n ", framed)


@pytest.mark.parametrize("junk", [b"\x16\x03\x01 hello", b"GET /\r\n\r\n"])
def test_what_is_no_request_is_kept_apart(upstream: RecordingUpstream, junk: bytes) -> None:
    with socket.create_connection((upstream.host, upstream.port), timeout=10) as raw:
        raw.sendall(junk)
    upstream.wait_for(lambda: bool(upstream.malformed))
    assert (upstream.malformed, upstream.requests) == ([junk], [])


def test_kept_alive_requests_share_a_connection_id(upstream: RecordingUpstream, http: httpx.Client) -> None:
    for _ in range(3):
        http.get("/v1/models")
    httpx.get(f"{upstream.url}/v1/models")
    assert [request.connection for request in upstream.requests] == [1, 1, 1, 2]
    assert [request.ordinal for request in upstream.requests] == [1, 2, 3, 4]


def test_an_upload_cut_short_is_recorded_as_far_as_it_came(upstream: RecordingUpstream) -> None:
    with socket.create_connection((upstream.host, upstream.port), timeout=10) as raw:
        raw.sendall(b"POST /v1/files HTTP/1.1\r\nContent-Length: 100\r\n\r\nonly this")
    [request] = upstream.wait_for_requests(1)
    assert (request.body, request.client_left, request.completed) == (b"only this", True, False)


def test_an_expected_continue_is_given(upstream: RecordingUpstream) -> None:
    head = b"POST /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"
    assert exchange(upstream, head + b"{}").startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_raw_bytes_go_out_as_they_are(upstream: RecordingUpstream) -> None:
    raw = b"HTTP/1.1 299 Odd\r\nX-A:1\r\ncontent-length: 3\r\n\r\nabc"
    upstream.behave(Reply(raw=raw, chunk_bytes=4, usage=Usage(1, 1)))
    assert exchange(upstream, b"GET / HTTP/1.1\r\n\r\n") == raw
    assert upstream.usage_total() == Usage(1, 1)


@pytest.mark.parametrize("size", [None, 1, 3, 1000])
def test_a_scripted_stream_is_the_scripted_bytes_in_pieces_of_the_given_size(
    upstream: RecordingUpstream, size: int | None
) -> None:
    script = (sse("é🙂\nline two", event="delta", comment="ping", end="\r\n"), b": \r\r", sse("[DONE]", id_="7"))
    assert script[0] == ": ping\r\nevent: delta\r\ndata: é🙂\r\ndata: line two\r\n\r\n".encode()
    upstream.behave(Reply(chunks=script, chunk_bytes=size), path=CHAT)
    answer = exchange(upstream, f"POST {CHAT} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
    pieces = []
    rest = answer.partition(b"\r\n\r\n")[2]
    while rest != b"0\r\n\r\n":
        length, _, rest = rest.partition(b"\r\n")
        pieces.append(rest[: int(length, 16)])
        rest = rest[int(length, 16) + 2 :]
    assert b"".join(pieces) == b"".join(script) == bytes(upstream.requests[0].sent)
    assert {len(piece) for piece in pieces[:-1]} == ({size} if size in (1, 3) else {len(it) for it in pieces[:-1]})
    assert upstream.requests[0].sent_chunks == len(pieces)


def test_status_headers_and_body_are_scripted(upstream: RecordingUpstream, http: httpx.Client) -> None:
    upstream.behave(Reply(status=429, headers=(("Retry-After", "7"), ("x-request-id", "theirs"))), times=1)
    refused = http.post(CHAT)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
    assert refused.headers.get_list("x-request-id") == ["theirs"]
    assert refused.json()["error"]["message"] == "scripted 429"
    assert http.post(CHAT).status_code == 200
    assert [line.usage for line in upstream.ledger()] == [None, USAGE]


def test_an_error_speaks_the_paths_dialect(upstream: RecordingUpstream, http: httpx.Client) -> None:
    upstream.behave(Reply(status=529))
    assert http.post("/v1/messages").json()["type"] == "error"


def test_rules_match_by_path_method_ordinal_and_condition(upstream: RecordingUpstream, http: httpx.Client) -> None:
    third = upstream.behave(Reply(status=503), path="/v1/chat/*", method="POST", ordinals={3})
    named = upstream.behave(Reply(status=418), where=lambda request: request.json["model"] == "bad", path=CHAT)
    statuses = [http.post(CHAT, json={"model": name}).status_code for name in ("a", "b", "c", "bad", "d")]
    assert statuses == [200, 200, 503, 418, 200]
    assert http.get("/v1/models").status_code == 200
    assert (third.hits, named.hits) == (1, 1)
    upstream.behave_normally()
    assert http.post(CHAT, json={"model": "bad"}).status_code == 200


def test_a_reset_before_the_headers_is_a_reset(upstream: RecordingUpstream, http: httpx.Client) -> None:
    upstream.behave(Reply(reset_before_headers=True))
    with pytest.raises(httpx.ReadError, match="reset"):
        http.post(CHAT)
    [request] = upstream.wait_for_requests(1)
    assert (request.status, request.completed, request.client_left) == (None, False, False)


@pytest.mark.parametrize(
    ("how", "error"),
    [({"reset_after": 2}, httpx.ReadError), ({"close_after": 2}, httpx.RemoteProtocolError)],
    ids=["reset", "closed"],
)
def test_a_stream_breaks_after_the_given_chunks(
    upstream: RecordingUpstream, http: httpx.Client, how: dict[str, Any], error: type[Exception]
) -> None:
    # A reset discards what the client has not read yet: only then may it be fast.
    upstream.behave(Reply(chunk_delay_s=0.05, **how))
    received = bytearray()
    with pytest.raises(error), http.stream("POST", CHAT, json={"stream": True}) as answer:
        for data in answer.iter_bytes():
            received += data
    [request] = upstream.wait_for_requests(1)
    assert received == request.sent
    assert (request.sent_chunks, request.completed, request.client_left) == (2, False, False)
    assert upstream.usage_total() == NOTHING
    assert upstream.usage_total(completed_only=False) == USAGE


@pytest.mark.parametrize(
    "reply",
    [Reply(stall_after=1), Reply(endless=True), Reply(stall_before_headers=True)],
    ids=["stalled", "endless", "no headers"],
)
def test_a_client_that_leaves_is_noticed(upstream: RecordingUpstream, reply: Reply) -> None:
    upstream.behave(reply)
    body = b'{"stream":true}'
    with socket.create_connection((upstream.host, upstream.port), timeout=10) as raw:
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        if not reply.stall_before_headers:
            assert raw.recv(4096)
        upstream.wait_for(lambda: bool(upstream.requests))
        time.sleep(0.05)
        assert not upstream.requests[0].finished
    [request] = upstream.wait_for_requests(1)
    assert (request.client_left, request.completed) == (True, False)


def test_delays_are_kept(upstream: RecordingUpstream, http: httpx.Client) -> None:
    upstream.behave(Reply(before_headers_s=0.1, chunks=(b"data: 1\n\n",) * 3, chunk_delay_s=0.1))
    begun = time.monotonic()
    http.post(CHAT)
    assert 0.3 <= time.monotonic() - begun < 5


@pytest.mark.parametrize("stream", [False, True])
def test_gzip_decodes_to_what_was_meant(upstream: RecordingUpstream, http: httpx.Client, stream: bool) -> None:
    upstream.behave(Reply(gzip=True))
    with http.stream("POST", CHAT, json={"stream": stream}) as answer:
        coded = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(coded) == upstream.requests[0].sent != coded


def test_an_html_page_and_a_huge_body(upstream: RecordingUpstream, http: httpx.Client) -> None:
    upstream.behave(Reply.html_error(), times=1)
    assert http.post(CHAT).headers.get_list("content-type") == ["text/html"]
    upstream.behave(Reply.huge(20_000_000))
    huge = http.post(CHAT).content
    assert len(huge) == 20_000_000
    assert json.loads(huge)["object"] == "chat.completion"


def test_a_killed_upstream_resets_what_is_open_refuses_what_is_new_and_returns(upstream: RecordingUpstream) -> None:
    upstream.behave(Reply(stall_after=1), times=1)
    with httpx.Client(base_url=upstream.url, timeout=10) as http:
        with pytest.raises(httpx.ReadError), http.stream("POST", CHAT, json={"stream": True}) as answer:
            for _ in answer.iter_bytes():
                upstream.stop()
        with pytest.raises(httpx.ConnectError):
            http.post(CHAT)
        upstream.start()
        assert http.post(CHAT).status_code == 200
    assert [request.client_left for request in upstream.requests] == [False, False]
    upstream.clear()
    assert upstream.ledger() == []


def test_tls_is_verified_by_its_own_ca_and_nothing_else(tmp_path: Path) -> None:
    with RecordingUpstream(tls=True) as upstream:
        trusting = ssl.create_default_context(cafile=str(upstream.write_ca(tmp_path)))
        assert httpx.get(f"{upstream.url}/v1/models", verify=trusting).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{upstream.url}/v1/models")
        upstream.behave(Reply(reset_before_headers=True))
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            httpx.get(f"{upstream.url}/v1/models", verify=trusting)
    assert len(upstream.requests) == 2


def test_openai_defaults_report_the_configured_usage(upstream: RecordingUpstream) -> None:
    with openai.OpenAI(base_url=f"{upstream.url}/v1", api_key="k", max_retries=0) as client:
        chat = client.chat.completions.create(model="m", messages=USER)
        assert chat.usage is not None
        assert chat.usage.prompt_tokens_details is not None
        assert (chat.model, chat.choices[0].message.content) == ("m", TEXT)
        assert (chat.usage.prompt_tokens, chat.usage.prompt_tokens_details.cached_tokens) == (100, 30)
        asked = {"include_usage": True}
        told = list(client.chat.completions.create(model="m", messages=USER, stream=True, stream_options=asked))  # type: ignore[call-overload]
        untold = list(client.chat.completions.create(model="m", messages=USER, stream=True))
        assert told[-1].usage == chat.usage
        assert len(told) == len(untold) + 1
        events = list(client.responses.create(model="m", input="Hi", stream=True))
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == TEXT
        assert events[-1].response.usage is not None
        assert events[-1].response.usage.output_tokens_details.reasoning_tokens == 5
        assert client.completions.create(model="m", prompt="Hi").choices[0].text == TEXT
        assert client.embeddings.create(model="m", input=["a", "b"]).data[1].embedding == [1.0, 0.0]
    assert upstream.usage_total().input_tokens == 600
    assert upstream.usage_total().output_tokens == 100


def test_endpoints_that_charge_nothing_are_not_in_the_ledgers_total(upstream: RecordingUpstream) -> None:
    with openai.OpenAI(base_url=f"{upstream.url}/v1", api_key="k", max_retries=0) as client:
        assert client.responses.retrieve("resp_1").usage is not None
        client.responses.delete("resp_1")
        assert client.moderations.create(input="x").results[0].flagged is False
        assert client.images.generate(prompt="x").data
        assert client.audio.transcriptions.create(model="m", file=("a.wav", b"RIFF")).text == TEXT
        assert client.files.create(file=("a.jsonl", b"{}"), purpose="batch").id == "file-1"
        assert client.batches.retrieve("batch_1").id == "batch_1"
        assert list(client.batches.list()) == []
    assert len(upstream.requests) == 8
    assert upstream.usage_total() == NOTHING


def test_anthropic_defaults_report_cache_tokens_apart_from_input(upstream: RecordingUpstream) -> None:
    with anthropic.Anthropic(base_url=upstream.url, api_key="k", max_retries=0) as client:
        whole = client.messages.create(model="m", max_tokens=9, messages=USER).usage
        with client.messages.stream(model="m", max_tokens=9, messages=USER) as stream:
            streamed = stream.get_final_message()
        assert client.messages.count_tokens(model="m", messages=USER).input_tokens == 100
    for usage in (whole, streamed.usage):
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (60, 30, 10)
        assert usage.output_tokens == 20
    assert upstream.usage_total() == USAGE + USAGE


def test_two_thousand_requests_at_once_are_all_in_the_ledger() -> None:
    async def drive(url: str) -> None:
        gate = asyncio.Semaphore(64)
        async with aiohttp.ClientSession() as session:

            async def one(number: int) -> None:
                body = {"model": "m", "stream": number % 2 == 0}
                async with gate, session.post(url + CHAT, json=body, headers={"x-test-marker": str(number)}) as answer:
                    assert answer.status == 200
                    await answer.read()

            await asyncio.gather(*map(one, range(2000)))

    with RecordingUpstream(usage=lambda request: Usage(int(request.marker or 0), 1)) as upstream:
        begun = time.monotonic()
        asyncio.run(drive(upstream.url))
        took_s = time.monotonic() - begun
    assert sorted(int(line.marker or -1) for line in upstream.ledger()) == list(range(2000))
    assert upstream.usage_total() == Usage(sum(range(2000)), 2000)
    assert took_s < 60


def test_leaving_the_block_frees_the_port() -> None:
    with RecordingUpstream() as upstream:
        held = socket.create_connection((upstream.host, upstream.port), timeout=10)
    with held, contextlib.suppress(ConnectionResetError):
        assert held.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((upstream.host, upstream.port), timeout=10)
