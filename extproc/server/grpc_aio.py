"""The transport on grpcio's asyncio server, over a Unix socket or TCP with mutual TLS.

The edge's outermost part. The surprising thing: it hands bytes through unparsed. Which protobuf a method speaks is the
session's matter, so the same sessions run on any transport.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, assert_never

import grpc
import grpc.aio

from extproc.server.transport import (
    Listener,
    Method,
    MutualTls,
    Replies,
    Session,
    Shape,
    StatusError,
    TcpAddress,
)  # fmt: skip

_log = logging.getLogger(__name__)

_ENVELOPE_BYTES = 1 << 20
"""What headers, metadata and framing may add to the largest body in one message."""


class GrpcAioTransport:
    """See `transport.Transport`. `max_body_bytes` bounds what one message may hold."""

    def __init__(
        self, listener: Listener, methods: Sequence[Method], *, max_body_bytes: int, ping_every_s: float = 30.0
    ) -> None:
        size = max_body_bytes + _ENVELOPE_BYTES
        ping_every_ms = int(ping_every_s * 1000)
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", ping_every_ms),
                ("grpc.keepalive_timeout_ms", ping_every_ms),
            ]
        )
        self._server.add_generic_rpc_handlers((_Methods(methods),))
        self._listener = listener

    async def start(self) -> None:
        try:
            self._bind()
        except RuntimeError as error:
            raise OSError(str(error)) from error
        await self._server.start()

    async def drain(self, grace_s: float) -> None:
        await self._server.stop(grace_s)

    def _bind(self) -> None:
        match self._listener:
            case Path() as path:
                self._bind_at(path)
            case socket.socket() as listening:
                # grpcio takes no socket that listens already: it makes its own in the same place.
                path = Path(listening.getsockname())
                listening.close()
                self._bind_at(path)
            case TcpAddress(host, port, tls):
                where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                if tls is None:
                    self._server.add_insecure_port(where)
                else:
                    self._server.add_secure_port(where, _credentials(tls))
            case _ as never:
                assert_never(never)

    def _bind_at(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{path}")
        path.chmod(0o600)


def _credentials(tls: MutualTls) -> grpc.ServerCredentials:
    pair = (tls.private_key.read_bytes(), tls.certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], tls.client_ca.read_bytes(), require_client_auth=True)


class _Methods(grpc.GenericRpcHandler):
    def __init__(self, methods: Sequence[Method]) -> None:
        self._handlers = {method.path: _handler(method) for method in methods}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return self._handlers.get(details.method)


def _handler(method: Method) -> Any:
    match method.shape:
        case Shape.BIDI:
            return grpc.stream_stream_rpc_method_handler(_bidi(method))
        case Shape.CLIENT_STREAM:
            return grpc.stream_unary_rpc_method_handler(_client_stream(method))
        case Shape.UNARY:
            return grpc.unary_unary_rpc_method_handler(_unary(method))


# Functions, not callable objects: grpcio asks `inspect` whether a behaviour is an async generator.


def _bidi(method: Method) -> Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]:
    async def bidi(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            session = _open(method, context)
            async for message in requests:
                async for reply in _replies(session, message):
                    yield reply
                if session.done:
                    return
            for reply in session.finish():
                yield reply
            return
        except Exception as error:
            failed = error
        await _abort(method, context, failed)

    return bidi


def _client_stream(method: Method) -> Callable[[AsyncIterator[bytes], Any], Awaitable[bytes]]:
    async def client_stream(requests: AsyncIterator[bytes], context: Any) -> bytes:
        try:
            session = _open(method, context)
            async for message in requests:
                async for _ in _replies(session, message):
                    pass
                if session.done:
                    break
            return b"".join(session.finish())
        except Exception as error:
            failed = error
        return await _abort(method, context, failed)

    return client_stream


def _unary(method: Method) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def unary(message: bytes, context: Any) -> bytes:
        try:
            return b"".join([reply async for reply in _replies(_open(method, context), message)])
        except Exception as error:
            failed = error
        return await _abort(method, context, failed)

    return unary


def _open(method: Method, context: Any) -> Session:
    return method.open({str(key): str(value) for key, value in context.invocation_metadata() or ()})


async def _replies(session: Session, message: bytes) -> AsyncIterator[bytes]:
    answer = session.receive(message)
    if isinstance(answer, AsyncIterator):
        async for reply in answer:
            yield reply
        return
    replies: Replies = await answer if isinstance(answer, Awaitable) else answer
    for reply in replies:
        yield reply


async def _abort(method: Method, context: Any, error: Exception) -> bytes:
    """End the call with the session's status; what it failed with otherwise is for the log alone. Always raises."""
    if isinstance(error, StatusError):
        code = next(code for code in grpc.StatusCode if code.value[0] == error.status)
        await context.abort(code, error.message)
    _log.error("a session of %s failed", method.path, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error")
    raise AssertionError("abort always raises")
