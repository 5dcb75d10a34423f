"""The admin port: `/healthz`, `/readyz` and `/metrics`, for probes and Prometheus, on loopback.

Served by the supervisor, beside the request path and never on it. The surprising thing: a request whose Host is
another name is refused, or a web page could read it through a name of its own that resolves to 127.0.0.1. `/healthz`
says that the supervisor lives, for it replaces a child that died by itself; `/readyz` says that requests are served.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from extproc.config.snapshot import Admin
from extproc.server.watch import Passed

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Health(Protocol):
    """What the supervisor knows of its children."""

    def problems(self) -> list[str]:
        """What keeps the gateway from serving, in words; empty when it serves."""
        ...

    def status(self) -> dict[str, object]:
        """Workers, configuration and providers, as `extproc status` shows them; without secrets and addresses."""
        ...


@dataclass(frozen=True, slots=True)
class _Attempts:
    attempts: int = 0
    failures: int = 0
    failures_in_a_row: int = 0
    last_failure: str | None = None

    def after(self, answer: str) -> _Attempts:
        """`answer` is a status, or `none`."""
        failed = not answer.isdecimal() or int(answer) >= 500 or answer in ("401", "403", "408", "429")
        return _Attempts(
            attempts=self.attempts + 1,
            failures=self.failures + failed,
            failures_in_a_row=self.failures_in_a_row + 1 if failed else 0,
            last_failure=answer if failed else self.last_failure,
        )


class Metrics:
    """Counters of what passed. Labels are names from gateway.yaml alone: a client can not make series grow."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "extproc_requests", "Finished requests.", ("team", "provider", "outcome"), registry=self.registry
        )
        self._tokens = Counter(
            "extproc_tokens", "Tokens, as reported or estimated.", ("team", "provider", "kind"), registry=self.registry
        )
        self._cost = Counter(
            "extproc_cost_usd", "Cost of priced requests.", ("team", "provider"), registry=self.registry
        )
        self._unpriced = Counter(
            "extproc_unpriced_requests",
            "Requests whose model has no price.",
            ("team", "provider"),
            registry=self.registry,
        )
        self._duration = Histogram(
            "extproc_request_duration_seconds",
            "From the first byte of the request to the last of the answer.",
            ("provider",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._providers: dict[str, _Attempts] = {}

    def providers(self, names: Iterable[str]) -> list[dict[str, object]]:
        """What attempts at each provider came to since the start."""
        return [{"name": name, **asdict(self._providers.get(name, _Attempts()))} for name in names]

    def count(self, passed: Passed) -> None:
        for made in filter(None, passed.tried.split(",")):
            name, _, answer = made.rpartition(":")
            self._providers[name] = self._providers.get(name, _Attempts()).after(answer)
        team, provider = passed.team or "", passed.provider or ""
        self._requests.labels(team, provider, passed.outcome).inc()
        self._tokens.labels(team, provider, "input").inc(passed.input_tokens)
        self._tokens.labels(team, provider, "output").inc(passed.output_tokens)
        if passed.cost_nusd is not None:
            self._cost.labels(team, provider).inc(passed.cost_nusd / 1e9)
        if passed.unpriced:
            self._unpriced.labels(team, provider).inc()
        self._duration.labels(provider).observe(passed.duration_ms / 1000)


def application(health: Health, metrics: Metrics) -> web.Application:
    """The admin pages."""

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"alive": True, "problems": health.problems(), **health.status()})

    async def readyz(_: web.Request) -> web.Response:
        problems = health.problems()
        return web.json_response({"ready": not problems, "problems": problems}, status=503 if problems else 200)

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    app = web.Application(middlewares=[_own_host_only])
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", scrape)
    return app


async def serve_admin(admin: Admin, health: Health, metrics: Metrics) -> Callable[[], Awaitable[None]]:
    """Listen; returns the coroutine function that stops. Raises OSError when the port is taken."""
    runner = web.AppRunner(application(health, metrics), access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, admin.address, admin.port).start()
    return runner.cleanup


@web.middleware
async def _own_host_only(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    if not _is_own(request.host):
        raise web.HTTPForbidden(text="This page answers to its own address only.\n")
    return await handler(request)


_HOST = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::\d*)?")
"""RFC 9110, section 7.2: a name or address, IPv6 in brackets, and perhaps a port."""


def _is_own(host: str) -> bool:
    """localhost or a loopback address, with or without a port."""
    match = _HOST.fullmatch(host)
    name = (match[1] or match[2]).lower() if match else ""
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
