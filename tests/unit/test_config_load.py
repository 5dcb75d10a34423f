"""A good gateway.yaml becomes the right snapshot; no input makes loading raise or repeat a secret."""

from __future__ import annotations

import hashlib
import json
import time
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.config.globs import hides, meet
from extproc.config.schema import Gateway, json_schema
from extproc.config.secrets import SecretError, ledger_url, read_secret
from extproc.config.snapshot import Endpoint, SecretRef, Snapshot, Timeouts
from extproc.config.source import format_problems, load, parse

QUICKSTART = Path(__file__).parents[2] / "deploy" / "quickstart" / "gateway.yaml"
SECRET = "sk-live-0123456789abcdefSECRET"


def snapshot_of(text: str, environ: dict[str, str] | None = None, *, folder: Path = Path("/srv")) -> Snapshot:
    found = parse(text.encode(), path=folder / "gateway.yaml", environ=environ or {}, require_secrets=True)
    assert isinstance(found, Snapshot), format_problems(found)
    return found


FULL = """\
timeouts: {first_byte_s: 10}
state: {sql: "sqlite:///data/ledger.db"}
providers:
  one: {kind: openai, api_key: {env: ONE}, timeouts: {stream_idle_s: 20}, headers: {X-Team: "a: b"}}
  two: {kind: openai, endpoint: "HTTP://[::1]:8000/v1/", stream_usage: false}
  claude: {kind: anthropic, api_key: {env: TWO}, optional: true}
  demo: {kind: demo}
models:
  smart:
    timeouts: {first_byte_s: 1.5}
    targets:
    - {provider: two, priority: 1}
    - {provider: one, model: gpt-5.1, weight: 80}
    - {provider: claude, weight: 20}
  "gpt-*": {targets: [{provider: one}]}
  "*": {targets: [{provider: two}]}
  claude-x: {targets: [{provider: claude}]}
prices:
  "two/*": {input: 0.10, output: 3, cached_input: 0.025}
teams:
  search:
    models: [smart, "claude-*", "gpt-5"]
    default_provider: claude
    keys:
    - {id: ci, sha256: "@", project: p, user: u, agent: a, models: [smart]}
  other: {}
""".replace("@", hashlib.sha256(b"sk-ci").hexdigest())


def test_a_key_is_found_by_the_digest_of_the_whole_credential() -> None:
    snapshot = snapshot_of(FULL, {"ONE": "x"})
    key = snapshot.key_for("sk-ci")
    assert key is not None
    assert (key.principal.team, key.principal.project, key.principal.key_id) == ("search", "p", "ci")
    assert key.allows("smart")
    assert not key.allows("gpt-5")
    assert snapshot.key_for("sk-c") is None


def test_targets_stand_by_priority_then_in_the_files_order() -> None:
    smart = snapshot_of(FULL, {"ONE": "x", "TWO": "y"}).models["smart"]
    assert [(t.provider, t.model, t.weight) for t in smart.targets] == [
        ("one", "gpt-5.1", 80),
        ("claude", None, 20),
        ("two", None, 1),
    ]


def test_an_absent_optional_provider_takes_its_targets_and_models_along() -> None:
    snapshot = snapshot_of(FULL, {"ONE": "x"})
    assert "claude" not in snapshot.providers
    assert [t.provider for t in snapshot.models["smart"].targets] == ["one", "two"]
    assert "claude-x" not in snapshot.models
    assert snapshot.teams["search"].default_provider is None


def test_an_optional_provider_with_a_variable_left_empty_is_absent() -> None:
    assert "claude" not in snapshot_of(FULL, {"ONE": "x", "TWO": ""}).providers


def test_globs_are_kept_in_the_files_order_and_exact_names_win() -> None:
    snapshot = snapshot_of(FULL, {"ONE": "x", "TWO": "y"})
    served = {name: model.name for name in ("gpt-5", "smart", "zzz") if (model := snapshot.model_for(name))}
    assert served == {"gpt-5": "gpt-*", "smart": "smart", "zzz": "*"}


def test_timeouts_are_the_models_then_the_providers_then_the_global_ones() -> None:
    snapshot = snapshot_of(FULL, {"ONE": "x"})
    one = snapshot.providers["one"]
    assert one.timeouts == Timeouts(first_byte_s=10, stream_idle_s=20)
    assert snapshot.models["smart"].timeouts_at(one) == Timeouts(first_byte_s=1.5, stream_idle_s=20)
    assert snapshot.globs[0][1].timeouts_at(one) == one.timeouts


def test_endpoints_are_taken_apart_and_default_by_kind() -> None:
    providers = snapshot_of(FULL, {"ONE": "x", "TWO": "y"}).providers
    assert providers["one"].endpoint == Endpoint("https", "api.openai.com", 443, "/v1")
    assert providers["two"].endpoint == Endpoint("http", "::1", 8000, "/v1")
    assert providers["claude"].endpoint == Endpoint("https", "api.anthropic.com", 443, "")
    assert providers["demo"].endpoint is None
    assert providers["one"].headers == (("x-team", "a: b"),)
    assert providers["two"].secret is None


