"""One gRPC call on libnghttp2: the messages that arrive, the session that answers them, the status at the end.

Between `ngh2_connection`, which owns the bytes and the life of streams, and a `transport.Session`. The surprising
thing: a call rarely costs a task. A session's coroutine is stepped once in place, and only one that really waits (a
prompt counted in a thread) is handed to the event loop; what the peer sends meanwhile is not acknowledged, so that its
window closes.
"""

from __future__ import annotations

import asyncio
import logging
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import ngh2

from extproc.server.grpc_framing import HEADERS, OK, Headers, LazyMetadata, Messages, framed, refused_as_http, trailers
from extproc.server.transport import Metadata, Method, Replies, Session, Shape, Status, StatusError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may take. A message holds a body and what its envelope adds."""

    message_bytes: int
    gathered_bytes: int = 1 << 29
    """Of messages that are not whole yet, or wait for their session: beyond it the stream that adds to them fails."""
    queued_bytes: int = 1 << 26
    """Of answers: beyond it the peer's windows are opened no further, until it has read half of them."""
    queued_pieces: int = 1 << 19
    """The same for their number: a small piece takes ten times its size."""
    ping_every_s: float = 30.0
    """A peer that is silent this long is pinged, and one that is silent this long after its ping is cut off."""


@dataclass(slots=True)
class Wire:
    """What the streams of one connection share."""

    h2: ngh2.Connection
    limits: Limits
    flush: Callable[[], None]
    choked: bool = False
    """So much waits to be sent that nothing more is asked for."""
    gathered_bytes: int = 0
    queued_pieces: int = 0
    """At most: counted until nothing is queued."""

    def acknowledge(self, stream_id: int, amount: int) -> None:
        """Let the peer send `amount` bytes more. Also for a stream that is gone: they count in both windows."""
        if amount:
            try:
                self.h2.acknowledge_received_data(amount, stream_id)
            except ngh2.NGH2Error:
                _log.debug("the connection ended before %d bytes were acknowledged", amount)


