"""Envoy's own admin interface, on a Unix socket in the run folder: is it live, and drain it before the end.

Used by the supervisor. The surprising thing: it is no TCP port. Envoy's admin pages can stop Envoy and show its
configuration, and no user but the gateway's own can open the socket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import aiohttp

from extproc.server.children import ChildFailedError

_log = logging.getLogger(__name__)
_POLL_S = 0.05
_ACTIVE = "http.gateway.downstream_rq_active"


class EnvoyAdmin:
    """Calls Envoy's admin pages over `socket`."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def wait_live(self, may_wait: Callable[[], bool], timeout_s: float) -> None:
        """Until Envoy serves its listeners. Raises ChildFailedError when it has ended or does not come up."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < deadline:
            if not may_wait():
                raise ChildFailedError("Envoy ended while starting (is its port taken?)")
            with suppress(aiohttp.ClientError, OSError):
                if await self._call("GET", "/ready") == "LIVE\n":
                    return
            await asyncio.sleep(_POLL_S)
        raise ChildFailedError("Envoy did not become ready")

    async def drain(self, timeout_s: float) -> None:
        """Take no new connections and wait until no request is open, or for `timeout_s`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            await self._call("POST", "/drain_listeners?graceful&skip_exit")
            while await self.active_requests() > 0 and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(_POLL_S)
        except (aiohttp.ClientError, OSError) as error:
            _log.warning("Envoy could not be drained: %s", error)

    async def active_requests(self) -> int:
        """Requests that are open now."""
        text = await self._call("GET", f"/stats?filter=^{_ACTIVE}$")
        return int(text.rpartition(":")[2]) if ":" in text else 0

    async def _call(self, method: str, path: str) -> str:
        connector = aiohttp.UnixConnector(path=str(self._socket))
        timeout = aiohttp.ClientTimeout(total=2)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.request(method, f"http://envoy{path}") as answer,
        ):
            return await answer.text()
