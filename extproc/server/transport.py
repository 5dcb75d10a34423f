"""The small interface between a gRPC server and what it serves: whole messages as bytes, one session a stream.

Everything in `server` above it is written against this file, so that one HTTP/2 stack can take another's place. The
surprising thing: a session answers at once where it can, and returns an awaitable only where it must wait, so a
transport need not make a task for each message.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from pathlib import Path
from typing import Any, Protocol

Replies = Sequence[bytes]
Answer = Replies | Coroutine[Any, Any, Replies] | AsyncIterator[bytes]
Metadata = Mapping[str, str]


class Status(IntEnum):
    """The gRPC status codes that are used here (grpc/doc/statuscodes.md)."""

    OK = 0
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class StatusError(Exception):
    """A session ends its stream with a status that is not OK. `message` is sent to the peer."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Shape(Enum):
    """How many messages go each way."""

    UNARY = auto()
    """`receive` is called once and answers with one message."""
    CLIENT_STREAM = auto()
    """One message is sent when the client has ended its side or the session is done: what `finish` returns."""
    BIDI = auto()
    """Any number of messages each way, in any order; on the wire a server stream is one of these."""


class Session(Protocol):
    """One gRPC stream. A message is given to `receive` only after the answer to the one before was taken."""

    @property
    def done(self) -> bool:
        """True when nothing more is to be said: the stream is ended without waiting for the peer to end it."""
        ...

    def receive(self, message: bytes) -> Answer:
        """Answer one message; an empty sequence is no answer yet. Raises StatusError to end the stream.

        An iterator sends (BIDI only) as it goes, and is not slowed down by a peer that reads slowly. A coroutine runs
        outside any task up to where it first waits: what needs one there (`asyncio.timeout`) makes its own. When the
        peer resets the stream, what still waits is cancelled.
        """
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


@dataclass(frozen=True, slots=True)
class MutualTls:
    """PEM files of a server that takes only clients with a certificate of `client_ca`."""

    certificate: Path
    private_key: Path
    client_ca: Path

    def context(self) -> ssl.SSLContext:
        """For Python's own TLS, HTTP/2 alone. Raises OSError, with the files' names, where they are no good."""
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.client_ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 9113 section 9.2
            context.verify_mode = ssl.CERT_REQUIRED
            # With a password given, though a wrong one, OpenSSL asks nobody for that of an encrypted key.
            context.load_cert_chain(self.certificate, self.private_key, password="")
        except (OSError, ValueError) as error:
            names = f"certificate {self.certificate}, key {self.private_key}, client CA {self.client_ca}"
            raise OSError(f"TLS can not begin with {names}: {getattr(error, 'strerror', None) or error}") from error
        context.set_alpn_protocols(["h2"])
        return context


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Where an Envoy on another machine finds this process. Whoever connects is obeyed: no `tls` on loopback alone."""

    host: str
    port: int
    tls: MutualTls | None


Listener = Path | socket.socket | TcpAddress
"""A Unix socket's path (made anew, mode 0600), a socket that listens already, or an address."""


class Transport(Protocol):
    """A gRPC server."""

    async def start(self) -> None:
        """Listen. Raises OSError when the address can not be bound or a file of its TLS can not be read."""
        ...

    async def drain(self, grace_s: float) -> None:
        """Take no new streams, let open ones end, and cut what is left after `grace_s`."""
        ...
