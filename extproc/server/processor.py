"""The ext_proc service: one session for each stream, either Envoy's listener asking to decide or a cluster to adapt.

Between transport and moments. The surprising thing: one method serves both moments. A cluster's filter says which
provider it is in gRPC metadata (`x-extproc-provider`), the listener's says nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from extproc.adapt.pipeline import adapt
from extproc.decide.pipeline import Admitted, Decider
from extproc.decide.refusals import unavailable
from extproc.decision import ATTEMPTS_NAMESPACE, NAMESPACE
from extproc.errors import Dialect
from extproc.exchange import Proceed, RequestHeaders, Respond, Rewrite, Route
from extproc.server import envoy
from extproc.server.transport import Metadata, Method, Replies, Session, Shape

PATH = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
PROVIDER_METADATA = "x-extproc-provider"

_log = logging.getLogger(__name__)


def method(decider: Callable[[], Decider]) -> Method:
    """The ext_proc method. `decider` gives the one of the current snapshot; a stream keeps the one it began with."""

    def begin(metadata: Metadata) -> Session:
        return AdaptSession() if PROVIDER_METADATA in metadata else DecideSession(decider())

    return Method(PATH, Shape.BIDI, begin)


class DecideSession:
    """Headers, then the body if there is one, then done."""

    __slots__ = ("_admitted", "_decider", "done")

    def __init__(self, decider: Decider) -> None:
        self._decider = decider
        self._admitted: Admitted | None = None
        self.done = False

    async def receive(self, message: bytes) -> Replies:
        event, _ = envoy.parse(message)
        match event:
            case RequestHeaders():
                action = await self._on_headers(event)
                self.done = not isinstance(action, Proceed)
                return (envoy.answer_headers(action),)
            case envoy.RequestBody(body):
                self.done = True
                return (envoy.answer_body(await self._on_body(body)),)
            case None:
                raise RuntimeError("Envoy sent a message that its configuration does not ask for")

    def finish(self) -> Replies:
        return ()

    async def _on_headers(self, event: RequestHeaders) -> Proceed | Respond | Route:
        try:
            admitted = self._decider.admit(event)
            if isinstance(admitted, Respond):
                return admitted
            if event.ends:
                return await self._decider.decide(admitted, b"")
        except Exception:
            _log.exception("decide failed on the headers of %s", event.request_id)
            return unavailable(Dialect.OPENAI, event.request_id)
        self._admitted = admitted
        return Proceed()

    async def _on_body(self, body: bytes) -> Respond | Route:
        admitted = self._admitted
        if admitted is None:
            raise RuntimeError("Envoy sent a body without headers that were admitted")
        try:
            return await self._decider.decide(admitted, body)
        except Exception:
            _log.exception("decide failed on the body of %s", admitted.request_id)
            return unavailable(admitted.endpoint.dialect, admitted.request_id)


class AdaptSession:
    """One attempt: its headers tell the content type, the body is rewritten for that attempt's target."""

    __slots__ = ("_content_type", "done")

    def __init__(self) -> None:
        self._content_type = ""
        self.done = False

    def receive(self, message: bytes) -> Replies:
        event, metadata = envoy.parse(message)
        match event:
            case RequestHeaders(headers):
                self._content_type = headers.get("content-type") or ""
                return (envoy.answer_headers(Proceed()),)
            case envoy.RequestBody(body):
                self.done = True
                return (envoy.answer_body(self._adapt(metadata, body)),)
            case None:
                raise RuntimeError("Envoy sent a message that its configuration does not ask for")

    def finish(self) -> Replies:
        return ()

    def _adapt(self, metadata: Any, body: bytes) -> Rewrite:
        spaces = metadata.filter_metadata
        decision = envoy.read_decision(spaces[NAMESPACE])
        if decision is None:
            raise RuntimeError("a request reached a cluster without a decision")
        number = int(spaces[ATTEMPTS_NAMESPACE].fields["n"].number_value)
        return adapt(decision, number, self._content_type, body)
