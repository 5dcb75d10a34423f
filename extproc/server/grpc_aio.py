"""The transport on grpcio's asyncio server, over a Unix socket.

The edge's outermost part. The surprising thing: it hands bytes through unparsed. Which protobuf a method speaks is the
session's matter, so the same sessions run on any transport.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

from extproc.server.transport import Method, Replies, Session, Shape, StatusError

_FRAME_ROOM_BYTES = 1 << 20
"""What headers, metadata and framing may add to the largest body in one message."""


class GrpcAioTransport:
    """See `transport.Transport`. `max_body_bytes` bounds what one message may hold."""

    def __init__(self, socket: Path, methods: Sequence[Method], *, max_body_bytes: int) -> None:
        size = max_body_bytes + _FRAME_ROOM_BYTES
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                ("grpc.so_reuseport", 0),
            ]
        )
        self._server.add_generic_rpc_handlers((_Methods(methods),))
        self._socket = socket

    async def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self._socket}")
        await self._server.start()
        self._socket.chmod(0o600)

    async def drain(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


class _Methods(grpc.GenericRpcHandler):
    def __init__(self, methods: Sequence[Method]) -> None:
        self._handlers = {method.path: _handler(method) for method in methods}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return self._handlers.get(details.method)


def _handler(method: Method) -> Any:
    # Functions, not callable objects: grpcio asks `inspect` whether a behaviour is an async generator.
    async def bidi(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        session = _open(method, context)
        try:
            async for message in requests:
                for reply in await _replies(session, message):
                    yield reply
                if session.done:
                    return
            for reply in session.finish():
                yield reply
        except StatusError as error:
            await _abort(context, error)

    async def client_stream(requests: AsyncIterator[bytes], context: Any) -> bytes:
        session = _open(method, context)
        try:
            async for message in requests:
                await _replies(session, message)
            return b"".join(session.finish())
        except StatusError as error:
            return await _abort(context, error)

    async def unary(message: bytes, context: Any) -> bytes:
        try:
            return b"".join(await _replies(_open(method, context), message))
        except StatusError as error:
            return await _abort(context, error)

    match method.shape:
        case Shape.BIDI:
            return grpc.stream_stream_rpc_method_handler(bidi)
        case Shape.CLIENT_STREAM:
            return grpc.stream_unary_rpc_method_handler(client_stream)
        case Shape.UNARY:
            return grpc.unary_unary_rpc_method_handler(unary)


def _open(method: Method, context: Any) -> Session:
    return method.open({str(key): str(value) for key, value in context.invocation_metadata() or ()})


async def _replies(session: Session, message: bytes) -> Replies:
    replies = session.receive(message)
    return await replies if isinstance(replies, Awaitable) else replies


async def _abort(context: Any, error: StatusError) -> NoReturn:
    code = next(code for code in grpc.StatusCode if code.value[0] == error.status)
    await context.abort(code, error.message)
    raise AssertionError("abort always raises")
