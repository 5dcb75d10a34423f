"""render/lua/answer.lua, run by LuaJIT without a gateway: every chunking of every legal stream, and what it notes.

The surprising thing: the reference is not another parser of the same kind. It reads the whole stream at once, by the
standard's own words, and the script must come to the same however the bytes are cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extproc.errors import Code, Dialect, Refusal, error_document
from tests.lua_host import Answered
from tests.upstream import Usage, sse
from tests.upstream_answers import default_answer


def stream(
    chunks: Sequence[bytes], headers: Mapping[str, str] | None = None, *, hide: bool = False, dialect: str = "openai"
) -> Answered:
    return Answered(200, {"hide_usage": hide, "dialect": dialect}, chunks, headers=headers or {})


def cut(text: bytes, *places: int) -> list[bytes]:
    bounds = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def without_usage(text: bytes) -> bytes:
    """The stream without usage events, by the standard's own words: what the script must come to."""
    kept, event = bytearray(), list[bytes]()
    for line in (*LINE.findall(text), None):
        if line is not None and not event and line.startswith(b":"):
            kept += line
            continue
        event += [] if line is None else [line]
        if line is None or not line.strip(b"\r\n"):
            kept += b"" if is_usage_alone(event) else b"".join(event)
            event = []
    return bytes(kept)


def is_usage_alone(event: Iterable[bytes]) -> bool:
    data = [line.rstrip(b"\r\n")[5:] for line in event if line.startswith(b"data:")]
    try:
        document = json.loads(b"\n".join(data))
    except ValueError:
        return False
    return isinstance(document, dict) and document.get("choices") == [] and isinstance(document.get("usage"), dict)


