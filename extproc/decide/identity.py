"""Who is asking: the credential that a request carries, and the key it stands for.

The first step of decide, before the path is even looked at. The surprising thing: two credentials that differ are
refused rather than ranked, because whichever of them lost would have been a way to be someone else in a log.
"""

from __future__ import annotations

import re

from extproc.config.snapshot import Key, Snapshot
from extproc.errors import Code, Refusal
from extproc.exchange import Headers

_MISSING = Refusal(
    Code.MISSING_KEY, "No API key was sent. Send it as 'Authorization: Bearer <key>' or as 'x-api-key: <key>'."
)
_INVALID = Refusal(Code.INVALID_KEY, "The API key is not valid.")
_JOINED = re.compile(r",[ \t]*[a-z]+ ", re.IGNORECASE)
"""Envoy joins repeated Authorization headers with a comma; no key holds one with a scheme and a space behind it."""
_CONFLICT = Refusal(Code.CONFLICTING_CREDENTIALS, "The request carries more than one credential; send exactly one.")


def identify(headers: Headers, snapshot: Snapshot) -> Key | Refusal:
    """The key behind the request's only credential (RFC 6750 section 2.1, or Anthropic's `x-api-key`)."""
    credential = _credential(headers)
    if isinstance(credential, Refusal):
        return credential
    # Header values come as Latin-1 text; the digest is of the bytes that were sent.
    sent = credential.encode("latin-1").decode("utf-8", "surrogateescape")
    return snapshot.key_for(sent) or _INVALID


def _credential(headers: Headers) -> str | Refusal:
    """The one credential. An empty header carries none."""
    bearers = [value for value in headers.all("authorization") if value]
    keys = [value for value in headers.all("x-api-key") if value]
    if len(bearers) > 1 or len(keys) > 1 or (bearers and _JOINED.search(bearers[0])):
        return _CONFLICT
    if not bearers:
        return keys[0] if keys else _MISSING
    scheme, _, token = bearers[0].partition(" ")
    token = token.strip(" ")
    if scheme.lower() != "bearer" or not token:
        return _INVALID
    return token if not keys or keys[0] == token else _CONFLICT
