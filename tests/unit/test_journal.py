"""The journal: lines as Envoy writes them become the values of the access log, and its folders are kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.catalog import Usage
from extproc.decision import Decision
from extproc.errors import Dialect
from extproc.record.finished import AttemptMade, Ending
from extproc.record.journal import FORMAT, Entry, finished_of, read_journal
from extproc.server.journals import LARGEST_BYTES, Journals, files_in

DECISION = Decision(
    dialect=Dialect.OPENAI, endpoint="chat", request_id="r-1", path="/v1/chat/completions", stream=True, team="t"
)


def line(**changes: Any) -> bytes:
    """A line as Envoy 1.40 was seen to write it: numbers of CEL as text, null for what is not there."""
    fields: dict[str, Any] = {
        "id": None,
        "told_id": "r-1",
        "at": "2026-11-24T08:43:52.497Z",
        "status": 200,
        "details": "via_upstream",
        "decision": DECISION.to_metadata()["decision"],
        "attempts": {"n": 2, "p1": "a", "s1": "503", "r1": "3", "p2": "b", "s2": "200"},
        "noted": None,
        "model": "m-1",
        "whole": "1",
        "input_tokens": "11",
        "output_tokens": "5",
        "cached_tokens": "3",
        "cache_write_tokens": None,
        "reasoning_tokens": "2",
        "sent_ms": "4",
        "first_byte_ms": "12",
        "duration_ms": 47,
        "request_bytes": 90,
        "response_bytes": 584,
    }
    return json.dumps({**fields, **changes}).encode() + b"\n"


def test_a_whole_request_is_read_as_the_access_log_tells_it() -> None:
    found = finished_of(line())
    assert found is not None
    assert found.decision == DECISION
    assert (found.request_id, found.status, found.ending) == ("r-1", 200, Ending.WHOLE)
    assert found.attempts == (AttemptMade("a", 503, 3.0), AttemptMade("b", 200))
    assert found.usage == Usage(input_tokens=11, output_tokens=5, cached_tokens=3, reasoning_tokens=2)
    assert (found.usage_whole, found.model_returned, found.sent_upstream) == (True, "m-1", True)
    assert (found.first_byte_s, found.duration_s) == (0.012, 0.047)
    assert (found.request_bytes, found.response_bytes) == (90, 584)


def test_what_lua_noted_holds_where_the_stream_had_no_clean_end() -> None:
    noted = {"input_tokens": 7, "output_tokens": 4, "whole": True, "model": "m-2"}
    cut = line(input_tokens=None, output_tokens=None, whole=None, noted=noted, details="downstream_remote_disconnect")
    found = finished_of(cut)
    assert found is not None
    assert (found.usage, found.usage_whole, found.model_returned) == (Usage(7, 4), True, "m-2")
    assert found.ending is Ending.CLIENT_LEFT


def test_a_request_that_envoy_refused_is_known_by_the_id_that_the_client_was_told() -> None:
    found = finished_of(line(decision=None, attempts=None, status=413, details="request_payload_too_large"))
    assert found is not None
    assert (found.request_id, found.decision, found.attempts) == ("r-1", None, ())


@pytest.mark.parametrize(
    "broken",
    [b"", b"\n", b"{", line()[:-9], line(decision=None, told_id=None), line(decision="{}"), line(status=None)],
)
def test_lines_that_say_too_little_are_passed_over(broken: bytes) -> None:
    assert finished_of(broken) is None


@given(st.binary(max_size=200))
def test_no_bytes_make_reading_fail(noise: bytes) -> None:
    assert finished_of(noise) is None


def test_a_journal_whose_writer_died_in_a_line_is_read_up_to_there(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_bytes(line() + line(told_id="r-2", decision=None) + line()[:30])
    assert [found.request_id for found in read_journal(tmp_path / "j.jsonl")] == ["r-1", "r-2"]


def test_every_field_that_envoy_is_asked_for_is_read() -> None:
    assert set(FORMAT) == set(Entry.__struct_fields__)


# Its folders


def test_a_journal_in_use_is_not_left_behind_and_one_of_a_crash_is(tmp_path: Path) -> None:
    crashed = Journals(tmp_path)
    Path(crashed.file).write_bytes(line())
    running = Journals(tmp_path)
    assert running.left_behind() == []
    crashed.let_go()
    (folder,) = running.left_behind()
    assert files_in(folder) == [Path(crashed.file)]


def test_a_settled_journal_leaves_nothing(tmp_path: Path) -> None:
    journals = Journals(tmp_path)
    Path(journals.file).write_bytes(line())
    journals.close()
    assert list(tmp_path.iterdir()) == []


def test_only_its_owner_can_look_into_a_journal(tmp_path: Path) -> None:
    journals = Journals(tmp_path)
    folder = Path(journals.file).parent
    assert [path.stat().st_mode & 0o077 for path in (folder, folder.parent, folder / "lock")] == [0, 0, 0]


def test_a_journal_that_has_grown_too_large_is_put_aside(tmp_path: Path) -> None:
    journals = Journals(tmp_path)
    assert journals.put_aside() is None
    current = Path(journals.file)
    current.write_bytes(line())
    assert journals.put_aside() is None
    with current.open("r+b") as file:
        file.truncate(LARGEST_BYTES)
    aside = journals.put_aside()
    assert aside is not None
    assert not current.exists()
    assert files_in(current.parent) == [aside]
    current.write_bytes(line())
    journals.remove_aside()
    assert files_in(current.parent) == [current]