CONTENT = {"id": "c", "choices": [{"index": 0, "delta": {"content": 'say "usage":{"x":1} \\ naïve 🙂'}}], "usage": None}
USAGE = {"id": "c", "model": "m", "choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}
DATA = [
    json.dumps(CONTENT),
    json.dumps(CONTENT, ensure_ascii=False, separators=(",", ":")),
    json.dumps(USAGE),
    json.dumps(USAGE, separators=(",", ":")),
    json.dumps({**USAGE, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
    '{"choices" : [ ] , "usage" : {} }',
    '{"choices":[],"usage":null}',
    '{"choices":[],"prompt_filter_results":[{"usage":{"a":1}}]}',
    '{"usage":{"prompt_tokens":1},"error":{"choices":[]}}',
    "[DONE]",
    "",
    "plain text",
    "{",
]
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


@st.composite
def blocks(draw: st.DrawFn) -> bytes:
    """One event, or what may stand between events."""
    end = draw(ENDS)
    lines = draw(
        st.lists(st.sampled_from([": keep-alive", ":", "event: usage", "id: 7", "retry: 3", "odd"]), max_size=3)
    )
    if draw(st.booleans()):
        lines += [f"data:{draw(st.sampled_from(['', ' ', '  ']))}{line}" for line in draw(_data_lines())]
        lines += draw(st.lists(st.sampled_from([": inside", "id: 8"]), max_size=1))
    return (end.join([*lines, ""]) + end).encode()


@st.composite
def _data_lines(draw: st.DrawFn) -> list[str]:
    data = draw(st.sampled_from(DATA))
    if not draw(st.booleans()):
        return [data]
    place = data.find(",", draw(st.integers(0, len(data))))
    return [data[: place + 1], data[place + 1 :]] if place > 0 and '": ' in data[: place + 1] else [data]


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    text = b"".join(draw(st.lists(blocks(), max_size=6)))
    return text[: len(text) - draw(st.integers(0, 3))] if draw(st.booleans()) else text


@settings(max_examples=600, deadline=None)
@given(streams(), st.lists(st.integers(0, 1500), max_size=12))
@example(b"data: x\r\r\n" + b'data: {"choices":[],"usage":{}}\r\n\r\n', [9])
def test_all_but_the_usage_event_passes_however_the_stream_is_cut(text: bytes, places: list[int]) -> None:
    answered = stream(cut(text, *places), hide=True)
    assert answered.body == without_usage(text)


@settings(max_examples=300, deadline=None)
@given(streams(), st.lists(st.integers(0, 1500), max_size=12))
def test_what_is_noted_does_not_depend_on_how_the_stream_is_cut(text: bytes, places: list[int]) -> None:
    whole = stream([text])
    assert stream(cut(text, *places)).noted() == whole.noted()
    assert stream(cut(text, *places), hide=True).noted() == whole.noted()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=8))
def test_a_stream_whose_usage_the_client_asked_for_is_not_touched(text: bytes, places: list[int]) -> None:
    chunks = cut(text, *places)
    assert stream(chunks).chunks == chunks


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_usage_event_goes_at_every_split(end: str) -> None:
    events = [sse(json.dumps(it), comment="hi", end=end) for it in (CONTENT, USAGE)] + [sse("[DONE]", end=end)]
    text, expected = b"".join(events), b"".join((events[0], b": hi" + end.encode(), events[2]))
    assert stream([bytes([byte]) for byte in text], hide=True).body == expected
    for place in range(len(text) + 1):
        assert stream(cut(text, place), hide=True).body == expected
        for second in range(place, min(place + 4, len(text))):
            assert stream(cut(text, place, second), hide=True).body == expected


def test_events_leave_as_soon_as_they_can_not_be_the_usage_event() -> None:
    text = sse(json.dumps(CONTENT))
    begun = text.index(b'"index"') + 3
    answered = stream([b": ping\n", text[:begun], text[begun:], b"data: [", b"DONE]\n\n"], hide=True)
    assert answered.chunks == [b": ping\n", text[:begun], text[begun:], b"data: [", b"DONE]\n\n"]


@pytest.mark.parametrize("size", [20_000, 1_200_000])
@pytest.mark.parametrize("piece", [4096, 10_000_000])
def test_a_large_event_passes_whole(size: int, piece: int) -> None:
    text = sse(json.dumps({"choices": [], "text": "x" * size})) + sse("[DONE]")
    answered = stream([text[at : at + piece] for at in range(0, len(text), piece)], hide=True)
    assert answered.body == text


def test_a_hidden_event_takes_the_declared_length_with_it() -> None:
    chunks = [sse(json.dumps(CONTENT)), sse(json.dumps(USAGE)), sse("[DONE]")]
    headers = {"content-length": str(len(b"".join(chunks)))}
    assert "content-length" not in stream(chunks, headers, hide=True).headers
    assert stream(chunks, headers).headers["content-length"] == headers["content-length"]


def test_a_compressed_stream_is_not_read() -> None:
    text = sse(json.dumps(USAGE))
    assert stream([text], {"content-encoding": "gzip"}, hide=True).body == text


SPENT = Usage(50, 40, cached_tokens=20, cache_write_tokens=10, reasoning_tokens=5)


def spent(path: str, **more: Any) -> tuple[bytes, ...]:
    body = json.dumps({"model": "m-1", "stream": True, **more}).encode()
    return default_answer("POST", path, "", body, usage=SPENT, model="m-1-2026").chunks


@pytest.mark.parametrize("piece", [1, 7, 100_000])
@pytest.mark.parametrize(
    ("path", "dialect", "apart"),
    [
        ("/v1/chat/completions", "openai", {"cache_write_tokens": 0}),
        ("/v1/completions", "openai", {"cache_write_tokens": 0}),
        ("/v1/responses", "openai", {}),
        ("/v1/messages", "anthropic", {"reasoning_tokens": None}),
    ],
)
def test_usage_is_noted_apart_and_exactly(path: str, dialect: str, apart: dict[str, Any], piece: int) -> None:
    text = b"".join(spent(path, stream_options={"include_usage": True}))
    answered = stream([text[at : at + piece] for at in range(0, len(text), piece)], dialect=dialect)
    expected = {
        "input_tokens": 50,
        "output_tokens": 40,
        "cached_tokens": 20,
        "cache_write_tokens": 10,
        "reasoning_tokens": 5,
        "model": "m-1-2026",
        "whole": True,
        **apart,
    }
    assert answered.noted() == {name: value for name, value in expected.items() if value is not None}


@pytest.mark.parametrize(
    ("path", "dialect", "last"), [("/v1/chat/completions", "openai", 2), ("/v1/messages", "anthropic", 2)]
)
def test_usage_is_whole_only_once_the_last_word_is_heard(path: str, dialect: str, last: int) -> None:
    chunks = spent(path, stream_options={"include_usage": True})
    assert "whole" not in stream(chunks[:-last], dialect=dialect).noted()
    assert stream(chunks[: 1 - last], dialect=dialect).noted()["whole"] is True


def test_what_a_message_start_says_is_noted_and_not_whole() -> None:
    assert stream(spent("/v1/messages")[:3], dialect="anthropic").noted() == {
        "input_tokens": 50,
        "output_tokens": 1,
        "cached_tokens": 20,
        "cache_write_tokens": 10,
        "model": "m-1-2026",
    }


def test_usage_in_every_chunk_is_whole_only_at_done() -> None:
    counted = [{**CONTENT, "usage": {"prompt_tokens": 11, "completion_tokens": number}} for number in (1, 2, 3)]
    chunks = [sse(json.dumps(chunk)) for chunk in counted]
    assert stream(chunks[:2]).noted() == {
        "input_tokens": 11,
        "output_tokens": 2,
        "cached_tokens": 0,
        "cache_write_tokens": 0,
    }
    quoted = sse(json.dumps({"choices": [{"delta": {"content": "\ndata: [DONE]\n"}}]}))
    assert "whole" not in stream([*chunks, quoted]).noted()
    answered = stream([*chunks, sse("[DONE]")], hide=True)
    assert answered.noted() == {
        "input_tokens": 11,
        "output_tokens": 3,
        "cached_tokens": 0,
        "cache_write_tokens": 0,
        "whole": True,
    }
    assert answered.body == b"".join((*chunks, sse("[DONE]")))


def test_what_a_client_put_into_its_tools_is_not_taken_for_usage() -> None:
    tool = {"parameters": {"usage": {"input_tokens": 0, "output_tokens": 0}, "type": "response.created"}}
    response = {"tools": [tool], "text": '"usage":{"input_tokens":1}', "usage": {"input_tokens": 9, "output_tokens": 4}}
    event = sse(json.dumps({"type": "response.completed", "response": {**response, "model": "m"}}))
    noted = stream([event]).noted()
    assert (noted["input_tokens"], noted["output_tokens"], noted["whole"]) == (9, 4, True)
    unpaid = sse(json.dumps({"type": "response.output_item.done", "item": {"usage": {"input_tokens": 1}}}))
    assert stream([unpaid]).noted() == {}


def failed(*attempts: tuple[str, str | None, str | None], status: int = 503, **decision: Any) -> Answered:
    made: dict[str, Any] = {"n": len(attempts)}
    for number, (provider, answer, retry_after) in enumerate(attempts, 1):
        made[f"p{number}"] = provider
        made |= {f"s{number}": answer} if answer else {}
        made |= {f"r{number}": retry_after} if retry_after else {}
    return Answered(status, decision, [b"the provider's own words"], attempts=made)


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize(
    ("status", "attempts", "code", "message"),
    [
        (
            503,
            (("a", "500", None), ("b", None, None)),
            "all_targets_failed",
            "Every provider failed: a (500), b (no answer).",
        ),
        (429, (("a", "429", None),), "rate_limited", "Every provider is rate limited: a (429)."),
        (
            429,
            (("a", "500", None), ("b", "429", None)),
            "all_targets_failed",
            "Every provider failed: a (500), b (429).",
        ),
        (
            401,
            (("a", "500", None), ("b", "401", None)),
            "provider_auth",
            "The provider b refused the gateway's credential.",
        ),
        (503, (), "gateway_unavailable", "The gateway could not reach a provider."),
    ],
)
def test_a_failure_reads_as_python_would_word_it(
    status: int, attempts: Any, code: str, message: str, dialect: Dialect
) -> None:
    answered = failed(*attempts, status=status, dialect=dialect.value)
    refusal = Refusal(Code(code), message)
    noted = answered.noted("extproc.attempts")
    assert json.loads(noted["answer"]) == error_document(refusal, dialect, "id-1")
    assert (noted["code"], answered.headers[":status"]) == (code, str(refusal.status))
    assert answered.headers["x-extproc-mended"] == "now"


@pytest.mark.parametrize(
    ("first", "second", "wait"),
    [
        ("30", "7", "7"),
        ("0.2", None, "1"),
        ("0", "5", "0"),
        (None, "12", "12"),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None, None),
        ("-1", "nan", None),
        ("inf", "1e999", None),
        ("99999999999999999999", "60", "60"),
        ("0x10", " 3", None),
    ],
)
def test_the_shortest_wait_is_told_in_whole_seconds(first: str | None, second: str | None, wait: str | None) -> None:
    answered = failed(("a", "429", first), ("b", "429", second), status=429)
    assert answered.noted("extproc.attempts").get("wait") == wait
    assert answered.headers["x-extproc-mended"] == ("now" if wait is None else "wait")


def test_odd_names_do_not_break_the_json() -> None:
    answered = failed(('a"b\\c\n', "500", None), ("naïve 🙂", "500", None))
    document = json.loads(answered.noted("extproc.attempts")["answer"])
    assert 'a"b\\c\n (500), naïve 🙂 (500)' in document["error"]["message"]


@pytest.mark.parametrize("status", [200, 204, 302, 400, 404, 409, 413, 422])
def test_an_answer_that_needs_no_mending_is_left_alone(status: int) -> None:
    answered = Answered(status, {"stream": False}, [b"body"], attempts={"n": 1, "p1": "a", "s1": str(status)})
    assert answered.body == b"body"
    assert answered.headers == {":status": str(status), "content-type": "text/event-stream"}
