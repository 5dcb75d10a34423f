"""A provider that costs next to nothing: a process of its own that answers chat requests with bytes built beforehand.

`python -m tests.bench.upstream` prints its port and ends when standard input does. The surprising thing: it never
parses JSON. It counts a body's bytes and looks for one mark in its first two kilobytes (`traffic.MARK`).
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import cast

import uvloop

from tests.bench.traffic import HOLD, MARK, MARK_WITHIN_BYTES, json_answer, stream_chunk, stream_end, stream_head

CHUNK_EVERY_S = 0.005
"""Long enough that chunks of one stream are not read as one; short enough that a stream of 200 ends in a second."""
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_WANTED = re.compile(re.escape(MARK) + rb"(-?\d+)")
_LAST_CHUNK = b"0\r\n\r\n"
_HEAD, _CHUNK = stream_head(), stream_chunk()


class Upstream(asyncio.Protocol):
    """One connection. Requests on it come one after another."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._loop = asyncio.get_running_loop()
        self._held = bytearray()
        self._in_body = False
        self._missing: int | None = None
        self._body_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is one in all but its bases

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            self._held += data
            end = self._held.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = bytes(self._held[: end + 2]), bytes(self._held[end + 4 :])
            self._held.clear()
            self._in_body = True
            self._body_bytes = 0
            length = _LENGTH.search(head)
            self._missing = int(length[1]) if length else None if _CHUNKED.search(head) else 0
        self._body_bytes += len(data)
        room = MARK_WITHIN_BYTES - len(self._held)
        if room > 0:
            self._held += data[:room]
        if self._missing is not None:
            self._missing -= len(data)
        if self._missing == 0 or (self._missing is None and data.endswith(_LAST_CHUNK)):
            self._answer()

    def _answer(self) -> None:
        assert self._transport is not None
        wanted = _WANTED.search(self._held)
        chunks = int(wanted[1]) if wanted else 0
        self._held.clear()
        self._in_body = False
        if chunks == 0:
            self._transport.write(json_answer(self._body_bytes))
            return
        self._transport.write(_HEAD)
        self._stream(chunks)

    def _stream(self, left: int) -> None:
        if self._transport is None:
            return
        if left == 0:
            self._transport.write(stream_end(self._body_bytes))
            return
        self._transport.write(_CHUNK)
        if left != HOLD:
            self._loop.call_later(CHUNK_EVERY_S, self._stream, left - 1)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(_serve())
