"""The lab of the failover tests: one gateway, two plain upstreams and a secure one, many providers in front of them.

The surprising thing: a test asks for a fresh pair of providers. The gateway remembers which provider keeps failing or
asked to be left alone, and tries it last for a while, so tests that shared one would see each other's failures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import trustme

from tests.gateway import KEY, TEAMS, Gateway, config, free_port
from tests.upstream import RecordingUpstream

SECOND_SECRET = "second-secret-77aa"
CHAT = "/v1/chat/completions"
FIRST_BYTE_S = 1.5
IMPATIENT_S = 0.4
PAIRS = 18
"""Pairs that tests take in turn; none comes up so often that its provider would fail five times."""
LIMITED = 4
"""Pairs for tests whose providers say how long to stay away."""


class Lab:
    """What a test of failover needs. `first` and `second` are the upstreams of every pair, `secure` speaks TLS."""

    def __init__(
        self,
        gateway: Gateway,
        first: RecordingUpstream,
        second: RecordingUpstream,
        secure: RecordingUpstream,
        http: httpx.Client,
    ) -> None:
        self.gateway, self.first, self.second, self.secure, self.http = gateway, first, second, secure, http
        self._taken, self._limited = count(), count(PAIRS)

    def fresh(self, kind: str = "pair") -> str:
        """A model (`pair`, `renamed`, `claude`, ...) whose first provider has not failed lately."""
        return f"{kind}-{next(self._taken) % PAIRS}"

    def limited(self, kind: str = "pair") -> str:
        """The same, for a test after which its providers are to be left alone."""
        number = next(self._limited)
        assert number < PAIRS + LIMITED
        return f"{kind}-{number}"

    def forget(self) -> None:
        """Let the upstreams behave, and forget what they were sent."""
        for upstream in (self.first, self.second, self.secure):
            upstream.behave_normally()
            upstream.clear()

    def chat(self, model: str, **more: Any) -> httpx.Response:
        return self.http.post(CHAT, json={"model": model, "messages": [{"role": "user", "content": "hi"}], **more})


def served_by(answer: httpx.Response) -> str:
    """The provider that answered, without its number; the answer has all headers that it should, and no other."""
    assert answer.status_code == 200, answer.text
    assert not [name for name in answer.headers if name.startswith("x-envoy-")]
    assert answer.headers["x-request-id"]
    assert answer.headers["x-extproc-model"]
    provider: str = answer.headers["x-extproc-provider"]
    return provider.rpartition("-")[0] or provider


@contextmanager
def failover_lab(folder: Path) -> Iterator[Lab]:
    """A running lab; its files are in `folder`."""
    other_ca = folder / "other-ca.pem"
    trustme.CA().cert_pem.write_to_path(str(other_ca))
    with RecordingUpstream() as first, RecordingUpstream() as second, RecordingUpstream(tls=True) as secure:
        sections = config(
            providers=_providers(first.url, second.url, secure, secure.write_ca(folder), other_ca),
            models=_models(),
            teams={"search": TEAMS["search"]},
            timeouts={"first_byte_s": FIRST_BYTE_S, "stream_idle_s": 20},
        )
        with (
            Gateway(folder, sections, {"SECOND_KEY": SECOND_SECRET}) as gateway,
            httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {KEY}"}, timeout=15) as http,
        ):
            yield Lab(gateway, first, second, secure, http)
            assert "[lua]" not in gateway.log()  # Envoy's word for a script that failed


def _providers(first: str, second: str, secure: RecordingUpstream, ca: Path, other_ca: Path) -> dict[str, Any]:
    key, second_key = {"env": "PROVIDER_KEY"}, {"env": "SECOND_KEY"}
    trusted, distrusted = {"file": str(ca)}, {"file": str(other_ca)}
    by_name = f"https://localhost:{secure.port}/v1"
    one = {"kind": "openai", "endpoint": f"{first}/v1", "api_key": key}
    two = {"kind": "openai", "endpoint": f"{second}/prefix/v1", "api_key": second_key}
    pairs: dict[str, Any] = {}
    for number in range(PAIRS + LIMITED):
        pairs[f"first-{number}"] = {**one, "headers": {"x-first": "1"}}
        pairs[f"second-{number}"] = two
        pairs[f"first_anthropic-{number}"] = {"kind": "anthropic", "endpoint": first, "api_key": key}
        pairs[f"second_anthropic-{number}"] = {
            "kind": "anthropic",
            "endpoint": f"{second}/tenant",
            "api_key": second_key,
        }
    return {
        **pairs,
        "lonely": one,
        "heavy": one,
        "light": two,
        "impatient": {"kind": "openai", "endpoint": f"{first}/v1", "timeouts": {"first_byte_s": IMPATIENT_S}},
        "closed": {"kind": "openai", "endpoint": f"http://127.0.0.1:{free_port()}/v1"},
        "unresolved": {"kind": "openai", "endpoint": "http://no-such-host.invalid/v1"},
        "secure": {"kind": "openai", "endpoint": f"{secure.url}/v1", "ca": trusted},
        "secure_by_name": {"kind": "openai", "endpoint": by_name, "ca": trusted},
        "distrusted": {"kind": "openai", "endpoint": f"{secure.url}/v1", "ca": distrusted},
    }


def _chain(*providers: str, **more: Any) -> dict[str, Any]:
    targets = [{"provider": name, "priority": number} for number, name in enumerate(providers)]
    return {"targets": targets, **more}


def _models() -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for number in range(PAIRS + LIMITED):
        first, second = f"first-{number}", f"second-{number}"
        pairs[f"pair-{number}"] = _chain(first, second)
        pairs[f"impatient-model-{number}"] = _chain(first, second, timeouts={"first_byte_s": IMPATIENT_S})
        pairs[f"claude-{number}"] = _chain(f"first_anthropic-{number}", f"second_anthropic-{number}")
        pairs[f"renamed-{number}"] = {
            "targets": [
                {"provider": first, "model": "name-at-first", "priority": 0},
                {"provider": second, "model": "a-longer-name-at-second", "priority": 1},
            ]
        }
    return {
        **pairs,
        "alone": _chain("lonely"),
        "impatient-provider": _chain("impatient", "light"),
        "from-closed": _chain("closed", "light"),
        "from-unresolved": _chain("unresolved", "light"),
        "secure": _chain("secure"),
        "secure-by-name": _chain("secure_by_name"),
        "from-distrusted": _chain("distrusted", "light"),
        "none-reachable": _chain("closed", "unresolved", "distrusted"),
        "weighted": {
            "targets": [
                {"provider": "heavy", "weight": 3},
                {"provider": "light", "weight": 1},
                {"provider": "secure", "priority": 1},
            ]
        },
    }
