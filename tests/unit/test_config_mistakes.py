"""Every mistake that a person can make in gateway.yaml: where it is reported, and in which words."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from extproc.config.snapshot import Snapshot
from extproc.config.source import Problem, format_problems, load, parse

HASH = "a" * 64
HASH_2 = "b" * 64
SECRET = "sk-live-0123456789abcdefSECRET"

GOOD = f"""\
providers:
  vllm: {{kind: openai, endpoint: "http://127.0.0.1:8000/v1"}}
models:
  smart: {{targets: [{{provider: vllm}}]}}
  "gpt-*": {{targets: [{{provider: vllm}}]}}
teams:
  search:
    models: [smart]
    keys:
    - {{id: one, sha256: "{HASH}"}}
"""


def problems_of(text: str | bytes, environ: dict[str, str] | None = None) -> tuple[Problem, ...]:
    raw = text if isinstance(text, bytes) else text.encode()
    found = parse(raw, path=Path("gateway.yaml"), environ=environ or {}, require_secrets=True)
    return () if isinstance(found, Snapshot) else found


def only(text: str | bytes, environ: dict[str, str] | None = None) -> Problem:
    found = problems_of(text, environ)
    assert len(found) == 1, format_problems(found)
    return found[0]


def test_the_file_that_the_mistakes_below_are_put_into_is_good() -> None:
    assert problems_of(GOOD) == ()


# (what is replaced in GOOD, by what, line, key, words in the message or fix)
REPLACED = [
    ("kind: openai", "knd: openai, kind: openai", 2, "providers.vllm.knd", "unknown key / did you mean `kind`?"),
    ("kind: openai", "kind: opneai", 2, "providers.vllm.kind", "did you mean `openai`?"),
    ("kind: openai", "kind: bedrock", 2, "providers.vllm.kind", "does not serve the kind `bedrock` yet"),
    ("kind: openai", "kind: azure_openai", 2, "providers.vllm.kind", "does not serve"),
    ("kind: openai, ", "", 2, "providers.vllm.kind", "is missing"),
    ("kind: openai, ", "kind: openai, kind: openai, ", 2, "providers.vllm.kind", "the same key is on line 2"),
    ("http://127.0.0.1:8000/v1", "http://me:pw-hidden@host/v1", 2, "providers.vllm.endpoint", "user or password"),
    ("http://127.0.0.1:8000/v1", "ftp://host/v1", 2, "providers.vllm.endpoint", "http or https"),
    ("http://127.0.0.1:8000/v1", "file:///etc/passwd", 2, "providers.vllm.endpoint", "http or https"),
    ("http://127.0.0.1:8000/v1", "http://host/v1?x=1", 2, "providers.vllm.endpoint", "query or fragment"),
    ("http://127.0.0.1:8000/v1", "http://host/v1#x", 2, "providers.vllm.endpoint", "query or fragment"),
    ("http://127.0.0.1:8000/v1", "http:///v1", 2, "providers.vllm.endpoint", "no valid host"),
    ("http://127.0.0.1:8000/v1", "http://host:99999/v1", 2, "providers.vllm.endpoint", "not a URL"),
    ("http://127.0.0.1:8000/v1", "http://host:0/v1", 2, "providers.vllm.endpoint", "no valid host"),
    ("http://127.0.0.1:8000/v1", "http://[::1/v1", 2, "providers.vllm.endpoint", "not a URL"),
    ("http://127.0.0.1:8000/v1", "http://host/a/../b", 2, "providers.vllm.endpoint", "`..`"),
    ("http://127.0.0.1:8000/v1", "http://host/v1\\r\\nx: y", 2, "providers.vllm.endpoint", "control"),
    ("kind: openai,", "kind: openai, headers: {Authorization: x},", 2, "providers.vllm.headers.Authorization", "own"),
    ("kind: openai,", "kind: openai, headers: {X-Api-Key: x},", 2, "providers.vllm.headers.X-Api-Key", "own"),
    ("kind: openai,", "kind: openai, headers: {host: x},", 2, "providers.vllm.headers.host", "own"),
    ("kind: openai,", "kind: openai, headers: {x-envoy-a: x},", 2, "providers.vllm.headers.x-envoy-a", "own"),
    ("kind: openai,", "kind: openai, headers: {X-Extproc-A: x},", 2, "providers.vllm.headers.X-Extproc-A", "own"),
    ("kind: openai,", "kind: openai, headers: {content-length: x},", 2, "providers.vllm.headers.content-length", "own"),
    ("kind: openai,", 'kind: openai, headers: {"a b": x},', 2, 'providers.vllm.headers."a b"', "not a header's name"),
    ("kind: openai,", 'kind: openai, headers: {a: "x\\r\\ny"},', 2, "providers.vllm.headers.a", "line breaks"),
    ("kind: openai,", "kind: openai, headers: {a: x, A: y},", 2, "providers.vllm.headers.A", "twice"),
    ("kind: openai,", "kind: openai, headers: {a: 1},", 2, "providers.vllm.headers.a", "expected text, found a number"),
    ("kind: openai,", "kind: openai, stream_usage: yes,", 2, "providers.vllm.stream_usage", "true or false"),
    ("kind: openai,", "kind: openai, optional: true,", 2, "providers.vllm.optional", "`optional` needs an `api_key`"),
    ("kind: openai,", "kind: openai, timeouts: {first_byte_s: 0},", 2, "providers.vllm.timeouts.first_byte_s", "more"),
    ("kind: openai,", "kind: openai, timeouts: {stream_idle_s: -1},", 2, "providers.vllm.timeouts.stream_idle_s", "0"),
    ("kind: openai,", "kind: openai, timeouts: {first_byte_s: .inf},", 2, "providers.vllm.timeouts.first_byte_s", "0"),
    (
        "kind: openai,",
        'kind: openai, timeouts: {first_byte_s: "6"},',
        2,
        "providers.vllm.timeouts.first_byte_s",
        "quot",
    ),
    ('{kind: openai, endpoint: "http://127.0.0.1:8000/v1"}', "", 2, "providers.vllm", "found nothing"),
    ("vllm: {kind", "vllm: {kind: demo}\n  a/b: {kind", 3, 'providers."a/b"', "holds a `/`"),
    ("vllm: {kind", 'vllm: {kind: demo}\n  "a\\nb": {kind', 3, 'providers."a\\nb"', "line break"),
    ("vllm: {kind", 'vllm: {kind: demo}\n  "é": {kind', 3, 'providers."\\u00e9"', "use letters"),
    ("kind: openai", "kind: demo", 2, "providers.vllm.endpoint", "the built-in demo takes no `endpoint`"),
    ('provider: vllm}]}\n  "', 'provider: vlm}]}\n  "', 4, "models.smart.targets.0.provider", "did you mean `vllm`?"),
    ('[{provider: vllm}]}\n  "', '[]}\n  "', 4, "models.smart.targets", "is empty"),
    ('{targets: [{provider: vllm}]}\n  "', '{}\n  "', 4, "models.smart.targets", "is missing"),
    ('[{provider: vllm}]}\n  "', '{provider: vllm}}\n  "', 4, "models.smart.targets", "expected a list"),
    ('provider: vllm}]}\n  "', 'provider: vllm, weight: 0}]}\n  "', 4, "models.smart.targets.0.weight", "at least 1"),
    ('provider: vllm}]}\n  "', 'provider: vllm, weight: 1.5}]}\n  "', 4, "models.smart.targets.0.weight", "whole"),
    (
        'provider: vllm}]}\n  "',
        'provider: vllm, priority: -1}]}\n  "',
        4,
        "models.smart.targets.0.priority",
        "at least",
    ),
    ('provider: vllm}]}\n  "', 'provider: vllm, model: 4}]}\n  "', 4, "models.smart.targets.0.model", "in quotes"),
    ('provider: vllm}]}\n  "', 'provider: vllm}], expect_model: x}\n  "', 4, "models.smart.expect_model", "enforce"),
    ('"gpt-*":', '"gpt-[":', 5, 'models."gpt-["', "never closed"),
    ('"gpt-*":', '"":', 5, 'models.""', "is empty"),
    ('"gpt-*":', '"!gpt":', 5, 'models."!gpt"', "cannot begin with `!`"),
    ('"gpt-*":', '" gpt":', 5, 'models." gpt"', "space"),
    ('"gpt-*":', '"a\\u202eb":', 5, 'models."a\\u202eb"', "control character"),
    ('"gpt-*":', '"*": {targets: [{provider: vllm}]}\n  "gpt-*":', 6, 'models."gpt-*"', "unreachable: `*`"),
    ('"gpt-*":', '"gpt-**": {targets: [{provider: vllm}]}\n  "gpt-*":', 6, 'models."gpt-*"', "unreachable"),
    ('"gpt-*":', '"gpt-*": {targets: [{provider: vllm}]}\n  "gpt-[45]*":', 6, 'models."gpt-[45]*"', "unreachable"),
    ("models: [smart]", "models: [smrt]", 8, "teams.search.models.0", "did you mean `smart`?"),
    ("models: [smart]", 'models: [smart, "!gtp-4"]', 8, "teams.search.models.1", "matches nothing"),
    ("models: [smart]", 'models: ["!smart"]', 8, "teams.search.models", "only denies"),
    ("models: [smart]", 'models: ["sm[art"]', 8, "teams.search.models.0", "never closed"),
    ("models: [smart]", "models: smart", 8, "teams.search.models", "expected a list, found text"),
    (
        "models: [smart]",
        "models: [smart]\n    budgets: []",
        9,
        "teams.search.budgets",
        "does not enforce `budgets` yet",
    ),
    ("models: [smart]", "models: [smart]\n    limits: []", 9, "teams.search.limits", "does not enforce `limits` yet"),
    ("models: [smart]", "models: [smart]\n    tools: []", 9, "teams.search.tools", "does not enforce `tools` yet"),
    ("models: [smart]", "models: [smart]\n    default_provider: no", 9, "teams.search.default_provider", "no provider"),
    ("teams:\n  search:", 'teams:\n  "a\\u0007":', 7, 'teams."a\\u0007"', "control character"),
    ("teams:\n  search:", "teams:\n  a/b:", 7, 'teams."a/b"', "`/`"),
    ("id: one", "id: 1", 10, "teams.search.keys.0.id", "expected text, found a number"),
    ("id: one", 'id: "a\\rb"', 10, "teams.search.keys.0.id", "line break"),
    ("id: one", 'id: one, user: "a\\u2028b"', 10, "teams.search.keys.0.user", "line break"),
    ("id: one", "id: one, budgets: []", 10, "teams.search.keys.0.budgets", "does not enforce"),
    ("id: one", "id: one, models: [nothing]", 10, "teams.search.keys.0.models.0", "matches nothing"),
    ("id: one, ", "", 10, "teams.search.keys.0.id", "is missing"),
    (HASH, "a" * 63, 10, "teams.search.keys.0.sha256", "64 characters"),
    (HASH, "g" * 64, 10, "teams.search.keys.0.sha256", "64 characters"),
    (HASH, f"sha256:{HASH}", 10, "teams.search.keys.0.sha256", "64 characters"),
    (
        HASH,
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        10,
        "teams.search.keys.0.sha256",
        "an empty key",
    ),
]


@pytest.mark.parametrize(("old", "new", "line", "key", "words"), REPLACED)
def test_a_mistake_is_found_with_line_key_and_words(old: str, new: str, line: int, key: str, words: str) -> None:
    assert old in GOOD
    problem = only(GOOD.replace(old, new, 1))
    assert (problem.line, problem.key) == (line, key)
    assert words in f"{problem.message} / {problem.fix}"


# (a part put after GOOD, line within it, key, words)
ADDED = [
    ("guardrails: {}", 1, "guardrails", "does not enforce `guardrails` yet"),
    ("identity: {}", 1, "identity", "does not enforce"),
    ("mcp: {}", 1, "mcp", "does not enforce"),
    ("policies: []", 1, "policies", "does not enforce"),
    ("telemetry: {}", 1, "telemetry", "does not enforce"),
    ("state: {valkey: embedded}", 1, "state.valkey", "does not enforce"),
    ("modles: {}", 1, "modles", "did you mean `models`?"),
    ("listen: {port: 10001}", 1, "listen.port", "the same port"),
    ("listen: {port: 9}\nadmin: {port: 9}", 2, "admin.port", "the same port"),
    (
        'listen: {port: "9000"}',
        1,
        "listen.port",
        "expected a whole number, found text / write a whole number, without quotes",
    ),
    ("listen: {port: 70000}", 1, "listen.port", "at most 65535"),
    ("listen: {port: 0}", 1, "listen.port", "at least 1"),
    ("listen: {port: true}", 1, "listen.port", "found true or false"),
    ("listen: {port: 1_000}", 1, "listen.port", "found text"),
    ("listen: {address: localhost}", 1, "listen.address", "not an IP address"),
    ("listen: {max_body_bytes: 0}", 1, "listen.max_body_bytes", "at least 1"),
    ("listen: [1]", 1, "listen", "expected a mapping of keys, found a list"),
    ("admin: {address: 0.0.0.0}", 1, "admin.address", "no login in this version"),
    ("timeouts: {first_byte_s: 0}", 1, "timeouts.first_byte_s", "more than 0"),
    ("timeouts:\n  stream_idle_s: -5", 2, "timeouts.stream_idle_s", "more than 0"),
    ("timeouts: {first_byte_s: 1e9}", 1, "timeouts.first_byte_s", "a day at most"),
    ('state: {sql: "mysql://host/x"}', 1, "state.sql", "only SQLite and PostgreSQL"),
    ('state: {sql: "sqlite://"}', 1, "state.sql", "needs a file"),
    ('state: {sql: "sqlite:///:memory:"}', 1, "state.sql", "needs a file"),
    ("state: {sql: extproc.db}", 1, "state.sql", "not a database URL"),
    ('state: {sql: "postgresql://host"}', 1, "state.sql", "no database"),
    ('state: {sql: "postgresql://me:pw-hidden@host/x"}', 1, "state.sql", "must not stand in the file"),
    ('state: {sql: "postgresql://me@host/x?password=pw-hidden"}', 1, "state.sql", "must not stand in the file"),
    ("state: {sql: {env: DATABASE_URL}}", 1, "state.sql.env", "DATABASE_URL is not set"),
    ('prices: {"vllm/*": {input: -1, output: 1}}', 1, 'prices."vllm/*".input', "negative"),
    ('prices: {"vllm/*": {input: "1", output: 1}}', 1, 'prices."vllm/*".input', "without quotes"),
    ('prices: {"vllm/*": {input: .nan, output: 1}}', 1, 'prices."vllm/*".input', "negative"),
    ('prices: {"vllm/*": {input: 1}}', 1, 'prices."vllm/*".output', "is missing"),
    ('prices: {"vlm/*": {input: 1, output: 1}}', 1, 'prices."vlm/*"', "did you mean `vllm`?"),
    ('prices: {"vllm": {input: 1, output: 1}}', 1, "prices.vllm", "`provider/model`"),
    ('prices: {"vllm/[a": {input: 1, output: 1}}', 1, 'prices."vllm/[a"', "never closed"),
    ("listen: {port: 9000}\nlisten: {port: 9001}", 2, "listen", "the same key is on line 11"),
    ("---\nlisten: {}", 1, "", "a second document"),
    ("listen:\n\tport: 1", 2, "", "never tabs"),
    ("listen: {port: 1", 1, "", "never closed"),
    ("listen: port: 1", 1, "", "a second `:`"),
    ('listen: "x', 1, "", "never closed"),
    ("listen: !!python/object:os.system {}", 1, "listen", "tags"),
    ("listen: *nowhere", 1, "listen", "alias"),
    ("? [a, b]\n: 1", 1, "", "a key must be"),
    ("listen: {<<: 5}", 1, "listen", "alias of a mapping"),
]


@pytest.mark.parametrize(("text", "line", "key", "words"), ADDED)
def test_a_part_that_is_wrong_is_found_at_its_line(text: str, line: int, key: str, words: str) -> None:
    found = [p for p in problems_of(GOOD + text) if words in f"{p.message} / {p.fix}"]
    assert [(p.line, p.key) for p in found] == [(GOOD.count("\n") + line, key)]


WHOLE_FILES = [
    (b"", 1, "the file is empty"),
    (b"# only a comment\n", 1, "the file is empty"),
    (b"---\n...\n", 1, "the file is empty"),
    (b"- a\n- b\n", 1, "must be a mapping"),
    (b"providers: {a: {kind: demo}}\nx: \xff\n", 2, "not UTF-8"),
    (b"providers: {a: {kind: demo}}\n\nx: \x00\n", 3, "control character"),
    (b"listen: {}\n", 1, "is missing"),
    (b"\xff\xfep\x00", 1, "not UTF-8"),
    (b"a: " + b"[" * 100_000, 1, "deep"),
    (b"%YAML 9.0\n---\na: 1\n", 1, "YAML version"),
]


@pytest.mark.parametrize(("raw", "line", "words"), WHOLE_FILES)
def test_a_file_that_is_no_configuration_is_refused(raw: bytes, line: int, words: str) -> None:
    problem = only(raw)
    assert problem.line == line
    assert words in problem.message


def test_an_alias_bomb_is_refused_before_it_costs_anything() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "aliases repeat more than" in problems_of("\n".join(lines))[-1].message


def test_a_merge_bomb_is_refused() -> None:
    wide = ", ".join(f"k{i}: {i}" for i in range(2000))
    lines = [f"base: &base {{{wide}}}", *(f"m{i}: {{<<: *base}}" for i in range(200))]
    assert any("repeat more than" in p.message for p in problems_of("\n".join(lines)))


def test_an_alias_inside_its_own_anchor_is_refused() -> None:
    assert any("alias" in p.message for p in problems_of("providers: &x {a: *x}\n"))


def test_ids_and_hashes_are_used_once_over_all_teams() -> None:
    other = f"""\
  other:
    keys:
    - {{id: one, sha256: "{HASH_2}"}}
    - {{id: two, sha256: "{HASH.upper()}"}}
