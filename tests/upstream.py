"""A fake provider that writes down every byte it is sent and misbehaves on command: the far end of end-to-end tests.

`with RecordingUpstream() as upstream:` serves on a loopback port from its own thread and event loop, so that sync
tests, SDK clients and subprocesses can all talk to it. The surprising thing: it speaks HTTP/1.1 by itself (see
`upstream_http`). A library would tidy header order, case and framing away, which are what a gateway's tests are about.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Self

import trustme

from tests.upstream_answers import NOTHING, Usage, sse
from tests.upstream_http import Answering, HangUp, MalformedError, Reader, Recorded, Reply, read_body, read_head, reset

__all__ = ["NOTHING", "Recorded", "RecordingUpstream", "Reply", "Rule", "Served", "Usage", "sse"]

TURNS_TO_CONNECT = 5


@dataclass(slots=True)
class Rule:
    """When a reply is used. `hits` counts how often it was, `seen` the requests that matched its conditions."""

    reply: Reply
    path: str
    method: str | None
    times: int | None
    ordinals: Collection[int] | None
    where: Callable[[Recorded], bool] | None
    hits: int = 0
    seen: int = 0

    def takes(self, request: Recorded) -> bool:
        if not fnmatchcase(request.path, self.path) or self.method not in (None, request.method):
            return False
        if self.where is not None and not self.where(request):
            return False
        self.seen += 1
        if (self.ordinals is not None and self.seen not in self.ordinals) or self.hits == self.times:
            return False
        self.hits += 1
        return True


@dataclass(frozen=True, slots=True)
class Served:
    """A line of the upstream's own ledger."""

    marker: str | None
    request_id: str | None
    path: str
    status: int | None
    usage: Usage | None
    completed: bool
    client_left: bool


class RecordingUpstream:
    """The fake provider. `usage` and `model` set what default answers report; `usage` may depend on the request.

    Entering starts it and leaving ends it. `stop()` kills it as a crash would: open connections are reset and new
    ones refused, until `start()` brings it back on the same port.
    """

    def __init__(
        self,
        *,
        tls: bool = False,
        usage: Usage | Callable[[Recorded], Usage] = Usage(),  # noqa: B008 - frozen
        model: str | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.usage = usage
        self.model = model
        self.host = host
        self.port = 0
        self.requests: list[Recorded] = []
        self.malformed: list[bytes] = []
        self.rules: list[Rule] = []
        self.connections = 0
        self._authority = trustme.CA() if tls else None
        self._open: set[asyncio.StreamWriter] = set()
        self._ordinal = 0
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="recording-upstream", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, _: TracebackType | None
    ) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        """Scheme, host and port, without a path; the name on the certificate is the host's and `localhost`."""
        return f"{'http' if self._authority is None else 'https'}://{self.host}:{self.port}"

    def write_ca(self, folder: Path) -> Path:
        """Write the private CA's certificate (PEM) into `folder` and return its path; only with `tls`."""
        assert self._authority is not None
        path = folder / "upstream-ca.pem"
        self._authority.cert_pem.write_to_path(str(path))
        return path

    def start(self) -> None:
        """Listen: on a free port at first, on the same one ever after."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def stop(self) -> None:
        """Refuse new connections and reset those that are open."""
        asyncio.run_coroutine_threadsafe(self._crash(), self._loop).result()

    def behave(
        self,
        reply: Reply,
        *,
        path: str = "*",
        method: str | None = None,
        times: int | None = None,
        ordinals: Collection[int] | None = None,
        where: Callable[[Recorded], bool] | None = None,
    ) -> Rule:
        """Answer matching requests with `reply`; the oldest rule that takes a request wins.

        `path` is a glob, `times` how often the rule holds (None: always), `ordinals` which of the matching requests
        it takes (from 1), `where` any further condition.
        """
        rule = Rule(reply, path, method, times, ordinals, where)
        self.rules.append(rule)
        return rule

    def behave_normally(self) -> None:
        """Forget every rule."""
        self.rules.clear()

    def clear(self) -> None:
        """Forget the requests recorded so far, and with them the ledger; the rules stay."""
        self.requests.clear()
        self.malformed.clear()

    def ledger(self) -> list[Served]:
        """The upstream's own account of every request, oldest first."""
        return [
            Served(it.marker, it.header("x-request-id"), it.path, it.status, it.usage, it.completed, it.client_left)
            for it in list(self.requests)
        ]

    def usage_total(self, *, completed_only: bool = True) -> Usage:
        """The sum of what was served; with `completed_only=False` also what broken answers would have cost."""
        counted = (line.usage for line in self.ledger() if line.usage and (line.completed or not completed_only))
        return sum(counted, start=NOTHING)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Block until `condition` holds. Raises AssertionError when it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"the upstream waited {timeout_s} s in vain"
            time.sleep(0.002)

    def wait_for_requests(self, number: int, timeout_s: float = 10.0) -> list[Recorded]:
        """Block until `number` requests are finished, answered or not, and none is under way; return all."""
        self.wait_for(
            lambda: len(self.requests) >= number and all(it.finished for it in list(self.requests)), timeout_s
        )
        return list(self.requests)

    async def _listen(self) -> None:
        context = None
        if self._authority is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.set_alpn_protocols(["http/1.1"])
            self._authority.issue_cert(self.host, "localhost").configure_cert(context)

        def accept() -> asyncio.StreamReaderProtocol:
            reader = Reader()
            return asyncio.StreamReaderProtocol(reader, lambda _, writer: self._connected(reader, writer))

        self._server = await self._loop.create_server(accept, self.host, self.port, ssl=context, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _crash(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            # Closing at once would leak a connection accepted in this turn of the loop (asyncio asserts that its
            # server is open, and drops the socket unclosed). So accept no more, let it through to be turned away
            # in `_connected`, then close; the kernel resets what it had queued.
            for listener in server.sockets:
                self._loop.remove_reader(listener.fileno())
            for _ in range(TURNS_TO_CONNECT):
                await asyncio.sleep(0)
            server.close()
        for writer in list(self._open):
            reset(writer)
        while self._open:
            await asyncio.sleep(0.001)

    async def _connected(self, reader: Reader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        if self._server is None:
            reset(writer)
            return
        self._open.add(writer)
        # With no buffer of its own, `drain` returns when the kernel has all of it: "completed" means handed over.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            while await self._exchange(reader, writer, number):
                pass
            writer.close()
        except HangUp as script:
            if script.reset:
                reset(writer)
            writer.close()
        except MalformedError as malformed:
            self.malformed.append(malformed.raw)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client left, and the request says so
        finally:
            if not writer.is_closing():
                writer.transport.abort()
            self._open.discard(writer)

    async def _exchange(self, reader: Reader, writer: asyncio.StreamWriter, connection: int) -> bool:
        """Serve one request; False when the connection ends in order."""
        request = await read_head(reader, connection, self._ordinal + 1)
        if request is None:
            return False
        self._ordinal += 1
        self.requests.append(request)
        try:
            await read_body(reader, writer, request)
            rule = next((rule for rule in list(self.rules) if rule.takes(request)), None)
            reply = Reply() if rule is None else rule.reply
            usage = self.usage if isinstance(self.usage, Usage) else self.usage(request)
            await Answering(request, reader, writer, reply).run(usage, self.model)
        except (OSError, asyncio.IncompleteReadError):
            request.client_left = self._server is not None  # else it is this side that went
            raise
        finally:
            request.finished = True
        return request.version != "HTTP/1.0" and (request.header("connection") or "").lower() != "close"
