"""The commands that start nothing: what they print, where, and with which exit code."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from extproc.cli import app
from extproc.config.schema import json_schema

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "deploy" / "quickstart" / "gateway.yaml"
SECRET = "sk-live-4f1c"
KEY = "sk-of-a-person"
GOOD: dict[str, Any] = {
    "providers": {"acme": {"kind": "openai", "api_key": {"env": "ACME_KEY"}}, "demo": {"kind": "demo"}},
    "models": {"m": {"targets": [{"provider": "acme"}]}, "demo-*": {"targets": [{"provider": "demo"}]}},
    "teams": {"all": {"models": ["*"], "keys": [{"id": "one", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}},
}


def extproc(*arguments: str, environ: dict[str, str] | None = None, stdin: str | None = None) -> Result:
    """One command, in this process. An error that it does not turn into words is raised here."""
    result = CliRunner().invoke(app, arguments, input=stdin, env={"ACME_KEY": SECRET, **(environ or {})})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def good(tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "gateway.yaml"
    file.write_text(json.dumps(GOOD))
    yield str(file)


def test_check_says_of_a_good_file_what_is_in_it(good: str) -> None:
    result = extproc("check", good)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "2 providers, 2 models, 1 keys" in result.stdout


def test_check_prints_every_mistake_with_its_line_and_how_to_mend_it(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(
        "listen: {prot: 10000}\n"
        "providers:\n"
        "  acme: {kind: openai, endpoint: 'ftp://host/v1', api_key: {env: NOT_SET_ANYWHERE}}\n"
        "models:\n"
        "  m: {targets: [{provider: acmee}]}\n"
    )
    result = extproc("check", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    mistakes = result.stderr.split(str(file))[1:]
    expected = [(":1:", "`port`"), (":3:", "http or https"), (":3:", "NOT_SET_ANYWHERE"), (":5:", "`acme`")]
    assert len(mistakes) == len(expected)
    for mistake, (line, words) in zip(mistakes, expected, strict=True):
        assert mistake.startswith(line)
        assert words in mistake
        assert "fix: " in mistake


def test_check_wants_the_secrets_that_run_would_want_and_never_prints_one(good: str) -> None:
    missing = extproc("check", good, environ={"ACME_KEY": ""})
    assert missing.exit_code == 1
    assert "ACME_KEY" in missing.stderr
    broken = extproc("check", good, environ={"ACME_KEY": f"{SECRET}\nx"})
    assert broken.exit_code == 1
    assert SECRET not in broken.stderr + broken.stdout


def test_the_quickstart_is_good_with_and_without_keys() -> None:
    none = {"OPENAI_API_KEY": "", "ANTHROPIC_API_KEY": ""}
    assert "1 providers" in extproc("check", str(QUICKSTART), environ=none).stdout
    both = dict.fromkeys(none, SECRET)
    assert "3 providers" in extproc("check", str(QUICKSTART), environ=both).stdout


def test_render_prints_envoys_configuration_without_needing_or_showing_a_secret(good: str) -> None:
    result = extproc("render", good, "--run-dir", "/run/elsewhere", "--workers", "2", "--ca-bundle", "/etc/ca.pem")
    assert result.exit_code == 0
    assert SECRET not in result.stdout
    names = [cluster["name"] for cluster in json.loads(result.stdout)["static_resources"]["clusters"]]
    assert names[-4:] == ["acme", "acme/adapt", "demo", "demo/adapt"]
    for path in ("/run/elsewhere/worker-1.sock", "/run/elsewhere/secrets/acme.json", "/etc/ca.pem"):
        assert path in result.stdout
    assert extproc("render", good, environ={"ACME_KEY": ""}).stdout == extproc("render", good).stdout


def test_schema_prints_what_the_docs_publish() -> None:
    printed = extproc("schema").stdout
    assert printed == (ROOT / "docs" / "gateway.schema.json").read_text()
    assert json.loads(printed) == json_schema()


def test_keys_hash_prints_what_the_file_holds_for_a_key() -> None:
    expected = hashlib.sha256(KEY.encode()).hexdigest() + "\n"
    assert extproc("keys", "hash", KEY).stdout == expected
    for ending in ("", "\n", "\r\n"):
        assert extproc("keys", "hash", stdin=KEY + ending).stdout == expected
    assert extproc("keys", "hash", stdin=f"  {KEY}\n").stdout != expected  # a space is part of a key


def test_keys_hash_of_nothing_is_a_mistake() -> None:
    result = extproc("keys", "hash", stdin="\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no key" in result.stderr


@pytest.mark.parametrize("command", ["run", "check", "render", "spend"])
def test_a_file_that_is_not_there_is_a_mistake_like_any_other(command: str, tmp_path: Path) -> None:
    result = extproc(command, str(tmp_path / "nowhere.yaml"))
    assert result.exit_code == 1
    assert "No such file" in result.stderr


def test_spend_of_a_ledger_that_nothing_was_written_to_shows_nothing_and_fails_not(good: str) -> None:
    result = extproc("spend", good, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["lines"] == []


def test_run_is_the_program_that_python_m_extproc_starts(good: str) -> None:
    """`run` refuses what `check` refuses, with the same words, before it starts anything."""
    command = [sys.executable, "-m", "extproc", "run", good]
    ended = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin"}, timeout=60, check=False)
    assert ended.returncode == 1
    assert (
        extproc("check", good, environ={"ACME_KEY": ""}).stderr.strip().replace("is empty", "is not set")
        in ended.stderr
    )
    assert "Traceback" not in ended.stderr
