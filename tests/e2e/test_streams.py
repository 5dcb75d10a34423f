"""Streams through the real Envoy: the upstream's bytes whatever legal SSE they are, how long they last, how they end.

Every chunking of the usage event is in unit/test_lua_answer. The surprising thing: that no chunk enters Python is read
off Envoy's own count of the messages it exchanged with the sidecar.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.gateway import KEY, TEAMS, Gateway, config
from tests.upstream import RecordingUpstream, Reply, sse
from tests.upstream_answers import Usage, openai_usage

pytestmark = pytest.mark.e2e

FIRST_BYTE_S = 1.0
STREAM_IDLE_S = 1.5
ENDPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"model": "m", "messages": [], "stream_options": {"include_usage": True}}),
    "completions": ("/v1/completions", {"model": "m", "prompt": "x", "stream_options": {"include_usage": True}}),
    "responses": ("/v1/responses", {"model": "m", "input": "x"}),
    "messages": ("/v1/messages", {"model": "claude", "messages": [], "max_tokens": 9}),
}


class Lab(NamedTuple):
    gateway: Gateway
    upstream: RecordingUpstream
    http: httpx.Client


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with RecordingUpstream() as upstream:
        sections = config(
            providers={
                "openai": {"kind": "openai", "endpoint": f"{upstream.url}/v1"},
                "silent": {"kind": "openai", "endpoint": f"{upstream.url}/v1", "stream_usage": False},
                "anthropic": {"kind": "anthropic", "endpoint": upstream.url},
            },
            models={
                "m": {"targets": [{"provider": "openai"}]},
                "renamed": {
                    "targets": [{"provider": "openai"}, {"provider": "openai", "model": "other", "priority": 1}]
                },
                "unasked": {"targets": [{"provider": "silent"}]},
                "claude": {"targets": [{"provider": "anthropic"}]},
            },
            teams={"search": TEAMS["search"]},
            timeouts={"first_byte_s": FIRST_BYTE_S, "stream_idle_s": STREAM_IDLE_S},
        )
        with (
            Gateway(tmp_path_factory.mktemp("streams"), sections) as gateway,
            httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {KEY}"}, timeout=15) as http,
        ):
            yield Lab(gateway, upstream, http)
            assert "[lua]" not in gateway.log()  # Envoy's word for a script that failed


@pytest.fixture
def lab(started: Lab) -> Lab:
    started.upstream.behave_normally()
    started.upstream.clear()
    return started


def ask(lab: Lab, endpoint: str = "chat", **more: Any) -> httpx.Response:
    path, body = ENDPOINTS[endpoint]
    return lab.http.post(path, json={**body, "stream": True, **more})


def row_of(lab: Lab, answer: httpx.Response) -> dict[str, Any]:
    return lab.gateway.wait_for_rows(1, f"request_id = '{answer.headers['x-request-id']}'")[0]


# Bytes

CONTENT = {"choices": [{"index": 0, "delta": {"content": "naïve 🙂"}}]}
ODD: dict[str, tuple[bytes, ...]] = {
    "crlf": (sse(json.dumps(CONTENT), end="\r\n"), sse("[DONE]", end="\r\n")),
    "cr": (sse(json.dumps(CONTENT), end="\r"), sse("[DONE]", end="\r")),
    "mixed": (b"data: a\r\ndata: b\ndata: c\r\r\n\n\r", b"\n", sse("[DONE]")),
    "comments": (b": ping\n\n", b":\n", b": data: {}\n", sse("x", comment="y"), b": end"),
    "fields": (b"\xef\xbb\xbfid: 1\nevent: odd\nretry: 5\ndata\ndata:\nunknown: z\n: in\ndata:x\n\n", b"id\n\n"),
    "multi-line": (sse('{"choices":\n [{"delta":\n {"content": "a"}}]}'), sse("[DONE]")),
    "no last empty line": (sse(json.dumps(CONTENT)), b'data: {"choices": [{"delta"'),
    "cut in a character": ("data: naï🙂".encode()[:-2],),
    "big": tuple(sse("y" * 700_000) for _ in range(3)),
    "unicode": (sse("\u2028\u2029\u0085 \x0b\x0c \x00 ﷽"),),
    "nothing": (b"",),
    "line ends": (b"\n\n\n\r\n\r\r\n\n",),
}


@pytest.mark.parametrize("piece", [1, 3, None])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_stream_is_byte_for_byte_the_upstreams(lab: Lab, endpoint: str, piece: int | None) -> None:
    lab.upstream.behave(Reply(chunk_bytes=piece))
    answer = ask(lab, endpoint)
    assert answer.status_code == 200
    assert answer.content == bytes(lab.upstream.requests[0].sent)
    assert b"usage" in answer.content


@pytest.mark.parametrize("name", ODD)
def test_odd_but_legal_events_pass_byte_for_byte(lab: Lab, name: str) -> None:
    text = b"".join(ODD[name])
    for piece in (None,) if name == "big" else (None, 1):
        lab.upstream.behave_normally()
        lab.upstream.behave(Reply(chunks=ODD[name], chunk_bytes=piece))
        for endpoint in ENDPOINTS:
            assert ask(lab, endpoint).content == text
        for model in ("m", "unasked"):
            assert ask(lab, model=model, stream_options=None).content == text


@pytest.mark.parametrize("piece", [1, 2, 5, 64, None])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_exactly_the_usage_event_is_missing_where_the_client_did_not_ask(lab: Lab, end: str, piece: int | None) -> None:
    usage = {"id": "c", "choices": [], "usage": openai_usage(Usage())}
    before = [sse(json.dumps(CONTENT), comment="kept", end=end), sse(json.dumps(CONTENT), event="e", end=end)]
    after = [f": kept{end}".encode(), sse("[DONE]", end=end)]
    hidden = sse(json.dumps(usage), event="usage", id_="9", end=end)
    lab.upstream.behave(Reply(chunks=(*before, hidden, *after), chunk_bytes=piece))
    answer = ask(lab, stream_options=None)
    assert answer.content == b"".join((*before, *after))
    assert lab.upstream.requests[0].json["stream_options"] == {"include_usage": True}
    row = row_of(lab, answer)
    assert (row["input_tokens"], row["output_tokens"], row["estimated"]) == (11, 7, 0)


def test_a_declared_length_does_not_outlast_the_hidden_event(lab: Lab) -> None:
    chunks = (sse(json.dumps(CONTENT)), sse(json.dumps({"choices": [], "usage": {}})), sse("[DONE]"))
    length = (("content-length", str(len(b"".join(chunks)))),)
    lab.upstream.behave(Reply(chunks=chunks, headers=length))
    assert ask(lab, stream_options=None).content == chunks[0] + chunks[2]
    assert ask(lab).headers["content-length"] == length[0][1]


def test_a_server_that_refuses_stream_options_is_not_asked_for_usage(lab: Lab) -> None:
    answer = ask(lab, model="unasked", stream_options=None)
    assert lab.upstream.requests[0].json["stream_options"] is None
    row = row_of(lab, answer)
    assert (row["outcome"], row["estimated"]) == ("ok", 1)
    assert row["output_tokens"] > 0


def test_a_large_whole_answer_passes_unchanged(lab: Lab) -> None:
    lab.upstream.behave(Reply.huge(3_000_000))
    assert ask(lab, stream=False, stream_options=None).content == bytes(lab.upstream.requests[0].sent)


def test_each_chunk_leaves_at_once(lab: Lab) -> None:
    lab.upstream.behave(Reply(chunk_delay_s=0.3))
    path, body = ENDPOINTS["chat"]
    arrived: list[float] = []
    with lab.http.stream("POST", path, json={**body, "stream": True, "stream_options": None}) as answer:
        arrived += [time.monotonic() for _ in zip(range(4), answer.iter_raw(), strict=False)]
    gaps = [later - earlier for earlier, later in pairwise(arrived)]
    assert all(0.1 < gap < 0.8 for gap in gaps)


# What Python sees


def envoy_stats(gateway: Gateway, like: str) -> dict[str, int]:
    """Envoy's counters whose names match, by name."""
    for pid in gateway.children():
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "--use-dynamic-base-id" in arguments:
            socket = Path(arguments[arguments.index("-c") + 1]).with_name("envoy-admin.sock")
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://envoy") as admin:
                lines = admin.get("/stats", params={"filter": like}).text.splitlines()
            return {
                name: int(value) for name, _, value in (line.partition(": ") for line in lines) if value.isdecimal()
            }
    raise LookupError("no Envoy is running")


