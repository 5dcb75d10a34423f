"""Who is asking: the credential that a request carries, and the key it stands for.

The first step of decide, before the path is even looked at. The surprising thing: two credentials that differ are
refused rather than ranked, because whichever of them lost would have been a way to be someone else in a log.
"""

from __future__ import annotations

from extproc.config.snapshot import Key, Snapshot
from extproc.errors import Code, Refusal
from extproc.exchange import Headers

_MISSING = Refusal(
    Code.MISSING_KEY, "No API key was sent. Send it as 'Authorization: Bearer <key>' or as 'x-api-key: <key>'."
)
_INVALID = Refusal(Code.INVALID_KEY, "The API key is not valid.")
_CONFLICT = Refusal(Code.CONFLICTING_CREDENTIALS, "The request carries more than one credential; send exactly one.")


def identify(headers: Headers, snapshot: Snapshot) -> Key | Refusal:
    """The key behind the request's only credential (RFC 6750 section 2.1, or Anthropic's `x-api-key`)."""
    credential = _credential(headers)
    if isinstance(credential, Refusal):
        return credential
    return snapshot.key_for(credential) or _INVALID


def _credential(headers: Headers) -> str | Refusal:
    bearers, keys = headers.all("authorization"), headers.all("x-api-key")
    if len(bearers) > 1 or len(keys) > 1:
        return _CONFLICT
    if not bearers:
        return keys[0] if keys else _MISSING
    scheme, _, token = bearers[0].partition(" ")
    if scheme.lower() != "bearer" or not token:
        return _INVALID
    token = token.strip(" ")
    return token if not keys or keys[0] == token else _CONFLICT
