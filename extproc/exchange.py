"""One HTTP exchange without I/O: the events that Envoy shows us and the actions we answer with.

The values are msgspec structs: made several times for each request, at a fifth of what frozen dataclasses cost to make.
This is the seam between the gRPC edge (`server`) and the moments (`decide`, `adapt`): neither side of it knows the
other's types. The surprising thing: an exchange has at most two events. Responses never come here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

MetadataValue = str | float | bool | Sequence[str]
"""What one field of Envoy's dynamic metadata may hold here. Numbers travel as doubles."""


class Headers:
    """Request headers as Envoy's HTTP layer gives them: lower-case names, values as latin-1 text, repeats kept.

    `first` maps each name to the first value that came; `repeats` holds, in order, those that came after it.
    """

    __slots__ = ("_first", "_repeats")

    def __init__(self, first: Mapping[str, bytes], repeats: Sequence[tuple[str, bytes]] = ()) -> None:
        self._first = first
        self._repeats = repeats

    def get(self, name: str) -> str | None:
        """The first value of `name`, or None."""
        value = self._first.get(name)
        return None if value is None else value.decode("latin-1")

    def all(self, name: str) -> list[str]:
        """Every value of `name`, in order of arrival."""
        first = self.get(name)
        if first is None:
            return []
        return [first, *(value.decode("latin-1") for key, value in self._repeats if key == name)]


class RequestHeaders(msgspec.Struct, frozen=True):
    """The first event. `ends` is true when no body follows."""

    headers: Headers
    ends: bool

    @property
    def method(self) -> str:
        return self.headers.get(":method") or ""

    @property
    def path(self) -> str:
        """Path and query, normalised once by Envoy (RFC 3986 section 6, slashes merged)."""
        return self.headers.get(":path") or ""

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id") or ""


class Proceed(msgspec.Struct, frozen=True):
    """Let the request go on to its body; nothing is decided yet, and without a decision nothing is routed."""


class Respond(msgspec.Struct, frozen=True):
    """Answer the client here. `metadata` is what the record moment will see of it."""

    status: int
    body: bytes
    metadata: Mapping[str, MetadataValue]
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    details: str = "extproc"


class Route(msgspec.Struct, frozen=True):
    """Send the request along `chain` (clusters, one for each attempt), with `metadata` for the later moments.

    `body` is None where the client's bytes pass untouched.
    """

    chain: tuple[str, ...]
    metadata: Mapping[str, MetadataValue]
    set_headers: tuple[tuple[str, str], ...]
    body: bytes | None = None


class Rewrite(msgspec.Struct, frozen=True):
    """Give one attempt another body than the one decide left; None leaves it."""

    body: bytes | None = None


Action = Proceed | Respond | Route | Rewrite
