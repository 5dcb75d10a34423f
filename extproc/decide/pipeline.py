"""decide: the steps of one request, in order. Read `admit` and `decide`; everything else is their vocabulary.

First moment of the path. `admit` runs on the headers, `decide` on the buffered body. The surprising thing: whatever
can be refused from the headers alone is, so that a wrong key or a body that is too large never gets to be uploaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Protocol
from urllib.parse import unquote

import msgspec

from extproc.config.snapshot import Key, Model, Snapshot
from extproc.decide import headers as headers_policy
from extproc.decide import listing, routing
from extproc.decide.identity import identify
from extproc.decide.reading import Reading, edits_for, read
from extproc.decide.refusals import MAX_MODEL_NAME, metadata_of, missed, quoted, refuse, unspoken
from extproc.decision import Decision
from extproc.dialects import endpoints
from extproc.dialects.body import splice
from extproc.dialects.endpoints import Endpoint, Miss
from extproc.errors import Code, Dialect, Refusal
from extproc.exchange import RequestHeaders, Respond, Route


class InputTokens(msgspec.Struct, frozen=True):
    """The size of a prompt: tokens, whether counted exactly, and how many bytes of text it was judged by."""

    tokens: int
    exact: bool
    text_bytes: int


class TokenMeter(Protocol):
    """Counts a prompt, cheaply where it can. Implemented in `decide.tokens`."""

    async def measure(self, endpoint: Endpoint, key_id: str, model: str, body: bytes) -> InputTokens: ...


class Admitted(msgspec.Struct, frozen=True):
    """A request whose headers passed: who asks, for what, in which dialect."""

    key: Key
    endpoint: Endpoint
    path: str
    content_type: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Decider:
    """decide for one snapshot. Holds no state of any request."""

    snapshot: Snapshot
    meter: TokenMeter
    draw: Random
    health: routing.Health = routing.NothingKnown()  # noqa: RUF009  (immutable)

    def admit(self, event: RequestHeaders) -> Admitted | Respond:
        """Headers: identity, endpoint, content type, declared length; and the answers that need no provider."""
        path, _, _ = event.path.partition("?")
        key = identify(event.headers, self.snapshot)
        dialect = endpoints.dialect_of(path, speaks_anthropic=headers_policy.speaks_anthropic(event.headers))
        if isinstance(key, Refusal):
            return refuse(key, dialect, event.request_id)
        endpoint = endpoints.find(event.method, path)
        if isinstance(endpoint, Miss):
            return refuse(missed(endpoint), dialect, event.request_id, key)
        refusal = headers_policy.refusal(event, endpoint, self.snapshot.listen.max_body_bytes)
        if refusal is not None:
            return refuse(refusal, dialect, event.request_id, key, endpoint)
        if endpoint is endpoints.MODELS:
            return self._list_models(key, dialect, event, path)
        content_type = event.headers.get("content-type") or ""
        return Admitted(key, endpoint, event.path, content_type, event.request_id)

    async def decide(self, admitted: Admitted, body: bytes) -> Route | Respond:
        """Body: what it names, whether the key may, who serves it, how large it is."""
        max_body_bytes = self.snapshot.listen.max_body_bytes
        if len(body) > max_body_bytes:
            return self._refuse(headers_policy.too_large(max_body_bytes), admitted)
        reading = read(body, admitted.endpoint, admitted.content_type)
        if isinstance(reading, Refusal):
            return self._refuse(reading, admitted)
        if reading.model is None:
            return await self._pass_through(admitted, reading)
        model = self._permitted(admitted.key, reading.model)
        if isinstance(model, Refusal):
            return self._refuse(model, admitted, reading)
        attempts = routing.attempts(
            model, reading.model, admitted.endpoint, self.snapshot, self.draw, health=self.health
        )
        if not attempts:
            return self._refuse(unspoken(reading.model, admitted.endpoint), admitted, reading)
        return await self._route(admitted, reading, model, attempts)

    def _permitted(self, key: Key, name: str) -> Model | Refusal:
        model = self.snapshot.model_for(name) if name.isprintable() and len(name) <= MAX_MODEL_NAME else None
        if model is None:
            return Refusal(Code.MODEL_NOT_FOUND, f"The model {quoted(name)} does not exist.", "model")
        if not key.allows(name):
            return Refusal(Code.MODEL_NOT_ALLOWED, f"This key may not use the model {quoted(name)}.", "model")
        return model

    async def _pass_through(self, admitted: Admitted, reading: Reading) -> Route | Respond:
        if not admitted.key.everything:
            return self._refuse(
                Refusal(Code.MODEL_NOT_ALLOWED, "This endpoint names no model, so it needs a key that may use all."),
                admitted,
            )
        provider = self.snapshot.providers.get(admitted.key.team.default_provider or "")
        if provider is None or not routing.speaks(provider, admitted.endpoint.dialect):
            return self._refuse(
                Refusal(Code.NO_DEFAULT_PROVIDER, "This endpoint names no model, and no default provider serves it."),
                admitted,
            )
        return await self._route(admitted, reading, None, (routing.Attempt(provider, ""),))

    async def _route(
        self, admitted: Admitted, reading: Reading, model: Model | None, attempts: tuple[routing.Attempt, ...]
    ) -> Route:
        first = attempts[0]
        asks_usage = all(attempt.provider.stream_usage for attempt in attempts)
        edits, hide_usage = edits_for(reading, first.model, admitted.endpoint, may_ask_usage=asks_usage)
        principal = admitted.key.principal
        size = await self.meter.measure(admitted.endpoint, principal.key_id, first.model, reading.body)
        timeouts = routing.timeouts_of(model, first.provider)
        body = splice(reading.body, edits) if edits else None
        decision = Decision(
            dialect=admitted.endpoint.dialect,
            endpoint=admitted.endpoint.name,
            request_id=admitted.request_id,
            path=admitted.path,
            team=principal.team,
            project=principal.project or "",
            user=principal.user or "",
            agent=principal.agent or "",
            key_id=principal.key_id,
            alias=reading.model or "",
            model_in_body=first.model,
            providers=tuple(attempt.provider.name for attempt in attempts),
            models=tuple(attempt.model for attempt in attempts),
            stream=reading.stream,
            hide_usage=hide_usage,
            input_tokens=size.tokens,
            input_exact=size.exact,
            text_bytes=size.text_bytes,
            revision=self.snapshot.revision,
        )
        return Route(
            chain=tuple(routing.cluster_of(attempt, first.model) for attempt in attempts),
            metadata=decision.to_metadata(),
            set_headers=headers_policy.routing_headers(timeouts, len(attempts), body),
            body=body,
        )

    def _list_models(self, key: Key, dialect: Dialect, event: RequestHeaders, path: str) -> Respond:
        names = self.snapshot.model_names_for(key)
        asked = unquote(path.removeprefix("/v1/models").removeprefix("/"))
        body = listing.one(asked, names, dialect) if asked else listing.every(names, dialect)
        if body is None:
            refusal = Refusal(Code.MODEL_NOT_FOUND, f"The model {quoted(asked)} does not exist.", "model")
            return refuse(refusal, dialect, event.request_id, key, endpoints.MODELS)
        return Respond(200, body, metadata_of(dialect, key, endpoints.MODELS), details="extproc:models")

    def _refuse(self, refusal: Refusal, admitted: Admitted, reading: Reading | None = None) -> Respond:
        return refuse(
            refusal,
            admitted.endpoint.dialect,
            admitted.request_id,
            admitted.key,
            admitted.endpoint,
            alias=(reading.model or "")[:MAX_MODEL_NAME] if reading else "",
        )