class Stream:
    """One call of `method`. `answered` once nothing more is to be said: a status was sent, or no one listens."""

    __slots__ = (
        "_ended_by_peer", "_gathered", "_held_bytes", "_messages", "_method", "_session", "_started", "_task", "_wire",
        "answered", "id", "old", "spoke",
    )  # fmt: skip

    def __init__(self, stream_id: int, method: Method, wire: Wire) -> None:
        self.id = stream_id
        self.answered = False
        self.spoke = False
        self.old = False
        self._method = method
        self._wire = wire
        self._messages = Messages(wire.limits.message_bytes)
        self._ended_by_peer = False
        self._started = False
        self._task: asyncio.Task[None] | None = None
        self._gathered = 0
        self._held_bytes = 0

    def open(self, fields: Mapping[bytes, bytes], *, ends: bool) -> None:
        """The request's headers have come; with `ends`, nothing else will."""
        no_grpc = refused_as_http(fields)
        if no_grpc is not None:
            self._end((), no_grpc)
            return
        try:
            self._session: Session = self._method.open(LazyMetadata(fields))
        except Exception as error:
            self._fail(error)
        else:
            if ends:
                self.feed(b"", ends=True)

    def feed(self, data: bytes, *, ends: bool) -> None:
        """A DATA frame, or with `ends` also the end of the peer's side."""
        wire = self._wire
        if self.answered:
            wire.acknowledge(self.id, len(data))
            return
        self._ended_by_peer |= ends
        self._messages.feed(data)
        if self._task is not None or wire.choked:
            self._held_bytes += len(data)
        else:
            wire.acknowledge(self.id, len(data))
        if self._task is None:
            self._advance()
        if not self._messages.rest and not self._gathered:
            return
        self._count()
        if wire.gathered_bytes > wire.limits.gathered_bytes and not self.answered:
            self._fail(StatusError(Status.RESOURCE_EXHAUSTED, "too many bytes wait to become messages"))

    def release(self) -> bool:
        """Say and hear nothing more. True when this has given the peer room to send."""
        self.answered = True
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._messages.clear()
        self._count()
        return self._acknowledge_held()

    def unchoke(self) -> bool:
        """The peer has read what was queued. True when this has given it room to send."""
        return self._task is None and self._acknowledge_held()

    def _count(self) -> None:
        size = len(self._messages.rest)
        self._wire.gathered_bytes += size - self._gathered
        self._gathered = size

    def _acknowledge_held(self) -> bool:
        held, self._held_bytes = self._held_bytes, 0
        self._wire.acknowledge(self.id, held)
        return held > 0

    # Messages

    def _advance(self) -> None:
        """Give the session every whole message that is there, until it must wait or the stream is over."""
        messages = self._messages
        try:
            while messages.rest and (message := messages.take()) is not None:
                self.spoke = True
                self._give(message)
                if self._task is not None or self.answered:
                    return
            if self._ended_by_peer:
                if messages.rest:
                    raise StatusError(Status.INTERNAL, "the stream ended inside a message")
                if self._method.shape is Shape.UNARY:
                    raise StatusError(Status.INTERNAL, "the stream ended without a message")
                self._end(self._session.finish())
        except (Exception, asyncio.CancelledError) as error:
            self._fail(error)

    def _give(self, message: bytes) -> None:
        """Give one message to the session, and send its answer or leave that to a task."""
        answer = self._session.receive(message)
        if isinstance(answer, Coroutine):
            try:
                waiting = answer.send(None)
            except StopIteration as done:
                self._answer(done.value)
            else:
                later = self._answer_later(_resumed(answer, waiting))
                later.send(None)
                self._task = asyncio.get_running_loop().create_task(later)
        elif isinstance(answer, AsyncIterator):
            self._task = asyncio.get_running_loop().create_task(self._answer_along(answer))
        else:
            self._answer(answer)

    async def _answer_later(self, replies: Awaitable[Replies]) -> None:
        try:
            answer = await replies
            self._go_on(answer)
        except (Exception, asyncio.CancelledError) as error:
            self._stop_for(error)
        self._wire.flush()

    async def _answer_along(self, replies: AsyncIterator[bytes]) -> None:
        try:
            async for reply in replies:
                self._send((reply,))
                self._wire.flush()
            self._go_on(())
        except (Exception, asyncio.CancelledError) as error:
            self._stop_for(error)
        self._wire.flush()

    def _stop_for(self, error: BaseException) -> None:
        """The task failed. A cancellation is the peer's doing, or else that of something that the session awaited."""
        self._task = None
        if isinstance(error, asyncio.CancelledError) and self.answered:
            raise error
        self._fail(error)

    def _go_on(self, replies: Replies) -> None:
        """A session that made the peer wait has answered."""
        self._task = None
        if not self._wire.choked:
            self._acknowledge_held()
        self._answer(replies)
        if not self.answered:
            self._advance()
            self._count()

    # Answers

    def _answer(self, replies: Replies) -> None:
        shape = self._method.shape
        if shape is Shape.UNARY:
            self._end(replies)
        elif self._session.done:
            self._end(self._session.finish() if shape is Shape.CLIENT_STREAM else replies)
        elif replies and shape is Shape.BIDI:
            self._send(replies)

    def _send(self, replies: Replies) -> None:
        if self.answered:
            return
        h2 = self._wire.h2
        try:
            if not self._started:
                self._started = True
                h2.send_response(self.id, HEADERS)
            for reply in replies:
                for piece in framed(reply):
                    self._wire.queued_pieces += 1
                    h2.send_data(self.id, piece)
        except ngh2.NGH2Error:  # the peer has ended the stream meanwhile; the event that says so is on its way
            _log.debug("stream %d ended before its answer", self.id)
            self.release()

    def _end(self, replies: Replies, last: Headers = OK) -> None:
        """Send what is left and then the status, or with a `:status` in `last` that HTTP response."""
        if replies:
            self._send(replies)
        if self.answered:
            return
        try:
            if self._started:
                self._wire.h2.send_trailers(self.id, last)
            else:
                whole = last if last[0][0] == b":status" else (*HEADERS, *last)
                self._wire.h2.send_response(self.id, whole, end_stream=True)
        except ngh2.NGH2Error:
            _log.debug("stream %d ended before its status", self.id)
        self.release()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, StatusError):
            self._end((), trailers(error))
        elif not self.answered:
            _log.error("a session of %s failed", self._method.path, exc_info=error)
            self._end((), trailers(StatusError(Status.INTERNAL, "internal error")))


def _no_such_method(_: Metadata) -> Session:
    raise StatusError(Status.UNIMPLEMENTED, "no such method")


UNKNOWN = Method("an unknown method", Shape.BIDI, _no_such_method)


@types.coroutine
def _resumed(coroutine: Coroutine[Any, Any, Replies], waiting: Any) -> Generator[Any, Any, Replies]:
    """Go on, inside a task, with a coroutine that was stepped once and yielded `waiting`."""
    value: Any = None
    error: BaseException | None = None
    try:
        yield  # the task takes over here; one that is cancelled before must cancel the session all the same
    except asyncio.CancelledError as cancelled:
        error = cancelled
        if waiting is not None:
            waiting.cancel()
    while True:
        if error is None:
            try:
                value = yield waiting
            except BaseException as thrown:
                error = thrown
        try:
            waiting = coroutine.send(value) if error is None else coroutine.throw(error)
        except StopIteration as done:
            return cast(Replies, done.value)
        error = None
