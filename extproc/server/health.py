"""The standard gRPC health service (grpc.health.v1), so that whoever balances over workers can ask one.

Beside the two services of the gateway on every transport. The surprising thing: a watcher's stream is ended when the
process begins to drain. It has then heard NOT_SERVING, and would otherwise hold up the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from extproc.server.transport import Answer, Method, Replies, Shape, Status, StatusError

CHECK_PATH = "/grpc.health.v1.Health/Check"
WATCH_PATH = "/grpc.health.v1.Health/Watch"

_SERVING = HealthCheckResponse(status=HealthCheckResponse.SERVING).SerializeToString()
_NOT_SERVING = HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING).SerializeToString()
_UNKNOWN = HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN).SerializeToString()


class Health:
    """Whether this process serves `methods`: one answer for each of their services, and for "", the whole."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self._services = {"", *(method.path.split("/")[1] for method in methods)}
        self._serving = True
        self._stopped = asyncio.Event()

    def methods(self) -> tuple[Method, Method]:
        """Check and Watch."""
        return (
            Method(CHECK_PATH, Shape.UNARY, lambda _: _Check(self)),
            Method(WATCH_PATH, Shape.BIDI, lambda _: _Watch(self)),
        )

    def stop(self) -> None:
        """Say NOT_SERVING from now on. Call it before the transport drains."""
        self._serving = False
        self._stopped.set()

    def status_of(self, service: str) -> bytes:
        """The answer about `service`, as a HealthCheckResponse."""
        if service not in self._services:
            return _UNKNOWN
        return _SERVING if self._serving else _NOT_SERVING

    async def changes_of(self, service: str) -> AsyncIterator[bytes]:
        """The answer now, and the one after `stop`."""
        first = self.status_of(service)
        yield first
        await self._stopped.wait()
        if (last := self.status_of(service)) is not first:
            yield last


class _Check:
    __slots__ = ("_health",)
    done = True

    def __init__(self, health: Health) -> None:
        self._health = health

    def receive(self, message: bytes) -> Replies:
        answer = self._health.status_of(_service(message))
        if answer is _UNKNOWN:
            raise StatusError(Status.NOT_FOUND, "unknown service")
        return (answer,)

    def finish(self) -> Replies:
        return ()


class _Watch:
    __slots__ = ("_health",)
    done = True

    def __init__(self, health: Health) -> None:
        self._health = health

    def receive(self, message: bytes) -> Answer:
        return self._health.changes_of(_service(message))

    def finish(self) -> Replies:
        return ()


def _service(message: bytes) -> str:
    try:
        return HealthCheckRequest.FromString(message).service
    except DecodeError as error:
        raise StatusError(Status.INTERNAL, "the request is no HealthCheckRequest") from error
