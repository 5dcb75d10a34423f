"""Envoy from outside: is its port free, and, over its admin socket in the run folder, is it live, drain it, end it.

Used by the supervisor. The surprising thing: it is no TCP port. Envoy's admin pages can stop Envoy and show its
configuration, and no user but the gateway's own can open the socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from pathlib import Path

import aiohttp

from extproc.config.snapshot import Listen

_log = logging.getLogger(__name__)
_POLL_S = 0.05
_DROPPED = "access_logs.grpc_access_log.logs_dropped"
_ACTIVE = "http.gateway.downstream_rq_active"


def check_port_free(listen: Listen) -> None:
    """Raises OSError where another program listens there.

    Envoy would not: it shares the port (SO_REUSEPORT) with another gateway's Envoy, and each gets half of the requests.
    """
    family = socket.AF_INET6 if ":" in listen.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose last connections linger is free
        try:
            probe.bind((listen.address, listen.port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"cannot listen on {listen.address} port {listen.port}: {reason}") from error


class EnvoyAdmin:
    """Calls Envoy's admin pages over a Unix socket."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def wait_live(self) -> None:
        """Until Envoy serves its listeners."""
        while not await self._is_live():  # noqa: ASYNC110  (Envoy has no event to wait for)
            await asyncio.sleep(_POLL_S)

    async def _is_live(self) -> bool:
        with suppress(aiohttp.ClientError, OSError):
            return await self._call("GET", "/ready") == "LIVE\n"
        return False

    async def drain(self, timeout_s: float) -> None:
        """Take no new connections and wait until no request is open, or for `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        try:
            # The first tells open connections to close with their next answer, the second closes the port at once.
            await self._call("POST", "/drain_listeners?graceful&skip_exit")
            await self._call("POST", "/drain_listeners")
            while loop.time() < deadline and await self.active_requests() > 0:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
        except (aiohttp.ClientError, OSError) as error:
            _log.warning("Envoy could not be drained: %s", error)

    async def dropped_records(self) -> int:
        """Access-log entries that Envoy has not sent, because whoever takes them did not keep up."""
        text = await self._call("GET", f"/stats?filter=^{_DROPPED}$")
        return int(text.rpartition(":")[2]) if ":" in text else 0

    async def reopen_logs(self) -> None:
        """Write to files by the names they should have: those that were renamed are let go."""
        await self._call("POST", "/reopen_logs")

    async def quit(self) -> None:
        """End it at once, or find that it has ended."""
        with suppress(aiohttp.ClientError, OSError):
            await self._call("POST", "/quitquitquit")

    async def active_requests(self) -> int:
        """Requests that are open now."""
        text = await self._call("GET", f"/stats?filter=^{_ACTIVE}$")
        return int(text.rpartition(":")[2]) if ":" in text else 0

    async def version(self, subject: str) -> str:
        """The version of the configuration that Envoy has taken for `subject`, such as `cluster_manager.cds`."""
        text = await self._call("GET", f"/stats?type=TextReadouts&filter=^{subject}.version_text$")
        return text.rpartition(": ")[2].strip().strip('"')

    async def update_refusals(self, subject: str) -> int:
        """How many updates of `subject` Envoy has refused."""
        text = await self._call("GET", f"/stats?filter=^{subject}.update_(failure|rejected)$")
        return sum(int(line.rpartition(":")[2]) for line in text.splitlines() if ":" in line)

    async def _call(self, method: str, path: str) -> str:
        connector = aiohttp.UnixConnector(path=str(self._path))
        timeout = aiohttp.ClientTimeout(total=2)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.request(method, f"http://envoy{path}") as answer,
        ):
            return await answer.text()