def test_prices_stay_exact_decimals() -> None:
    price = snapshot_of(FULL, {"ONE": "x"}).prices.overrides["two/*"]
    assert (price.input, price.output, price.cached_input) == (Decimal("0.10"), Decimal(3), Decimal("0.025"))
    assert price.cache_write is None


def test_a_relative_sqlite_path_is_from_the_files_folder() -> None:
    assert snapshot_of(FULL, {"ONE": "x"}).sql_url == "sqlite:////srv/data/ledger.db"


def test_a_postgresql_url_with_a_password_comes_from_a_variable_and_stays_out_of_the_snapshot() -> None:
    environ = {"ONE": "x", "LEDGER": "postgresql://me:pw-hidden@host/db"}
    snapshot = snapshot_of(FULL.replace('"sqlite:///data/ledger.db"', "{env: LEDGER}"), environ)
    assert "pw-hidden" not in repr(snapshot)
    assert ledger_url(snapshot, environ) == environ["LEDGER"]


def test_the_revision_is_that_of_the_bytes() -> None:
    environ = {"ONE": "x"}
    assert snapshot_of(FULL, environ).revision == snapshot_of(FULL, environ).revision
    assert snapshot_of(FULL, environ).revision != snapshot_of(FULL + "\n", environ).revision


@pytest.mark.parametrize(
    ("environ", "providers"),
    [
        ({}, {"demo"}),
        ({"OPENAI_API_KEY": "x"}, {"demo", "openai"}),
        ({"OPENAI_API_KEY": "x", "ANTHROPIC_API_KEY": "y"}, {"demo", "openai", "anthropic"}),
    ],
)
def test_the_quickstart_serves_what_the_environment_has_keys_for(environ: dict[str, str], providers: set[str]) -> None:
    snapshot = load(QUICKSTART, environ=environ, require_secrets=True)
    assert isinstance(snapshot, Snapshot)
    assert set(snapshot.providers) == providers
    key = snapshot.key_for("sk-extproc-quickstart")
    assert key is not None
    assert key.everything
    spelled = {"demo": "demo", "demo-embedding": "demo", "gpt-5.1": "openai", "claude-sonnet-4-5": "anthropic"}
    assert set(snapshot.model_names_for(key)) == {name for name, by in spelled.items() if by in providers}
    assert (snapshot.model_for("o3-mini") is not None) == ("openai" in providers)


def test_ten_thousand_keys_load_within_two_seconds() -> None:
    lines = ["providers: {demo: {kind: demo}}", "models: {demo: {targets: [{provider: demo}]}}", "teams:"]
    for team in range(100):
        lines += [f"  team{team}:", "    models: ['*']", "    keys:"]
        for number in range(100):
            digest = hashlib.sha256(f"{team}.{number}".encode()).hexdigest()
            lines.append(f'    - {{id: k-{team}-{number}, sha256: "{digest}", user: u{number}, models: [demo]}}')
    started = time.process_time()
    snapshot = snapshot_of("\n".join(lines))
    assert time.process_time() - started < 2
    assert len(snapshot.keys) == 10_000


def test_the_json_schema_refuses_unknown_keys_and_describes_every_one() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(schema)) == schema
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        assert part["title"]
        assert all("description" in field for field in part["properties"].values())
    assert set(schema["properties"]) == set(Gateway.model_fields)


# Secrets


def test_a_newline_at_the_end_of_a_secret_file_is_taken_off(tmp_path: Path) -> None:
    for ending in ("", "\n", "\r\n"):
        (tmp_path / "key").write_bytes(f"{SECRET}{ending}".encode())
        assert read_secret(SecretRef("file", str(tmp_path / "key")), {}) == SECRET


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n", "empty"),
        (b"a\nb", "line break"),
        (b"a\n\n", "line break"),
        (b"a\rb\n", "line break"),
        (b"a\0b", "control"),
        (b" a", "space"),
        (b"\xff", "UTF-8"),
        (b"a" * 70_000, "larger"),
    ],
)
def test_a_secret_file_that_cannot_be_a_credential_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(SecretError) as caught:
        read_secret(SecretRef("file", str(tmp_path / "key")), {})
    assert words in caught.value.message
    assert not caught.value.missing


@pytest.mark.parametrize("value", ["a\nb", "a\n", "a\rb", " "])
def test_a_variable_with_a_line_break_or_nothing_in_it_is_refused(value: str) -> None:
    with pytest.raises(SecretError):
        read_secret(SecretRef("env", "X"), {"X": value})


