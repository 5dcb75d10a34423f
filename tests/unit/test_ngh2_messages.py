"""gRPC's framing on libnghttp2, byte by byte: what is one message, and what is none."""

from __future__ import annotations

import asyncio
import itertools
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.server.grpc_framing import LazyMetadata, Messages, framed, trailers
from extproc.server.transport import Status, StatusError
from tests.ngh2_peer import MESSAGE_LIMIT, Heard, Peer, prefixed, request_headers
from tests.transports import AWKWARD, COLLECT, SHOUT

SAID = [b"one", b"", b"three" * 40, b"sleep", b"five"]


async def test_a_message_may_be_split_over_frames_at_every_offset() -> None:
    peer = Peer()
    whole = b"".join(map(prefixed, SAID))
    calls = []
    for cut in range(len(whole) + 1):
        stream_id = peer.open()
        calls.append(stream_id)
        for part in (whole[:cut], whole[cut:]):
            peer.h2.send_data(stream_id, part)
            peer.pump()
        peer.h2.end_stream(stream_id)
    await _until_ended(peer, calls)
    assert all(peer.heard[stream_id].messages == [*SAID, b"finished"] for stream_id in calls)
    assert {peer.heard[stream_id].status for stream_id in calls} == {0}


async def _until_ended(peer: Peer, calls: list[int]) -> None:
    for _ in range(200):
        await peer.settle()
        if all(peer.heard[stream_id].ended for stream_id in calls):
            return
        await asyncio.sleep(0.002)
    raise AssertionError("a call did not end")


async def test_a_message_may_come_byte_by_byte() -> None:
    peer = Peer()
    stream_id = peer.open()
    for byte in b"".join(map(prefixed, [b"a", b"bc", b"done"])):
        peer.h2.send_data(stream_id, byte.to_bytes())
        peer.pump()
    assert peer.heard[stream_id].messages == [b"a", b"bc", b"done"]


async def test_one_frame_may_hold_many_messages() -> None:
    peer = Peer()
    said = [b"%d" % number for number in range(1000)]
    stream_id = peer.open()
    peer.h2.send_data(stream_id, b"".join(map(prefixed, said)), end_stream=True)
    peer.pump()
    assert peer.heard[stream_id].messages == [*said, b"finished"]


