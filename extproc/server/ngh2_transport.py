"""The transport on libnghttp2 (PyPI `ngh2`) in an asyncio protocol: a tenth of grpcio's CPU for a short stream.

The edge's outermost part. The surprising thing: a stream rarely costs a task. A session's coroutine is stepped once in
place, and only one that really waits (a prompt counted in a thread) is handed to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import types
from collections.abc import Coroutine, Generator, Sequence
from pathlib import Path
from typing import Any, cast

import ngh2

from extproc.server.transport import Metadata, Method, Replies, Session, Shape, Status, StatusError

_log = logging.getLogger(__name__)

_HEADERS = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_OK = ((b"grpc-status", b"0"),)
_PREFIX_BYTES = 5
_STREAM_WINDOW_BYTES = 1 << 20
_CONNECTION_WINDOW_BYTES = 1 << 26
_MAX_STREAMS = 100_000
_QUEUE_LIMIT_BYTES = 1 << 26
"""What may wait to be sent on one connection before its requests are no longer read."""
_PING_EVERY_S = 30.0
_CONFIGURATION = ngh2.Configuration(
    auto_window_update=False,
    # Envoy resets each ext_proc stream when it is done with it; nghttp2 takes more than 33 a second for an attack.
    stream_reset_rate_limit=(1_000_000, 1_000_000),
    max_inbound_header_list_size=1 << 16,
    max_inbound_header_count=256,
)


class Ngh2Transport:
    """See `transport.Transport`. `max_body_bytes` bounds what one message may hold."""

    def __init__(self, socket: Any, methods: Sequence[Method], *, max_body_bytes: int) -> None:
        self._socket = socket
        self._methods = {method.path.encode(): method for method in methods}
        self._max_message_bytes = max_body_bytes + (1 << 20)
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        if not isinstance(self._socket, Path):
            self._server = await loop.create_unix_server(self._connect, sock=self._socket, backlog=1024)
            return
        self._socket.unlink(missing_ok=True)
        self._server = await loop.create_unix_server(self._connect, str(self._socket), backlog=1024)
        self._socket.chmod(0o600)

    async def drain(self, grace_s: float) -> None:
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._connections):
            connection.shut_down()
        deadline = asyncio.get_running_loop().time() + grace_s
        while any(connection.open_streams for connection in self._connections):
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.01)
        for connection in tuple(self._connections):
            connection.close()

    def _connect(self) -> _Connection:
        return _Connection(self._methods, self._max_message_bytes, self._connections)


class _Stream:
    """One gRPC call: its session, the bytes of the message that is arriving, and how far its answer has gone."""

    __slots__ = ("buffer", "ended_by_peer", "held_bytes", "method", "session", "started", "task")

    def __init__(self, method: Method, session: Session) -> None:
        self.method = method
        self.session = session
        self.buffer = bytearray()
        self.started = False
        self.ended_by_peer = False
        self.task: asyncio.Task[None] | None = None
        self.held_bytes = 0
        """Received while the session is busy, and not yet acknowledged: the peer's window closes meanwhile."""


