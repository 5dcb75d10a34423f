"""What sets one kind of provider apart from another, as data that decide, render and record share.

The surprising thing: `endpoint` in gateway.yaml is what that provider's own SDK takes as its base URL. OpenAI's ends
in `/v1` and its SDK appends `/chat/completions`; Anthropic's has no version and its SDK appends `/v1/messages`. So the
client's `/v1` is cut off for one and kept for the other (`version_in_endpoint`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from extproc.errors import Dialect

ProviderKind = Literal["openai", "anthropic", "demo"]


@dataclass(frozen=True, slots=True)
class Kind:
    """`credential_prefix` stands before the secret in `credential_header`; `vendor_host` is where list prices hold."""

    default_endpoint: str
    version_in_endpoint: bool
    credential_header: str
    credential_prefix: str
    dialects: frozenset[Dialect]
    vendor: Literal["openai", "anthropic"] | None
    vendor_host: str


KINDS: dict[ProviderKind, Kind] = {
    "openai": Kind(
        default_endpoint="https://api.openai.com/v1",
        version_in_endpoint=True,
        credential_header="authorization",
        credential_prefix="Bearer ",
        dialects=frozenset((Dialect.OPENAI,)),
        vendor="openai",
        vendor_host="api.openai.com",
    ),
    "anthropic": Kind(
        default_endpoint="https://api.anthropic.com",
        version_in_endpoint=False,
        credential_header="x-api-key",
        credential_prefix="",
        dialects=frozenset((Dialect.ANTHROPIC,)),
        vendor="anthropic",
        vendor_host="api.anthropic.com",
    ),
    "demo": Kind(
        default_endpoint="",
        version_in_endpoint=False,
        credential_header="",
        credential_prefix="",
        dialects=frozenset(Dialect),
        vendor=None,
        vendor_host="",
    ),
}

CREDENTIAL_HEADERS = ("authorization", "x-api-key", "api-key", "x-goog-api-key", "proxy-authorization")
"""Never forwarded as the client sent them, whatever the provider."""
