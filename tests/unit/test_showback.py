"""Who spent what: any grouping adds up to the same total, and no rendering hides a cost or runs a client's text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from extproc.catalog import Usage
from extproc.record.ledger import LedgerRow, Outcome
from extproc.stores.showback import (
    DIMENSIONS,
    SpendLine,
    parse_by,
    parse_since,
    render_csv,
    render_json,
    render_table,
    spend,
    total,
    usd,
)
from extproc.stores.sql import LEDGER, SqlLedger, open_ledger
from tests.ledger_rows import make_row

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlLedger]:
    sqlite = request.param == "sqlite"
    opened = open_ledger("sqlite:///l.db" if sqlite else request.getfixturevalue("fresh_postgres_url"), tmp_path)
    yield opened
    opened.close()


ROWS = [
    make_row("1", team="search", alias="smart", provider="openai", model_asked="gpt-5.1", endpoint="chat", key_id="k1",
             usage=Usage(1000, 100, 400, 50, 20), cost_nusd=2_000_000, price_source="genai-prices", started_at=NOON),
    make_row("2", team="search", alias="smart", provider="vllm", model_asked="llama", endpoint="chat", key_id="k1",
             usage=Usage(10, 1), price_source="unpriced", started_at=NOON),
    make_row("3", team="ads", alias="fast", provider="openai", model_asked="gpt-5-mini", endpoint="responses",
             usage=Usage(500, 50), cost_nusd=3_000, price_source="genai-prices", estimated=True, user="ada",
             outcome=Outcome.CLIENT_LEFT, started_at=NOON - timedelta(days=1)),
    make_row("4", team="ads", alias="smart", status=403, code="model_not_allowed", outcome=Outcome.REFUSED, attempts=0,
             started_at=NOON),
    make_row("5", status=401, code="invalid_api_key", outcome=Outcome.REFUSED, attempts=0, started_at=NOON),
    make_row("6", team="ads", alias="fast", provider="openai", status=503, outcome=Outcome.FAILED,
             started_at=NOON - timedelta(days=30)),
]  # fmt: skip


def test_the_total_counts_tokens_money_and_refusals_each_by_itself(ledger: SqlLedger) -> None:
    ledger.write(ROWS)
    assert spend(ledger, by=()) == [
        SpendLine((), 4, 2, 1510, 151, 400, 50, 20, 2_003_000, 1, 3_000, 1),
    ]


def test_an_empty_ledger_has_nothing_to_show(ledger: SqlLedger) -> None:
    assert spend(ledger, by=("team",)) == []
    assert spend(ledger, by=()) == [SpendLine(())]


def test_refused_requests_are_no_model_calls(ledger: SqlLedger) -> None:
    ledger.write(ROWS)
    by_outcome = {line.keys[0]: (line.requests, line.refused) for line in spend(ledger, by=("outcome",))}
    assert by_outcome == {"ok": (2, 0), "client_left": (1, 0), "failed": (1, 0), "refused": (0, 2)}


def test_the_dearest_group_comes_first_and_unknown_values_are_a_group(ledger: SqlLedger) -> None:
    ledger.write(ROWS)
    assert [line.keys for line in spend(ledger, by=("team",))] == [("search",), ("ads",), (None,)]


def test_since_is_inclusive_and_until_is_not(ledger: SqlLedger) -> None:
    ledger.write(ROWS)
    day = timedelta(days=1)
    assert total(spend(ledger, by=("team",), since=NOON - day)).requests == 3
    assert total(spend(ledger, by=("team",), since=NOON - day, until=NOON)).requests == 1
    elsewhere = NOON.astimezone(timezone(timedelta(hours=9)))
    assert total(spend(ledger, by=("team",), since=elsewhere)).requests == 2


def test_days_are_utc_days_in_their_order(ledger: SqlLedger) -> None:
    tokyo = timezone(timedelta(hours=9))
    ledger.write(
        [
            make_row("1", started_at=datetime(2026, 11, 24, 8, 59, 59, 999_999, tokyo), cost_nusd=9),
            make_row("2", started_at=datetime(2026, 11, 24, 9, 0, 0, 0, tokyo), cost_nusd=1),
        ]
    )
    lines = spend(ledger, by=("day",))
    assert [(line.keys[0], line.cost_nusd) for line in lines] == [("2026-11-23", 9), ("2026-11-24", 1)]


def test_every_dimension_groups_by_what_it_says(ledger: SqlLedger) -> None:
    ledger.write([make_row("1", team="t", project="p", user="u", agent="a", key_id="k", alias="al", provider="pr",
                           model_asked="m", model_returned="m2", endpoint="chat", started_at=NOON)])  # fmt: skip
    (line,) = spend(ledger, by=tuple(DIMENSIONS))
    assert dict(zip(DIMENSIONS, line.keys, strict=True)) == {
        "team": "t", "project": "p", "user": "u", "agent": "a", "key": "k", "alias": "al", "provider": "pr",
        "model": "m", "endpoint": "chat", "day": "2026-11-24", "status": "200", "outcome": "ok",
    }  # fmt: skip


names = st.sampled_from([None, "", "a", "A", "=cmd", "b\u00e9", "a,b"])
usages = st.none() | st.builds(Usage, st.integers(0, 10**12), st.integers(0, 10**12))
money = st.none() | st.integers(0, 10**13)
rows = st.builds(
    make_row, st.uuids().map(str), team=names, project=names, user=names, agent=names, key_id=names, alias=names,
    provider=names, model_asked=names, usage=usages, cost_nusd=money, estimated=st.booleans(),
    outcome=st.sampled_from(Outcome), price_source=st.sampled_from([None, "unpriced", "override"]),
    status=st.sampled_from([200, 429, 503]),
    started_at=st.datetimes(datetime(2026, 1, 1), datetime(2026, 1, 4), timezones=st.just(UTC)),
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored=st.lists(rows, max_size=30), data=st.data())
def test_any_grouping_adds_up_to_the_total(ledger: SqlLedger, stored: list[LedgerRow], data: st.DataObject) -> None:
    with ledger.engine.begin() as connection:
        connection.execute(LEDGER.delete())
    ledger.write(stored)
    (whole,) = spend(ledger, by=())
    assert whole.cost_nusd == sum(row.cost_nusd or 0 for row in stored)
    assert whole.input_tokens == sum(row.usage.input_tokens for row in stored if row.usage)
    for by in [(name,) for name in DIMENSIONS] + [data.draw(st.permutations(list(DIMENSIONS)))[:3]]:
        lines = spend(ledger, by=by)
        assert total(lines) == whole
        assert len({line.keys for line in lines}) == len(lines)


def test_an_unknown_or_repeated_dimension_is_refused_with_what_is_known(ledger: SqlLedger) -> None:
    with pytest.raises(ValueError, match="'teams'; known: team, project"):
        spend(ledger, by=("teams",))
    with pytest.raises(ValueError, match="twice"):
        parse_by("team,team")
    with pytest.raises(ValueError, match="''"):
        parse_by("team,")
    assert parse_by("team, model") == ("team", "model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7d", NOON - timedelta(days=7)),
        ("24h", NOON - timedelta(hours=24)),
        ("30m", NOON - timedelta(minutes=30)),
        (" 1d ", NOON - timedelta(days=1)),
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T08:00:00+09:00", datetime(2026, 10, 31, 23, tzinfo=UTC)),
        ("2026-11-01T08:00Z", datetime(2026, 11, 1, 8, tzinfo=UTC)),
    ],
)
def test_since_is_a_span_or_a_date(text: str, expected: datetime) -> None:
    found = parse_since(text, now=NOON)
    assert found == expected
    assert found.tzinfo is UTC


@pytest.mark.parametrize(
    "text", ["", "7", "d", "-7d", "7 d", "7w", "٧d", "999999999d", "tomorrow", "2026-13-01", "0001-01-01T00:00+09:00"]
)
def test_any_other_since_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="write 7d, 24h, 30m"):
        parse_since(text, now=NOON)


@given(st.integers(0, 10**18))
def test_usd_is_exact_and_plain(amount: int) -> None:
    assert Decimal(usd(amount)) * 10**9 == amount
    assert "E" not in usd(amount)


@pytest.mark.parametrize(
    ("amount", "decimals", "text"),
    [(1, 9, "0.000000001"), (5_000_000, 2, "0.01"), (4_999_999, 2, "0.00"), (1_999_999_999, 2, "2.00"), (0, 2, "0.00")],
)
def test_usd_rounds_half_up(amount: int, decimals: int, text: str) -> None:
    assert usd(amount, decimals) == text


LINES = [
    SpendLine(("search", "gpt-5.1"), 1_234_567, 0, 9_876_543_210, 1_234, 400, 0, 0, 123_456_789_012, 2, 1_000_000, 0),
    SpendLine(("ads", "a-very-long-model-name-2026-11-24-preview-experimental"), 3, 1, 10, 2, 0, 0, 0, 12_345, 0, 0, 1),
    SpendLine((None, "\x1b[31mred\x1b]0;title\x07[bold]x"), 0, 7),
]


def as_text(lines: list[SpendLine], by: tuple[str, ...], width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(render_table(lines, by=by, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_table_fits_the_terminal_and_ends_with_the_total(width: int) -> None:
    text = as_text(LINES, ("team", "model"), width)
    assert max(map(len, text.splitlines())) <= width
    for part in ("Total", "search", "gpt-5.1", "123.456789", "0.000012", "123.456801", "Refused", "Unpriced"):
        assert part in text
    assert "…" not in text
    assert ("9,876,543,220" in text) or ("9.9G" in text)


def test_a_wide_table_has_exact_token_counts_and_a_narrow_one_short_ones() -> None:
    assert "9,876,543,210" in as_text(LINES, ("team",), 200)
    assert "9.9G" in as_text(LINES, ("team", "model"), 80)


def test_a_client_cannot_steer_the_terminal_with_a_model_name() -> None:
    text = as_text(LINES, ("team", "model"), 200)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\\x1b[31mred" in text
    assert "[bold]x" in text


def test_a_small_cost_is_never_shown_as_zero() -> None:
    for exponent in range(12):
        text = as_text([SpendLine(("t",), 1, cost_nusd=3 * 10**exponent)], ("team",), 80)
        cost = next(word for word in text.splitlines()[1].split()[::-1] if "." in word)
        assert Decimal(cost) * 10**9 == 3 * 10**exponent


def test_the_table_says_what_is_estimated_and_what_has_no_price() -> None:
    text = as_text(LINES, ("team",), 120)
    assert "2 requests are charged by estimate, 0.001000 USD of the total." in text
    assert "1 request has no known price and is not in USD: add it to prices:" in text


def test_json_has_exact_money_and_the_total() -> None:
    document = json.loads(render_json(LINES, by=("team", "model"), since=NOON))
    assert document["by"] == ["team", "model"]
    assert document["since"] == "2026-11-24T12:00:00+00:00"
    assert document["until"] is None
    assert document["lines"][0]["team"] == "search"
    assert document["lines"][1]["cost_usd"] == "0.000012345"
    assert document["lines"][2]["team"] is None
    assert document["total"]["cost_nusd"] == sum(line.cost_nusd for line in LINES)


def test_csv_is_read_back_exactly_and_has_no_total_line() -> None:
    table = list(csv.DictReader(io.StringIO(render_csv(LINES, by=("team", "model")))))
    assert len(table) == len(LINES)
    assert sum(Decimal(line["cost_usd"]) for line in table) * 10**9 == sum(line.cost_nusd for line in LINES)
    assert table[0]["input_tokens"] == "9876543210"
    assert (table[2]["team"], table[2]["refused"]) == ("", "7")


@given(st.text("=+-@\t\r\n \x1ba1,\"'", max_size=6))
def test_no_text_in_csv_starts_as_a_formula_or_breaks_the_line(name: str) -> None:
    text = render_csv([SpendLine((name,), 1)], by=("alias",))
    (_, line) = csv.reader(io.StringIO(text, newline=""))
    assert line[0].lstrip()[:1] not in {"=", "+", "-", "@"}
    assert line[1] == "1"
    assert text.count("\n") == 2
    assert text.replace("\n", "").isprintable()
    if name.isprintable():
        assert line[0] in {name, f"'{name}"}