"""
    found = problems_of(GOOD + other)
    assert [(p.line, p.key) for p in found] == [(13, "teams.other.keys.0.id"), (14, "teams.other.keys.1.sha256")]
    assert all("used on line 10" in p.message for p in found)
    assert HASH not in format_problems(found).lower()


def test_two_keys_on_one_line_cannot_share_an_id() -> None:
    twice = GOOD.replace(f'- {{id: one, sha256: "{HASH}"}}', f"- {{id: a, sha256: {HASH}}}\n")
    flow = twice.replace(
        f"    - {{id: a, sha256: {HASH}}}", f"      [{{id: a, sha256: {HASH}}}, {{id: a, sha256: {HASH_2}}}]"
    )
    assert only(flow).key == "teams.search.keys.1.id"


def test_a_ca_for_an_endpoint_without_tls_is_refused() -> None:
    found = problems_of(GOOD.replace("kind: openai,", "kind: openai, ca: {file: none.pem},"))
    assert [(p.line, p.key) for p in found] == [(2, "providers.vllm.ca"), (2, "providers.vllm.ca.file")]
    assert "without TLS" in found[0].message


def test_all_mistakes_are_reported_at_once_and_in_order() -> None:
    text = dedent(
        f"""\
        listen: {{port: "x"}}
        providers:
          a: {{kind: opnai, api_key: {SECRET}}}
          b: {{kind: demo, api_key: {{env: X}}}}
        models:
          m: {{targets: [{{provider: c}}]}}
        teams:
          t: {{models: [n], budgets: [], keys: [{{id: k}}]}}
        """
    )
    found = problems_of(text)
    assert [(p.line, p.key) for p in found] == [
        (1, "listen.port"),
        (3, "providers.a.kind"),
        (3, "providers.a.api_key"),
        (4, "providers.b.api_key"),
        (4, "providers.b.api_key.env"),
        (6, "models.m.targets.0.provider"),
        (8, "teams.t.models.0"),
        (8, "teams.t.budgets"),
        (8, "teams.t.keys.0.sha256"),
    ]


def test_problems_read_as_file_line_key_message_and_fix() -> None:
    text = format_problems(problems_of(GOOD.replace("kind: openai", "kind: opneai")))
    assert text.startswith("gateway.yaml:2:10: providers.vllm.kind: must be 'openai', 'anthropic' or 'demo'\n    fix: ")


def test_a_file_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    found = load(tmp_path / "none.yaml", environ={}, require_secrets=True)
    assert isinstance(found, tuple)
    assert "No such file" in found[0].message


def test_yaml_1_1_words_are_text_and_names_of_digits_are_names() -> None:
    text = GOOD.replace("smart", "no").replace("search:", "2024:").replace("id: one", "id: on")
    assert problems_of(text) == ()


def test_a_merge_gives_what_is_not_written_and_keeps_what_is() -> None:
    text = GOOD.replace("smart: {targets", "smart: &m {timeouts: {first_byte_s: 5}, targets").replace(
        '"gpt-*": {targets: [{provider: vllm}]}', '"gpt-*": {<<: *m, timeouts: {first_byte_s: 9}}'
    )
    snapshot = parse(text.encode(), path=Path("g.yaml"), environ={}, require_secrets=True)
    assert isinstance(snapshot, Snapshot)
    by_name = {name: snapshot.model_for(name) for name in ("smart", "gpt-5")}
    assert {name: model and model.timeouts and model.timeouts.first_byte_s for name, model in by_name.items()} == {
        "smart": 5,
        "gpt-5": 9,
    }
    assert by_name["gpt-5"] and by_name["gpt-5"].targets[0].provider == "vllm"
