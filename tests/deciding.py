"""A small gateway's decide without Envoy: a snapshot, a meter that counts nothing, and what a request comes to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from extproc.config.snapshot import Snapshot
from extproc.config.source import format_problems, parse
from extproc.decide.pipeline import Decider, InputTokens
from extproc.decision import Decision
from extproc.dialects.endpoints import Endpoint
from extproc.errors import Code, Dialect
from extproc.exchange import Headers, RequestHeaders, Respond, Route

ALL, NARROW, ORPHAN, CLAUDE = "sk-all", "sk-narrow", "sk-orphan", "sk-claude"


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


GATEWAY = f"""
listen: {{max_body_bytes: 1000}}
timeouts: {{first_byte_s: 10, stream_idle_s: 30}}
providers:
  east: {{kind: openai, endpoint: "http://127.0.0.1:1/v1"}}
  west: {{kind: openai, endpoint: "http://127.0.0.1:2/v1", timeouts: {{first_byte_s: 3}}}}
  mute: {{kind: openai, endpoint: "http://127.0.0.1:3/v1", stream_usage: false}}
  claude: {{kind: anthropic, endpoint: "http://127.0.0.1:4"}}
  demo: {{kind: demo}}
models:
  plain: {{targets: [{{provider: east}}]}}
  alias: {{targets: [{{provider: east, model: real}}]}}
  chain:
    targets:
    - {{provider: east, model: one}}
    - {{provider: west, model: two, priority: 1}}
    - {{provider: west, model: one, priority: 2}}
  weighted: {{targets: [{{provider: east, weight: 3}}, {{provider: west, weight: 1}}]}}
  quiet: {{targets: [{{provider: east}}, {{provider: mute, priority: 1}}]}}
  sonnet: {{targets: [{{provider: claude, model: claude-real}}]}}
  both: {{targets: [{{provider: east}}, {{provider: claude}}]}}
  "glob-*": {{targets: [{{provider: west}}], timeouts: {{stream_idle_s: 77}}}}
teams:
  all:
    models: ["*"]
    default_provider: east
    keys: [{{id: all-1, sha256: {_hash(ALL)}, project: p, user: u, agent: a}}]
  narrow:
    models: [plain, "glob-*", "!glob-secret"]
    default_provider: east
    keys: [{{id: narrow-1, sha256: {_hash(NARROW)}}}]
  orphan: {{models: ["*"], keys: [{{id: orphan-1, sha256: {_hash(ORPHAN)}}}]}}
  claude: {{models: ["*"], default_provider: claude, keys: [{{id: claude-1, sha256: {_hash(CLAUDE)}}}]}}
"""


def snapshot() -> Snapshot:
    found = parse(GATEWAY.encode(), path=Path("/etc/extproc/gateway.yaml"), environ={}, require_secrets=True)
    assert isinstance(found, Snapshot), format_problems(found)
    return found


SNAPSHOT = snapshot()


class FixedMeter:
    """Finds every prompt 42 tokens long, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []

    async def measure(self, endpoint: Endpoint, key_id: str, model: str, body: bytes) -> InputTokens:
        self.asked.append((endpoint.name, key_id, model))
        return InputTokens(42, exact=True, text_bytes=len(body))


def event(
    method: str = "POST", path: str = "/v1/chat/completions", key: str | None = ALL, ends: bool = False, **more: str
) -> RequestHeaders:
    """Headers as Envoy sends them; `more` gives further ones, with `_` for `-`."""
    pairs = {":method": method, ":path": path, "x-request-id": "id-1", "content-type": "application/json"}
    if key is not None:
        pairs["authorization"] = f"Bearer {key}"
    pairs |= {name.replace("_", "-"): value for name, value in more.items()}
    return RequestHeaders(Headers({name: value.encode("latin-1") for name, value in pairs.items()}), ends)


async def outcome(body: dict[str, Any] | bytes, seed: int = 0, **headers: Any) -> Route | Respond:
    """What a request comes to, from its headers to its end."""
    decider = Decider(SNAPSHOT, FixedMeter(), Random(seed))
    admitted = decider.admit(event(**headers))
    if isinstance(admitted, Respond):
        return admitted
    return await decider.decide(admitted, body if isinstance(body, bytes) else json.dumps(body).encode())


async def routed(body: dict[str, Any] | bytes, seed: int = 0, **headers: Any) -> tuple[Route, Decision]:
    found = await outcome(body, seed, **headers)
    assert isinstance(found, Route), found
    decision = Decision.from_metadata(found.metadata)
    assert decision is not None
    return found, decision


CHAT: dict[str, Any] = {"model": "plain", "messages": []}
ANTHROPIC: dict[str, Any] = {"path": "/v1/messages", "key": None, "x_api_key": ALL}


def assert_refusal(found: object, code: Code, dialect: Dialect = Dialect.OPENAI, key_id: str | None = None) -> None:
    assert isinstance(found, Respond), found
    document = json.loads(found.body)
    assert document["error"]["code"] == code
    headers = dict(found.headers)
    if dialect is Dialect.ANTHROPIC:
        assert (document["type"], document["request_id"], headers["request-id"]) == ("error", "id-1", "id-1")
    else:
        assert set(document["error"]) == {"message", "type", "param", "code"}
        assert "request-id" not in headers
    decision = Decision.from_metadata(found.metadata)
    assert decision is not None
    assert (decision.code, decision.dialect, decision.providers) == (code, dialect, ())
    assert found.details == f"extproc:{code}"
    assert found.status == _STATUSES[code]
    if key_id is not None:
        assert decision.key_id == key_id


_CODES: dict[int, Sequence[Code]] = {
    400: (
        Code.INVALID_JSON,
        Code.DUPLICATE_KEY,
        Code.INVALID_TYPE,
        Code.MISSING_FIELD,
        Code.DIALECT_NOT_SUPPORTED,
        Code.NO_DEFAULT_PROVIDER,
    ),
    401: (Code.MISSING_KEY, Code.INVALID_KEY, Code.CONFLICTING_CREDENTIALS),
    403: (Code.MODEL_NOT_ALLOWED,),
    404: (Code.MODEL_NOT_FOUND, Code.UNKNOWN_PATH),
    405: (Code.METHOD_NOT_ALLOWED,),
    413: (Code.BODY_TOO_LARGE,),
    415: (Code.UNSUPPORTED_CONTENT_TYPE, Code.UNSUPPORTED_CONTENT_ENCODING),
    503: (Code.GATEWAY_UNAVAILABLE,),
}
_STATUSES = {code: status for status, codes in _CODES.items() for code in codes}
