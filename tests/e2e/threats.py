"""The gateway and the two providers that every test of threats runs against, and what each of them must show.

A threat that is refused shows in four places, a request that passes in three; `World.refuse` and `World.deliver` look
at all of them. The surprising thing: the ledger is asked last and once for many requests, because its rows come in
batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.raw_http import Answer, exchange, request_bytes
from tests.gateway import KEY, PROVIDER_SECRET, TEAMS, Gateway, config, wait_for
from tests.upstream import Recorded, RecordingUpstream

LIMIT_BYTES = 65536
"""The body limit: small, so that testing it is quick."""
ALPHA_SECRET, BETA_SECRET = PROVIDER_SECRET, "beta-secret-77"
JSON = ("content-type", "application/json")
BODY = b'{"model":"demo","messages":[{"role":"user","content":"hi"}]}'
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
Header = tuple[str, str]


def bearer(key: str = KEY) -> Header:
    return ("authorization", f"Bearer {key}")


def length(body: bytes) -> Header:
    return ("content-length", str(len(body)))


def post(
    path: str = CHAT, body: bytes = BODY, *more: Header, method: str = "POST", auth: Sequence[Header] | None = None
) -> bytes:
    """A complete JSON request: host, key, content type and length stand; `more` is added, `auth` replaces the key."""
    headers = [("host", "gateway.test"), *((bearer(),) if auth is None else auth), JSON, length(body), *more]
    return request_bytes(method, path, headers, body)


def bare(path: str, *headers: Header, method: str = "GET", body: bytes = b"") -> bytes:
    """A request with a host and just these headers."""
    return request_bytes(method, path, [("host", "gateway.test"), *headers], body)


def code_of(answer: Answer) -> str:
    """The refusal's code. Asserts that the error is whole, and in one of the two dialects."""
    document: dict[str, Any] = answer.json
    error = document["error"]
    request_id = answer.header("x-request-id")
    assert request_id, answer
    if document.get("type") == "error":
        assert set(document) == {"type", "error", "request_id"}
        assert set(error) == {"type", "message", "code"}
        assert document["request_id"] == request_id
    else:
        assert set(document) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].endswith(f"(request id: {request_id})")
    assert answer.header("content-type") == "application/json"
    return str(error["code"])


@dataclass(frozen=True)
class World:
    """The gateway in front of `alpha` (which serves Anthropic's dialect too) and `beta`."""

    gateway: Gateway
    alpha: RecordingUpstream
    beta: RecordingUpstream

    def send(self, raw: bytes, *, method: str = "POST") -> Answer:
        return exchange(self.gateway.port, raw, method=method)

    def upstream_requests(self) -> list[Recorded]:
        return [*self.alpha.requests, *self.beta.requests]

    def assert_untouched(self) -> None:
        """No provider saw a byte."""
        assert self.upstream_requests() == []
        assert [*self.alpha.malformed, *self.beta.malformed] == []

    def forget(self) -> None:
        """Providers as new: no script, no memory."""
        for upstream in (self.alpha, self.beta):
            upstream.clear()
            upstream.behave_normally()

    def refuse(self, cases: Mapping[str, bytes], status: int, code: str, *, method: str = "POST") -> list[Answer]:
        """Send all; each must be refused, must reach no provider, and must leave one row."""
        answers: dict[str, Answer] = {}
        self.alpha.clear()
        self.beta.clear()
        with self.rows(len(cases)):
            for name, raw in cases.items():
                answer = answers[name] = self.send(raw, method=method)
                if method == "HEAD":
                    assert answer.status == status, (name, answer)
                else:
                    assert (answer.status, code_of(answer)) == (status, code), (name, answer)
                self.assert_untouched()
        for name, answer in answers.items():
            self.assert_row(
                name, answer.header("x-request-id"), status=status, code=code, outcome="refused", attempts=0
            )
        return list(answers.values())

    def deliver(self, cases: Mapping[str, bytes], *, method: str = "POST") -> list[Recorded]:
        """Send all; each must be answered by one provider, and leave one row. Gives what the providers saw."""
        answers: dict[str, Answer] = {}
        seen: list[Recorded] = []
        with self.rows(len(cases)):
            for name, raw in cases.items():
                self.alpha.clear()
                self.beta.clear()
                answer = answers[name] = self.send(raw, method=method)
                assert answer.status == 200, (name, answer)
                assert len(self.upstream_requests()) == 1, name
                seen += self.upstream_requests()
        for name, answer in answers.items():
            self.assert_row(name, answer.header("x-request-id"), status=200, code=None, outcome="ok", attempts=1)
        return seen

    @contextmanager
    def rows(self, number: int) -> Iterator[None]:
        """What happens within adds just `number` rows to the ledger."""
        before = len(self.gateway.rows())
        yield
        wait_for(lambda: len(self.gateway.rows()) >= before + number, 15, f"{number} more rows")
        assert len(self.gateway.rows()) == before + number

    def assert_row(self, name: str, request_id: str | None, **expected: object) -> None:
        found = self.gateway.rows(f"request_id = '{request_id}'")
        assert len(found) == 1, (name, request_id, found)
        assert {field: found[0][field] for field in expected} == expected, (name, found)


@contextmanager
def running(folder: Path, **sections: Any) -> Iterator[World]:
    """The world, from start to end. `alpha` and `claude` are one upstream; `open` is `beta` without a credential."""
    with RecordingUpstream() as alpha, RecordingUpstream() as beta:
        providers = {
            "alpha": {
                "kind": "openai",
                "endpoint": f"{alpha.url}/v1",
                "api_key": {"env": "PROVIDER_KEY"},
                "headers": {"x-alpha": "for alpha alone"},
            },
            "claude": {"kind": "anthropic", "endpoint": alpha.url, "api_key": {"env": "PROVIDER_KEY"}},
            "beta": {"kind": "openai", "endpoint": f"{beta.url}/v1", "api_key": {"env": "BETA_KEY"}},
            "open": {"kind": "openai", "endpoint": f"{beta.url}/v1"},
        }
        models: dict[str, Any] = {
            "demo": {"targets": [{"provider": "alpha"}, {"provider": "claude"}]},
            "narrow": {"targets": [{"provider": "alpha"}]},
            "renamed": {"targets": [{"provider": "alpha", "model": "other-name"}]},
            "adapted": {"targets": _chain("alpha", "first-name", "beta", "second-name")},
            "failing-over": {"targets": _chain("alpha", None, "beta", None)},
            "failing-over-open": {"targets": _chain("alpha", None, "open", None)},
            "any/*": {"targets": [{"provider": "alpha"}]},
        }
        teams = {**TEAMS, "search": {**TEAMS["search"], "default_provider": "alpha"}}
        limit = {"max_body_bytes": LIMIT_BYTES}
        more = {"listen": limit, **sections}
        written = config(providers=providers, models=models, teams=teams, **more)
        environ = {"BETA_KEY": BETA_SECRET}
        with Gateway(folder, written, environ) as gateway:
            yield World(gateway, alpha, beta)


def _chain(first: str, first_model: str | None, second: str, second_model: str | None) -> list[dict[str, object]]:
    pairs = ((first, first_model), (second, second_model))
    return [
        {"provider": provider, "priority": priority, **({"model": model} if model else {})}
        for priority, (provider, model) in enumerate(pairs)
    ]