class _Connection(asyncio.Protocol):
    """One HTTP/2 connection."""

    def __init__(self, methods: dict[bytes, Method], max_message_bytes: int, all_: set[_Connection]) -> None:
        self._methods = methods
        self._max_message_bytes = max_message_bytes
        self._all = all_
        self._h2 = ngh2.Connection(ngh2.Role.SERVER, _CONFIGURATION)
        self._streams: dict[int, _Stream] = {}
        self._transport: asyncio.Transport | None = None
        self._may_write = True
        self._shutting_down = False
        self._ping_unanswered = False
        self._pinger: asyncio.TimerHandle | None = None

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._all.add(self)
        self._h2.initiate_connection(
            {
                ngh2.Setting.MAX_CONCURRENT_STREAMS: _MAX_STREAMS,
                ngh2.Setting.INITIAL_WINDOW_SIZE: _STREAM_WINDOW_BYTES,
            }
        )
        self._h2.set_local_window_size(_CONNECTION_WINDOW_BYTES)
        self._flush()
        self._ping_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.discard(self)
        self._transport = None
        if self._pinger is not None:
            self._pinger.cancel()
        for stream in self._streams.values():
            if stream.task is not None:
                stream.task.cancel()
        self._streams.clear()

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            self._h2.receive_data(data)
            self._on_events()
            self._flush()
        except ngh2.NGH2Error as error:
            _log.warning("a peer's HTTP/2 connection is closed: %s", error)
            self.close()

    # Ending

    def shut_down(self) -> None:
        """Say that no new stream is taken (RFC 9113 section 6.8); open ones go on."""
        self._shutting_down = True
        try:
            self._h2.send_shutdown_notice()
            self._h2.send_goaway()
        except ngh2.NGH2Error:
            self.close()
            return
        self._flush()

    def close(self) -> None:
        """Write what is ready and close."""
        if self._transport is not None:
            self._transport.close()

    # Events

    def _on_events(self) -> None:
        for event in self._h2.events():
            kind = type(event)
            if kind is ngh2.DataReceived:
                self._on_data(event)
            elif kind is ngh2.RequestReceived:
                self._on_request(event)
            elif kind is ngh2.StreamClosed or kind is ngh2.StreamReset:
                self._forget(event.stream_id)
            elif kind is ngh2.TrailersReceived:
                self._on_end(event.stream_id)
            elif kind is ngh2.PingAcknowledged:
                self._ping_unanswered = False
            elif kind is ngh2.ConnectionClosed:
                self._flush()
                self.close()

    def _on_request(self, event: Any) -> None:
        headers: Metadata = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
        method = self._methods.get(headers.get(":path", "").encode("latin-1"))
        if method is None or not headers.get("content-type", "").startswith("application/grpc"):
            self._refuse(event.stream_id, Status.UNIMPLEMENTED, "no such method")
            return
        self._streams[event.stream_id] = _Stream(method, method.open(headers))
        if event.end_stream:
            self._on_end(event.stream_id)

    def _on_data(self, event: Any) -> None:
        stream_id: int = event.stream_id
        data: bytes = event.data
        stream = self._streams.get(stream_id)
        if stream is None:
            self._acknowledge(stream_id, len(data))
            return
        stream.buffer += data
        if stream.task is None:
            self._acknowledge(stream_id, len(data))
        else:
            stream.held_bytes += len(data)
        if event.end_stream:
            stream.ended_by_peer = True
        if stream.task is None:
            self._advance(stream_id, stream)

    def _on_end(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.ended_by_peer = True
            if stream.task is None:
                self._advance(stream_id, stream)

    def _forget(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None and stream.task is not None:
            stream.task.cancel()

    def _acknowledge(self, stream_id: int, amount: int) -> None:
        if amount:
            try:
                self._h2.acknowledge_received_data(amount, stream_id)
            except ngh2.StreamUnavailableError:
                _log.debug("stream %d ended before its bytes were acknowledged", stream_id)

    # Messages

    def _advance(self, stream_id: int, stream: _Stream) -> None:
        """Give the session every whole message that is there, until it must wait or the stream is over."""
        try:
            while (message := self._next_message(stream)) is not None:
                waiting = self._give(stream_id, stream, message)
                if waiting or stream_id not in self._streams:
                    return
            if stream.ended_by_peer:
                if stream.buffer:
                    raise StatusError(Status.INTERNAL, "the stream ended inside a message")
                self._end(stream_id, stream, () if stream.method.shape is Shape.UNARY else stream.session.finish())
        except StatusError as error:
            self._fail(stream_id, stream, error.status, error.message)
        except Exception:
            _log.exception("a session of %s failed", stream.method.path)
            self._fail(stream_id, stream, Status.INTERNAL, "internal error")

    def _next_message(self, stream: _Stream) -> bytes | None:
        """The next whole length-prefixed message (gRPC over HTTP/2), or None. Raises StatusError."""
        buffer = stream.buffer
        if len(buffer) < _PREFIX_BYTES:
            return None
        if buffer[0]:
            raise StatusError(Status.UNIMPLEMENTED, "compressed messages are not taken")
        size = int.from_bytes(buffer[1:_PREFIX_BYTES], "big")
        if size > self._max_message_bytes:
            raise StatusError(Status.RESOURCE_EXHAUSTED, f"a message may have at most {self._max_message_bytes} bytes")
        end = _PREFIX_BYTES + size
        if len(buffer) < end:
            return None
        message = bytes(buffer[_PREFIX_BYTES:end])
        del buffer[:end]
        return message

    def _give(self, stream_id: int, stream: _Stream, message: bytes) -> bool:
        """Give one message to the session and send its answer; True when the answer is still to come."""
        replies = stream.session.receive(message)
        if isinstance(replies, Coroutine):
            try:
                waiting = replies.send(None)
            except StopIteration as done:
                replies = done.value
            else:
                stream.task = asyncio.ensure_future(self._answer_later(stream_id, stream, _resume(replies, waiting)))
                return True
        self._answer(stream_id, stream, replies)  # type: ignore[arg-type]
        return False

    async def _answer_later(self, stream_id: int, stream: _Stream, replies: Any) -> None:
        try:
            answer = await replies
        except StatusError as error:
            self._fail(stream_id, stream, error.status, error.message)
        except Exception:
            _log.exception("a session of %s failed", stream.method.path)
            self._fail(stream_id, stream, Status.INTERNAL, "internal error")
        else:
            stream.task = None
            self._acknowledge(stream_id, stream.held_bytes)
            stream.held_bytes = 0
            if stream_id in self._streams:
                self._answer(stream_id, stream, answer)
                self._advance(stream_id, stream)
        self._flush()

    # Answers

    def _answer(self, stream_id: int, stream: _Stream, replies: Replies) -> None:
        if stream.method.shape is Shape.UNARY:
            self._end(stream_id, stream, replies)
            return
        try:
            self._send(stream_id, stream, replies)
        except ngh2.NGH2Error:  # the peer has ended the stream meanwhile
            self._forget(stream_id)
            return
        if stream.session.done:
            self._end(stream_id, stream, ())

    def _send(self, stream_id: int, stream: _Stream, replies: Replies) -> None:
        if replies and not stream.started:
            stream.started = True
            self._h2.send_response(stream_id, _HEADERS)
        for reply in replies:
            self._h2.send_data(stream_id, b"\0" + len(reply).to_bytes(4, "big") + reply)

    def _end(self, stream_id: int, stream: _Stream, replies: Replies) -> None:
        self._streams.pop(stream_id, None)
        try:
            self._send(stream_id, stream, replies)
            if stream.started:
                self._h2.send_trailers(stream_id, _OK)
            else:
                self._h2.send_response(stream_id, (*_HEADERS, *_OK), end_stream=True)
        except ngh2.NGH2Error:
            _log.debug("stream %d ended before its answer", stream_id)

    def _fail(self, stream_id: int, stream: _Stream, status: Status, message: str) -> None:
        self._streams.pop(stream_id, None)
        trailers = _trailers(status, message)
        try:
            if stream.started:
                self._h2.send_trailers(stream_id, trailers)
            else:
                self._h2.send_response(stream_id, (*_HEADERS, *trailers), end_stream=True)
        except ngh2.NGH2Error:
            _log.debug("stream %d ended before its status", stream_id)

    def _refuse(self, stream_id: int, status: Status, message: str) -> None:
        self._h2.send_response(stream_id, (*_HEADERS, *_trailers(status, message)), end_stream=True)

    # Bytes out

    def _flush(self) -> None:
        transport = self._transport
        if transport is None:
            return
        if self._may_write:
            data = self._h2.data_to_send()
            if data:
                transport.write(data)
            for event in self._h2.events():
                if isinstance(event, ngh2.StreamClosed):
                    self._forget(event.stream_id)
                elif isinstance(event, ngh2.ConnectionClosed):
                    self.close()
                    return
        elif self._h2.queued_body_size() > _QUEUE_LIMIT_BYTES:
            transport.pause_reading()
            return
        if not transport.is_reading() and not transport.is_closing():
            transport.resume_reading()

    def _ping_later(self) -> None:
        self._pinger = asyncio.get_running_loop().call_later(_PING_EVERY_S, self._ping)

    def _ping(self) -> None:
        """A peer that is gone without a word is found by a ping that no one answers."""
        if self._ping_unanswered:
            _log.warning("a peer did not answer for %.0f s and is cut off", _PING_EVERY_S)
            if self._transport is not None:
                self._transport.abort()
            return
        try:
            self._h2.ping()
        except ngh2.NGH2Error:
            self.close()
            return
        self._ping_unanswered = True
        self._flush()
        self._ping_later()


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, Replies], waiting: Any) -> Generator[Any, Any, Replies]:
    """Go on with a coroutine that was stepped once and yielded `waiting`, now inside a task."""
    try:
        yield waiting
    except BaseException:
        coroutine.close()
        raise
    return (yield from coroutine)


def _trailers(status: Status, message: str) -> tuple[tuple[bytes, bytes], ...]:
    """grpc-status and the message, percent-encoded where it must be (gRPC over HTTP/2, Status-Message)."""
    encoded = "".join(char if " " <= char <= "~" and char != "%" else "?" for char in message)
    return ((b"grpc-status", str(int(status)).encode()), (b"grpc-message", encoded.encode()))