def messages(lab: Lab) -> int:
    """Messages that Envoy has exchanged with the sidecar, both ways, on every listener and cluster."""
    return sum(envoy_stats(lab.gateway, r"ext_proc\.(.*\.)?stream_msgs_(sent|received)$").values())


@pytest.mark.parametrize("model", ["m", "renamed"])
def test_no_chunk_of_an_answer_enters_python(lab: Lab, model: str) -> None:
    def cost(chunks: int) -> int:
        lab.upstream.behave_normally()
        if model == "renamed":
            lab.upstream.behave(Reply(status=500), times=1)
        lab.upstream.behave(Reply(chunks=tuple(sse(json.dumps(CONTENT)) for _ in range(chunks)), chunk_delay_s=0.0005))
        before = messages(lab)
        assert ask(lab, model=model, stream_options=None).content.count(b"data:") == chunks
        return messages(lab) - before

    few = cost(1)
    assert few == (8 if model == "renamed" else 4)  # headers and body, asked and answered; for each who is asked
    assert cost(400) == few


# How long, and how it ends


def test_a_stream_may_last_longer_than_the_time_to_its_first_byte(lab: Lab) -> None:
    lab.upstream.behave(Reply(chunk_delay_s=FIRST_BYTE_S / 4))
    began = time.monotonic()
    answer = ask(lab)
    assert time.monotonic() - began > 2 * FIRST_BYTE_S
    assert answer.content == bytes(lab.upstream.requests[0].sent)
    row = row_of(lab, answer)
    assert (row["outcome"], row["estimated"]) == ("ok", 0)
    assert row["first_byte_s"] < FIRST_BYTE_S < row["duration_s"]


