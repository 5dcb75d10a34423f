"""The small interface between a gRPC server and what it serves: whole messages as bytes, one session a stream.

Everything in `server` above it is written against this file, so that another HTTP/2 stack can take grpcio's place.
The surprising thing: a session answers at once where it can, and returns an awaitable only where it must wait, so a
transport need not make a task for each message.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

Replies = Sequence[bytes]
Metadata = Mapping[str, str]


class Shape(Enum):
    """How many messages go each way."""

    UNARY = auto()
    CLIENT_STREAM = auto()
    """Replies are sent when the client has ended its side: what `finish` returns."""
    BIDI = auto()


class Session(Protocol):
    """One gRPC stream. A message is given to `receive` only after the answer to the one before was taken."""

    def receive(self, message: bytes) -> Replies | Awaitable[Replies]:
        """Answer one message; an empty sequence is no answer yet."""
        ...

    def finish(self) -> Replies:
        """The client sends no more; what is returned here is sent last. Not called when the stream is reset."""
        ...


@dataclass(frozen=True, slots=True)
class Method:
    """One gRPC method: its full path (`/package.Service/Method`), its shape, and how a session of it begins."""

    path: str
    shape: Shape
    open: Callable[[Metadata], Session]


class Transport(Protocol):
    """A gRPC server."""

    async def start(self) -> None:
        """Listen. Raises OSError when the address can not be bound."""
        ...

    async def drain(self, grace_s: float) -> None:
        """Take no new streams, let open ones end, and cut what is left after `grace_s`."""
        ...