def test_missing_secrets_are_only_a_problem_where_they_are_required(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("providers: {a: {kind: openai, api_key: {file: key}}, b: {kind: openai, api_key: {env: B_KEY}}}\n")
    found = load(path, environ={}, require_secrets=True)
    assert isinstance(found, tuple)
    assert [p.key for p in found] == ["providers.a.api_key.file", "providers.b.api_key.env"]
    assert "B_KEY is not set" in found[1].message
    lenient = load(path, environ={}, require_secrets=False)
    assert isinstance(lenient, Snapshot)
    assert lenient.providers["a"].secret == SecretRef("file", str(tmp_path / "key"))


def test_a_ca_file_is_a_pem_file_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("providers: {a: {kind: openai, ca: {file: ca.pem}}}\n")
    for content in (None, "no certificate"):
        if content is not None:
            (tmp_path / "ca.pem").write_text(content)
        found = load(path, environ={}, require_secrets=True)
        assert isinstance(found, tuple)
        assert found[0].key == "providers.a.ca.file"
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    snapshot = load(path, environ={}, require_secrets=True)
    assert isinstance(snapshot, Snapshot)
    assert snapshot.providers["a"].ca_file == tmp_path / "ca.pem"


STRAY_SECRETS = [
    f"api_key: {SECRET}",
    f"api_key: [{SECRET}]",
    f"api_key: {{{SECRET}}}",
    f"api_key: {{{SECRET}, {SECRET}}}",
    f"api_key: {{env: {SECRET}}}",
    f"api_key: {{env: A, {SECRET}: 1}}",
    f"api_key: {{env: {SECRET.replace('-', '_')}}}",
    f"api_key: {{file: {SECRET}}}",
    f"api_key: {{env: {{{SECRET}: 1, {SECRET}: 2}}}}",
    f"api_key: !{SECRET} x",
    f"api_key: *{SECRET}",
    f"api_key: @{SECRET}",
    f"api_key: '{SECRET}",
    f"api_key: {{env: A}}, {SECRET}",
    f"{SECRET}: 1, kind: openai",
    f"token: {SECRET}, api_key: {{env: SET}}",
    f"headers: {{authorization: Bearer {SECRET}}}",
    f'headers: {{a: "{SECRET}\\n"}}',
    f"endpoint: 'https://me:{SECRET}@host'",
    f"endpoint: 'https://host/?key={SECRET}'",
    f"ca: {SECRET}",
    f"ca: {{file: {SECRET}}}",
    f"kind: {SECRET}",
    f"optional: {SECRET}",
    "api_key: {env: BROKEN}",
]


@pytest.mark.parametrize("part", STRAY_SECRETS)
def test_a_secret_in_any_wrong_place_is_never_repeated(part: str) -> None:
    text = f"providers:\n  a: {{kind: openai, {part}}}\n"
    environ = {"BROKEN": f"{SECRET}\n{SECRET}", "SET": "x"}
    found = parse(text.encode(), path=Path("g.yaml"), environ=environ, require_secrets=True)
    assert isinstance(found, tuple)
    assert found
    for form in (SECRET, SECRET.replace("-", "_")):
        assert form not in repr(found)


def test_a_key_pasted_instead_of_its_hash_is_never_repeated() -> None:
    for keys in (f"[{{id: a, sha256: {SECRET}}}]", f"[{SECRET}]", f"{{{SECRET}: 1, {SECRET}: 2}}", f"[{{{SECRET}}}]"):
        text = f"providers: {{a: {{kind: demo}}}}\nteams: {{t: {{keys: {keys}}}}}\n"
        found = parse(text.encode(), path=Path("g.yaml"), environ={}, require_secrets=True)
        assert isinstance(found, tuple)
        assert SECRET not in repr(found)


# Whatever stands in the file


WORDS = st.sampled_from(
    [
        *("providers", "models", "teams", "keys", "targets", "kind", "demo", "openai", "endpoint", "api_key", "env"),
        *("prices", "listen", "port", "state", "sql", "headers", "ca", "file", "*", "gpt-*", "[", "", "<<", "/", "!"),
    ]
)
LEAVES = st.one_of(WORDS, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(WORDS, st.text(max_size=4)), inner)),
    max_leaves=25,
)


def never_raises(raw: bytes) -> None:
    found = parse(raw, path=Path("g.yaml"), environ={}, require_secrets=True)
    if not isinstance(found, Snapshot):
        assert found
        assert all(problem.line >= 1 and problem.message and problem.fix for problem in found)
        assert format_problems(found).count("fix: ") >= len(found)


@given(st.binary(max_size=300))
def test_no_bytes_make_loading_raise(raw: bytes) -> None:
    never_raises(raw)


@given(st.text(alphabet="ab:-[]{}\"'&*!|>%@#,?<~ \n\t01.", max_size=120))
def test_no_text_makes_loading_raise(text: str) -> None:
    never_raises(text.encode())


@settings(max_examples=200)
@given(st.dictionaries(WORDS, TREES))
def test_no_tree_makes_loading_raise(tree: dict[str, object]) -> None:
    never_raises(json.dumps(tree).encode())


@given(st.text(alphabet="ab*?", max_size=6), st.text(alphabet="ab*?", max_size=6), st.text(alphabet="ab", max_size=6))
def test_a_hidden_glob_matches_nothing_more_and_globs_that_meet_share_names(left: str, right: str, name: str) -> None:
    in_left, in_right = fnmatchcase(name, left), fnmatchcase(name, right)
    if hides(left, right) and in_right:
        assert in_left
    if in_left and in_right:
        assert meet(left, right)
    assert meet(left, right) == meet(right, left)
