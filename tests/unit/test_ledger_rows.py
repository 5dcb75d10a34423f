"""Rows that any database takes, whatever a provider or a client put into them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from extproc.catalog import Usage
from extproc.record.ledger import MAX_COST_NUSD, MAX_ID_CHARS, MAX_TEXT_CHARS, MAX_TOKENS, storable
from tests.ledger_rows import make_row


def test_an_ordinary_row_is_stored_as_it_is() -> None:
    row = make_row(team="search", model_returned="modèle-日本", usage=Usage(10, 5), cost_nusd=7)
    assert storable(row) is row


def test_two_long_request_ids_with_the_same_start_stay_two() -> None:
    first, second = (storable(make_row("x" * 10_000 + end)).request_id for end in "ab")
    assert first != second
    assert len(first) == len(second) == MAX_ID_CHARS
    assert storable(make_row("x" * 10_000 + "a")).request_id == first


def test_numbers_beyond_any_request_are_bounded() -> None:
    row = storable(make_row(usage=Usage(10**30, -1), cost_nusd=10**30, response_bytes=-1))
    assert row.usage == Usage(MAX_TOKENS, 0)
    assert row.cost_nusd == MAX_COST_NUSD
    assert row.response_bytes == 0


any_text = st.text(st.characters(exclude_categories=()), max_size=600)


@given(request_id=any_text, alias=any_text, model=any_text)
def test_every_storable_text_is_utf8_without_nul_and_short(request_id: str, alias: str, model: str) -> None:
    row = storable(make_row(request_id, alias=alias, model_returned=model))
    for text in (row.request_id, row.alias or "", row.model_returned or ""):
        assert "\0" not in text
        assert len(text.encode()) <= 4 * MAX_TEXT_CHARS
    assert storable(row) == row
