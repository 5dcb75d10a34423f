"""The admin port: `/healthz`, `/readyz` and `/metrics`, for probes and Prometheus, on loopback.

Served by the supervisor, beside the request path and never on it. The surprising thing: a request whose Host is
another name is refused, or a web page could read it through a name of its own that resolves to 127.0.0.1.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def count(self, passed: Passed) -> None:
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
        problems = health.problems()
        return web.json_response({"healthy": not problems, "problems": problems}, status=503 if problems else 200)

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    app = web.Application(middlewares=[_own_host_only])
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", healthz)
    app.router.add_get("/metrics", scrape)
    return app


async def serve_admin(admin: Admin, health: Health, metrics: Metrics) -> Callable[[], object]:
    """Listen; returns the coroutine function that stops. Raises OSError when the port is taken."""
    runner = web.AppRunner(application(health, metrics), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, admin.address, admin.port, shutdown_timeout=1).start()
    return runner.cleanup


@web.middleware
async def _own_host_only(request: web.Request, handler: Callable[[web.Request], object]) -> web.StreamResponse:
    if not _is_own(request.host):
        raise web.HTTPForbidden(text="This page answers to its own address only.\n")
    return await handler(request)  # type: ignore[misc, no-any-return]


def _is_own(host: str) -> bool:
    """localhost or a loopback address, with or without a port."""
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 or host.startswith("[") else host
    name = name.strip("[]")
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