@given(
    st.lists(st.binary(max_size=40), max_size=12),
    st.lists(st.integers(0, 600), max_size=12),
)
def test_messages_do_not_depend_on_how_their_bytes_are_cut(said: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(map(prefixed, said))
    edges = sorted({0, len(whole), *(cut % (len(whole) + 1) for cut in cuts)})
    messages, found = Messages(1000), []
    for start, end in itertools.pairwise(edges):
        messages.feed(whole[start:end])
        while (message := messages.take()) is not None:
            found.append(message)
    assert found == said
    assert not messages.rest


@given(st.binary(max_size=200_000))
def test_a_framed_reply_is_one_message(reply: bytes) -> None:
    assert b"".join(framed(reply)) == prefixed(reply)


@given(st.sampled_from(Status), st.text())
def test_any_message_of_a_status_survives_its_encoding(status: Status, text: str) -> None:
    fields = dict(trailers(StatusError(status, text)))
    assert int(fields[b"grpc-status"]) == status
    encoded = fields[b"grpc-message"].decode("ascii")
    assert all(" " <= char <= "~" for char in encoded)
    assert urllib.parse.unquote(encoded) == text.encode(errors="replace").decode()


def test_metadata_is_a_mapping_of_text() -> None:
    metadata = LazyMetadata({b"a": b"1", b"b": "é".encode("latin-1")})
    assert dict(metadata) == {"a": "1", "b": "é"}
    assert "a" in metadata
    assert "c" not in metadata
    assert len(metadata) == 2
    assert metadata.get("c") is None


async def test_a_compressed_message_is_unimplemented() -> None:
    peer = Peer()
    stream_id = peer.open()
    peer.h2.send_data(stream_id, prefixed(b"squeezed", flag=1))
    peer.pump()
    assert peer.heard[stream_id].status == Status.UNIMPLEMENTED


async def test_a_message_above_the_limit_is_refused_by_its_prefix_alone() -> None:
    peer = Peer()
    for size, status in ((MESSAGE_LIMIT + 1, Status.RESOURCE_EXHAUSTED), (0xFFFFFFFF, Status.RESOURCE_EXHAUSTED)):
        stream_id = peer.open()
        peer.h2.send_data(stream_id, b"\0" + size.to_bytes(4, "big"))
        peer.pump()
        assert peer.heard[stream_id].status == status
    allowed = peer.open()
    peer.h2.send_data(allowed, b"\0" + MESSAGE_LIMIT.to_bytes(4, "big"))
    peer.pump()
    assert peer.heard[allowed].status is None


@pytest.mark.parametrize("rest", [b"\0", b"\0\0\0\0\1", prefixed(b"whole") + b"\0\0"])
async def test_a_stream_that_ends_inside_a_message_is_an_error(rest: bytes) -> None:
    peer = Peer()
    stream_id = peer.open()
    peer.h2.send_data(stream_id, rest, end_stream=True)
    peer.pump()
    assert peer.heard[stream_id].status == Status.INTERNAL


async def test_a_unary_call_without_a_message_is_an_error_and_other_shapes_need_none() -> None:
    peer = Peer()
    silent = [peer.open(path, ends=True) for path in (SHOUT, COLLECT)]
    bare = peer.h2.send_request(request_headers(), end_stream=True)
    peer.heard[bare] = Heard()
    peer.pump()
    assert peer.heard[silent[0]].status == Status.INTERNAL
    assert peer.heard[silent[1]].messages == [b"0 0"]
    assert peer.heard[bare].messages == [b"finished"]


async def test_a_second_message_of_a_unary_call_is_not_heard() -> None:
    peer = Peer()
    stream_id = peer.open(SHOUT, b"a", b"b", ends=True)
    peer.pump()
    assert peer.heard[stream_id].messages == [b"A"]
    assert peer.heard[stream_id].status == 0


@pytest.mark.parametrize("kind", [b"application/grpc", b"application/grpc+proto", b"application/grpc;charset=utf-8"])
async def test_every_grpc_content_type_is_taken(kind: bytes) -> None:
    peer = Peer()
    stream_id = peer.open(SHOUT, b"a", headers=request_headers(SHOUT, content_type=kind))
    peer.pump()
    assert peer.heard[stream_id].messages == [b"A"]
    assert peer.heard[stream_id].headers[b"content-type"] == b"application/grpc"


@pytest.mark.parametrize("kind", [b"", b"application/json", b"application/grpc-web", b"application/grpcx", b"grpc"])
async def test_another_content_type_gets_http_415(kind: bytes) -> None:
    peer = Peer()
    stream_id = peer.open(SHOUT, b"a", headers=request_headers(SHOUT, content_type=kind))
    peer.pump()
    assert peer.heard[stream_id].headers == {b":status": b"415"}
    assert peer.heard[stream_id].ended


async def test_another_method_of_http_gets_405() -> None:
    peer = Peer()
    headers = [(name, b"GET" if name == b":method" else value) for name, value in request_headers()]
    stream_id = peer.h2.send_request(headers, end_stream=True)
    peer.heard[stream_id] = Heard()
    peer.pump()
    assert peer.heard[stream_id].headers[b":status"] == b"405"


async def test_the_trailers_carry_status_and_message_after_what_was_said() -> None:
    peer = Peer()
    stream_id = peer.open("/test.Calls/Bidi", b"a", b"refuse")
    peer.pump()
    heard = peer.heard[stream_id]
    assert heard.messages == [b"a"]
    assert heard.headers == {b":status": b"200", b"content-type": b"application/grpc"}
    assert heard.trailers == {
        b"grpc-status": b"5",
        b"grpc-message": b'na%C3%AFve 100%25 "quoted"%0A%E2%82%AC',
    }
    assert urllib.parse.unquote(heard.trailers[b"grpc-message"].decode()) == AWKWARD