def broken(lab: Lab) -> tuple[bytes, float, dict[str, Any]]:
    """What came of a stream before it broke, how long that took, and its row."""
    path, body = ENDPOINTS["chat"]
    began, heard = time.monotonic(), bytearray()
    with lab.http.stream("POST", path, json={**body, "stream": True}) as answer:
        with pytest.raises(httpx.RemoteProtocolError):
            for chunk in answer.iter_raw():
                heard += chunk
        lasted_s = time.monotonic() - began
    return bytes(heard), lasted_s, row_of(lab, answer)


def test_a_stalled_stream_ends_after_stream_idle_s(lab: Lab) -> None:
    lab.upstream.behave(Reply(stall_after=3))
    heard, lasted_s, row = broken(lab)
    assert heard == bytes(lab.upstream.requests[0].sent)
    # Envoy resets, and closes the connection up to a second later.
    assert STREAM_IDLE_S * 0.9 < lasted_s < STREAM_IDLE_S + 1.5
    assert (row["outcome"], row["estimated"], row["status"]) == ("broken", 1, 200)
    lab.upstream.wait_for(lambda: lab.upstream.requests[0].client_left, 3.0)


@pytest.mark.parametrize("how", [Reply(reset_after=3), Reply(close_after=3)], ids=["reset", "closed"])
def test_a_stream_that_breaks_is_seen_to_break(lab: Lab, how: Reply) -> None:
    lab.upstream.behave(how)
    heard, _, row = broken(lab)
    assert bytes(lab.upstream.requests[0].sent).startswith(heard)
    assert (row["outcome"], row["estimated"]) == ("broken", 1)
    assert row["output_tokens"] > 0


@pytest.mark.parametrize(
    "reply",
    [
        Reply(chunks=(sse(json.dumps(CONTENT)),), endless=True, chunk_delay_s=0.01),
        Reply(stall_after=2, chunk_bytes=50),
        Reply(stall_before_headers=True),
    ],
    ids=["endless", "stalled", "before headers"],
)
@pytest.mark.parametrize("stream", [True, False])
def test_when_the_client_leaves_the_upstream_sees_it_within_seconds(lab: Lab, reply: Reply, stream: bool) -> None:
    lab.upstream.behave(reply)
    path, body = ENDPOINTS["chat"]

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=lab.gateway.url, headers={"authorization": f"Bearer {KEY}"}) as http:
            with pytest.raises((asyncio.TimeoutError, TimeoutError)):
                await asyncio.wait_for(http.post(path, json={**body, "stream": stream}), 0.4)

    left = "outcome = 'client_left'"
    before = len(lab.gateway.rows(left))
    asyncio.run(leave())
    began = time.monotonic()
    lab.upstream.wait_for(lambda: lab.upstream.requests[0].client_left, 3.0)
    assert time.monotonic() - began < 2.0
    row = lab.gateway.wait_for_rows(before + 1, left)[-1]
    assert (row["estimated"], row["attempts"], row["provider"]) == (1, 1, "openai")
