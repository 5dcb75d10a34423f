"""The screen: plain lines without a terminal, colours with one, and nothing that a client could do to either."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from extproc.config.snapshot import Snapshot
from extproc.config.source import format_problems, parse
from extproc.server.screen import QUICKSTART_KEY, Screen
from extproc.server.watch import Passed

ROOT = Path(__file__).parents[2]
SERVED = Passed(
    request_id="id-1",
    status=200,
    outcome="ok",
    duration_ms=1234.4,
    team="search",
    key_id="ci",
    endpoint="chat",
    alias="smart",
    provider="east",
    model="big-1",
    input_tokens=11,
    output_tokens=7,
    cost_nusd=92_000,
    attempts=1,
)


def plain() -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(Console(file=out)), out


def terminal(clock: Iterator[float] | None = None) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=100)
    return (Screen(console) if clock is None else Screen(console, clock.__next__)), out


def compiled(text: str) -> Snapshot:
    found = parse(text.encode(), path=Path("/etc/gateway.yaml"), environ={}, require_secrets=False)
    assert isinstance(found, Snapshot), format_problems(found)
    return found


def test_without_a_terminal_each_request_is_one_plain_line() -> None:
    screen, out = plain()
    screen.passed(SERVED)
    assert out.getvalue() == (
        "id-1 200 ok  chat          smart -> east/big-1  search/ci  1234 ms  11 in, 7 out  0.000092 USD\n"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"estimated": True, "outcome": "client_left"}, "~11 in, ~7 out"),
        ({"outcome": "client_left"}, "client_left"),
        ({"unpriced": True, "cost_nusd": None}, "unpriced"),
        ({"attempts": 3}, "3 attempts"),
        ({"status": 503, "outcome": "failed", "code": "all_targets_failed"}, "503 failed"),
        ({"status": 404, "outcome": "refused", "provider": None, "code": "model_not_found"}, "model_not_found"),
    ],
)
def test_a_line_says_what_was_out_of_the_ordinary(change: dict[str, object], words: str) -> None:
    screen, out = plain()
    screen.passed(Passed(**{**{name: getattr(SERVED, name) for name in SERVED.__struct_fields__}, **change}))
    assert words in out.getvalue()
    assert "3 attempts" in words or "attempts" not in out.getvalue()


def test_on_a_terminal_the_status_is_coloured() -> None:
    screen, out = terminal()
    screen.passed(SERVED)
    assert "\x1b[32m200\x1b[0m" in out.getvalue()
    assert "smart -> east/big-1" in out.getvalue()


HOSTILE = (
    "[bold red]x[/]",
    "[/]",
    "[link=http://evil.example]x[/link]",
    "\\[bold]\\",
    ":boom:",
    "\x1b[2J\x1b]0;title\x07",
    "a\rb\nc",
    "\u202egnp.exe",
)


@pytest.mark.parametrize("alias", HOSTILE)
def test_a_clients_words_are_shown_as_they_are_and_control_nothing(alias: str) -> None:
    shown = "".join(char if char.isprintable() else "?" for char in alias)
    refused = Passed(
        request_id="id-1", status=404, outcome="refused", duration_ms=1, alias=alias, code="model_not_found"
    )
    for screen, out in (plain(), terminal()):
        screen.passed(refused)
        text = out.getvalue().replace("\x1b[33m404\x1b[0m", "404")
        assert shown in text
        assert text.count("\n") == 1
        assert "\x1b" not in text


@given(st.text())
def test_no_text_makes_the_screen_fail_or_print_a_second_line(text: str) -> None:
    for screen, out in (plain(), terminal()):
        screen.passed(
            Passed(request_id=text, status=200, outcome="ok", duration_ms=1, alias=text, provider=text, model=text)
        )
        assert out.getvalue().endswith("\n")
        assert len(out.getvalue().splitlines()) == 1


def test_what_to_type_next_can_be_copied_from_a_terminal_of_any_width() -> None:
    quickstart = ROOT / "deploy" / "quickstart" / "gateway.yaml"
    snapshot = parse(quickstart.read_bytes(), path=quickstart, environ={}, require_secrets=True)
    assert isinstance(snapshot, Snapshot)
    (bare, expected), narrow = plain(), io.StringIO()
    bare.welcome(snapshot)
    Screen(Console(file=narrow, force_terminal=True, color_system="standard", width=40)).welcome(snapshot)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", narrow.getvalue())
    assert shown == expected.getvalue()


def test_an_output_that_can_not_show_a_letter_shows_another() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", write_through=True) as out:
        Screen(Console(file=out)).passed(
            Passed(request_id="id", status=200, outcome="ok", duration_ms=1, alias="naïve 🙂")
        )
        assert b"na?ve ?" in raw.getvalue()


class Closed(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("is_terminal", [False, True])
def test_it_falls_silent_when_nobody_reads_and_does_not_fail(
    is_terminal: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Console, "on_broken_pipe", _as_rich_does_without_touching_this_process)
    screen = Screen(Console(file=Closed(), force_terminal=is_terminal))
    for _ in range(3):
        screen.passed(SERVED)
    assert [record.message for record in caplog.records] == [
        "nobody reads standard output any more; the gateway goes on without it"
    ]


def _as_rich_does_without_touching_this_process(console: Console) -> None:
    console.quiet = True
    raise SystemExit(1)


def test_a_terminal_shows_no_more_lines_than_a_person_can_follow() -> None:
    clock = iter([0.0] * 100 + [1.0] * 2)
    screen, out = terminal(clock)
    for _ in range(102):
        screen.passed(SERVED)
    lines = out.getvalue().splitlines()
    assert len(lines) == 40 + 1 + 2
    assert lines[40] == "... and 60 more"


def test_a_log_shows_every_line() -> None:
    screen, out = plain()
    for _ in range(200):
        screen.passed(SERVED)
    assert len(out.getvalue().splitlines()) == 200


def test_the_welcome_says_what_to_type_next_for_each_dialect() -> None:
    quickstart = compiled((ROOT / "deploy" / "quickstart" / "gateway.yaml").read_text())
    for screen, out in (plain(), terminal()):
        screen.welcome(quickstart)
        text = out.getvalue()
        assert "http://127.0.0.1:10000" in text
        for title in ("curl", "OpenAI SDK", "Anthropic SDK"):
            assert title in text
        assert QUICKSTART_KEY in text
        assert "http://127.0.0.1:10001/readyz" in text


def test_the_examples_that_the_welcome_prints_are_programs() -> None:
    screen, out = plain()
    screen.welcome(compiled((ROOT / "deploy" / "quickstart" / "gateway.yaml").read_text()))
    sections = out.getvalue().split("\n# ")[1:]
    programs = [section.partition("\n")[2].partition("\n\nRequests")[0] for section in sections if "import" in section]
    assert len(programs) == 2
    for program in programs:
        compile(program, "<welcome>", "exec")


OTHERS = """
listen: {{address: "{address}", port: 8080}}
providers: {{east: {{kind: openai, endpoint: "http://127.0.0.1:1/v1"}}}}
models: {models}
"""


@pytest.mark.parametrize(("address", "base"), [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("fd00::1", "[fd00::1]")])
def test_the_welcome_shows_an_address_that_a_client_can_use(address: str, base: str) -> None:
    screen, out = plain()
    screen.welcome(compiled(OTHERS.format(address=address, models="{m: {targets: [{provider: east}]}}")))
    assert f"extproc serves http://{base}:8080" in out.getvalue()
    assert "YOUR_KEY" in out.getvalue()
    assert "Anthropic SDK" not in out.getvalue()


def test_the_welcome_of_globs_alone_and_of_many_models_stays_readable() -> None:
    screen, out = plain()
    screen.welcome(compiled(OTHERS.format(address="127.0.0.1", models='{"g-*": {targets: [{provider: east}]}}')))
    assert 'model="YOUR_MODEL"' in out.getvalue()
    many = ", ".join(f"m{number}: {{targets: [{{provider: east}}]}}" for number in range(500))
    screen, out = plain()
    screen.welcome(compiled(OTHERS.format(address="127.0.0.1", models=f"{{{many}}}")))
    assert "and 480 more" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) < 1000
