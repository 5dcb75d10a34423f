"""The transport on libnghttp2 (PyPI `ngh2`) and asyncio: a tenth of grpcio's CPU for a short stream.

The edge's outermost part: it listens, and drains; `ngh2_connection` speaks. The surprising thing: a socket that was
given is neither made nor removed here. It belongs to the parent that forked this worker, and outlives it.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from extproc.server.ngh2_connection import Connection
from extproc.server.ngh2_stream import Limits
from extproc.server.transport import Listener, Method, MutualTls, TcpAddress

_ENVELOPE_BYTES = 1 << 20
"""What headers, metadata and framing may add to the largest body in one message."""
_BACKLOG = 1024
_LAST_WORDS_S = 0.2


class Ngh2Transport:
    """See `transport.Transport`. `max_body_bytes` bounds what one message may hold; `ping_every_s`: see `Limits`.

    `tls` is for a TCP socket that was given; an address has its own.
    """

    def __init__(
        self,
        listener: Listener,
        methods: Sequence[Method],
        *,
        max_body_bytes: int,
        ping_every_s: float = 30.0,
        tls: MutualTls | None = None,
    ) -> None:
        self._listener = listener
        self._tls = tls
        self._methods = {method.path.encode(): method for method in methods}
        self._limits = Limits(max_body_bytes + _ENVELOPE_BYTES, ping_every_s=ping_every_s)
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        match self._listener:
            case Path() as path:
                path.unlink(missing_ok=True)
                self._server = await loop.create_unix_server(self._connect, str(path), backlog=_BACKLOG)
                path.chmod(0o600)
            case socket.socket() as listening:
                self._server = await self._serve_given(listening)
            case TcpAddress(host, port, tls):
                self._server = await loop.create_server(
                    self._connect, host, port, ssl=tls.context() if tls else None, backlog=_BACKLOG
                )
            case _ as never:
                assert_never(never)

    async def drain(self, grace_s: float) -> None:
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._connections):
            connection.shut_down()
        await self._wait_until_closed(grace_s)
        for connection in tuple(self._connections):
            connection.close()
        await self._wait_until_closed(_LAST_WORDS_S)
        for connection in tuple(self._connections):
            connection.cut()
        await asyncio.sleep(0)  # connection_lost comes by way of the loop

    async def _wait_until_closed(self, timeout_s: float) -> None:
        closed = [connection.closed for connection in self._connections]
        if closed:
            await asyncio.wait(closed, timeout=timeout_s)

    async def _serve_given(self, listening: socket.socket) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        if listening.family != socket.AF_UNIX:
            context = self._tls.context() if self._tls else None
            return await loop.create_server(self._connect, sock=listening, ssl=context, backlog=_BACKLOG)
        if sys.version_info >= (3, 13):
            return await loop.create_unix_server(self._connect, sock=listening, backlog=_BACKLOG, cleanup_socket=False)
        return await loop.create_unix_server(self._connect, sock=listening, backlog=_BACKLOG)

    def _connect(self) -> Connection:
        return Connection(self._methods, self._limits, self._connections)
