"""The admin port: what it answers, to whom, and what it counts."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import httpx
import pytest

from extproc.config.snapshot import Admin
from extproc.server.admin import Metrics, serve_admin
from extproc.server.watch import Passed
from tests.gateway import free_port


class Fake:
    """A supervisor whose state a test sets."""

    def __init__(self) -> None:
        self.state: list[str] = []

    def problems(self) -> list[str]:
        return self.state

    def status(self) -> dict[str, object]:
        return {"workers": 2}


@pytest.fixture
async def admin() -> AsyncIterator[tuple[httpx.AsyncClient, Fake, Metrics]]:
    fake, metrics, port = Fake(), Metrics(), free_port()
    stop = await serve_admin(Admin("127.0.0.1", port), fake, metrics)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield client, fake, metrics
    await stop()


async def test_ready_is_200_only_while_nothing_is_wrong_and_alive_is_always(
    admin: tuple[httpx.AsyncClient, Fake, Metrics],
) -> None:
    client, fake, _ = admin
    assert (await client.get("/readyz")).status_code == 200
    fake.state = ["worker 0 is not running"]
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"ready": False, "problems": ["worker 0 is not running"]})
    alive = await client.get("/healthz")
    assert (alive.status_code, alive.json()["alive"], alive.json()["problems"]) == (200, True, fake.state)


OWN = ["127.0.0.1", "127.0.0.1:80", "127.9.9.9", "localhost", "localhost:10001", "LocalHost", "[::1]", "[::1]:10001"]
FOREIGN = [
    *(
        "evil.example",
        "evil.example:10001",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example#localhost",
    ),
    *("10.0.0.1", "0.0.0.0", "169.254.169.254", "[fd00::1]:80", "127.0.0.1:80:80", "localhost:80.evil.example"),
    *("evil@127.0.0.1", "127.0.0.1/evil", "[127.0.0.1", "2130706433", "0x7f.1", ""),
]


@pytest.mark.parametrize("host", OWN)
async def test_its_own_names_are_answered(admin: tuple[httpx.AsyncClient, Fake, Metrics], host: str) -> None:
    assert (await admin[0].get("/readyz", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("path", ["/readyz", "/metrics", "/nowhere"])
async def test_any_other_host_is_refused_on_every_path(
    admin: tuple[httpx.AsyncClient, Fake, Metrics], host: str, path: str
) -> None:
    answer = await admin[0].get(path, headers={"host": host})
    assert answer.status_code in (400, 403)
    assert "extproc_" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_nothing_can_be_changed(admin: tuple[httpx.AsyncClient, Fake, Metrics], method: str) -> None:
    assert (await admin[0].request(method, "/readyz")).status_code == 405


async def test_metrics_count_what_passed_by_names_of_the_file_alone(
    admin: tuple[httpx.AsyncClient, Fake, Metrics],
) -> None:
    client, _, metrics = admin
    served = Passed(
        "1", 200, "ok", 30, team="t", provider="p", input_tokens=5, output_tokens=2, cost_nusd=1_500_000_000
    )
    metrics.count(served)
    metrics.count(Passed("2", 200, "ok", 30, team="t", provider="p", unpriced=True, input_tokens=1))
    for alias in ("made-up-1", "made-up-2"):
        metrics.count(Passed(alias, 404, "refused", 1, team="t", alias=alias, code="model_not_found"))
    text = (await client.get("/metrics")).text
    for line in (
        'extproc_requests_total{outcome="ok",provider="p",team="t"} 2.0',
        'extproc_requests_total{outcome="refused",provider="",team="t"} 2.0',
        'extproc_tokens_total{kind="input",provider="p",team="t"} 6.0',
        'extproc_tokens_total{kind="output",provider="p",team="t"} 2.0',
        'extproc_cost_usd_total{provider="p",team="t"} 1.5',
        'extproc_unpriced_requests_total{provider="p",team="t"} 1.0',
        'extproc_request_duration_seconds_count{provider="p"} 2.0',
    ):
        assert line in text
    assert "made-up" not in text


def test_metrics_know_what_attempts_at_each_provider_came_to() -> None:
    metrics = Metrics()
    for tried in ("a:503,b:200", "a:none,b:429", "a:200"):
        metrics.count(Passed("1", 200, "ok", 1, provider="b", tried=tried))
    a, b, c = metrics.providers(("a", "b", "c"))
    assert (a["attempts"], a["failures"], a["failures_in_a_row"], a["last_failure"]) == (3, 2, 0, "none")
    assert (b["attempts"], b["failures"], b["failures_in_a_row"], b["last_failure"]) == (2, 1, 1, "429")
    assert (c["name"], c["attempts"], c["last_failure"]) == ("c", 0, None)


async def test_a_taken_port_is_an_os_error() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(OSError, match="in use"):
            await serve_admin(Admin("127.0.0.1", listener.getsockname()[1]), Fake(), Metrics())
