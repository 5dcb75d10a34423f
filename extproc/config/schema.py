"""gateway.yaml as a person writes it: one pydantic model for each part, an unknown key is an error.

The edge of the configuration: `source` validates a document against `Gateway`, `compile` turns it into the snapshot.
The surprising thing: a key that the design names but this version does not enforce is refused like an unknown one. A
budget that is accepted and not enforced would fail open.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from extproc.config import fields as f
from extproc.config.document import KeyPath
from extproc.providers.kinds import ProviderKind

NOT_ENFORCED = frozenset(
    {"budgets", "limits", "tools", "identity", "guardrails", "mcp", "policies", "telemetry", "expect_model", "valkey"},
)
KINDS_NOT_SERVED = frozenset({"bedrock", "gemini", "azure_openai"})


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Listen(_Part):
    """Where clients connect."""

    address: f.IpAddress = Field(default="0.0.0.0", description="The IP address to listen on.")  # noqa: S104
    port: f.Port = Field(default=10000, description="The port that clients connect to.")
    max_body_bytes: int = Field(
        default=33554432, ge=1, le=1 << 30, description="The largest request body, in bytes, itself allowed."
    )


class Admin(_Part):
    """Health, readiness and metrics, for this machine only."""

    address: f.Loopback = Field(default="127.0.0.1", description="A loopback IP address.")
    port: f.Port = Field(default=10001, description="The port of /healthz, /readyz and /metrics.")


class State(_Part):
    """Where the ledger is kept."""

    sql: f.SqlAddress = Field(
        default="sqlite:///extproc.db",
        description="A SQLite file (relative: from this file's folder) or a PostgreSQL URL without password; "
        "{env} or {file} for a URL with one.",
    )


class Timeouts(_Part):
    """How long to wait for a provider; there is no limit on a whole stream."""

    first_byte_s: f.Seconds = Field(default=60.0, description="Seconds from the request's end to the response headers.")
    stream_idle_s: f.Seconds = Field(default=300.0, description="Seconds between two chunks of a stream.")


class TimeoutOverrides(_Part):
    """The same for one provider or model; what is left out comes from the wider setting."""

    first_byte_s: f.Seconds | None = Field(
        default=None, description="Seconds from the request's end to the response headers."
    )
    stream_idle_s: f.Seconds | None = Field(default=None, description="Seconds between two chunks of a stream.")


class CaFile(_Part):
    """A private certificate authority."""

    file: str = Field(min_length=1, description="A PEM file; relative paths are from this file's folder.")


class Provider(_Part):
    """One upstream that serves models."""

    kind: ProviderKind = Field(
        description="The API it speaks: openai (and every compatible server), anthropic, or the built-in demo."
    )
    endpoint: f.BaseUrl | None = Field(
        default=None, description="The base URL, as that provider's own SDK takes it. Absent: the public service."
    )
    api_key: f.SecretReference | None = Field(
        default=None, description="The provider's credential, {env: NAME} or {file: PATH}."
    )
    headers: dict[f.HeaderName, f.HeaderValue] = Field(
        default={}, description="Extra request headers, without credentials."
    )
    ca: CaFile | None = Field(
        default=None, description="The authority that signed its certificate, if a private one did."
    )
    timeouts: TimeoutOverrides = Field(default=TimeoutOverrides(), description="How long to wait for this provider.")
    stream_usage: bool = Field(
        default=True, description="Ask for usage at the end of streams. Switch off for a server that refuses it."
    )
    optional: bool = Field(
        default=False, description="Leave it out, with its targets, where its variable or file is missing."
    )


class Target(_Part):
    """One place where a model is served."""

    provider: str = Field(description="A name from `providers:`.")
    model: f.Name | None = Field(
        default=None, description="The provider's own name of the model. Absent: the name asked for."
    )
    priority: int = Field(default=0, ge=0, le=1000, description="The lowest number is tried first.")
    weight: int = Field(
        default=1, ge=1, le=10000, description="The share of the requests among targets of one priority."
    )


class Model(_Part):
    """A model that clients may ask for."""

    targets: tuple[Target, ...] = Field(strict=False, min_length=1, description="Where it is served.")
    timeouts: TimeoutOverrides | None = Field(default=None, description="How long to wait for this model.")
    order: Literal["weight", "latency", "cost"] = Field(
        default="weight",
        description="Which target of one priority comes first: drawn by weight, the one that answered first lately, or "
        "the one whose price is lowest.",
    )


class Price(_Part):
    """USD per million tokens."""

    input: f.Usd = Field(description="USD per million input tokens.")
    output: f.Usd = Field(description="USD per million output tokens.")
    cached_input: f.Usd | None = Field(
        default=None, description="USD per million tokens read from a cache. Absent: as input."
    )
    cache_write: f.Usd | None = Field(
        default=None, description="USD per million tokens written to a cache. Absent: as input."
    )


class Key(_Part):
    """A virtual key; only its digest stands here."""

    id: f.PlainName = Field(description="Its name in records and in `spend`, once in the file.")
    sha256: f.Sha256 = Field(description="The hex digest of the whole key; `extproc keys hash` prints it.")
    project: f.Name | None = Field(default=None, description="The project that its use is charged to.")
    user: f.Name | None = Field(default=None, description="The person who holds it.")
    agent: f.Name | None = Field(default=None, description="The program that holds it.")
    models: tuple[f.Allowance, ...] | None = Field(
        default=None, strict=False, description="Narrows the team's models for this key: names and globs, `!` denies."
    )


class Team(_Part):
    """Who may use what."""

    models: tuple[f.Allowance, ...] = Field(
        default=(),
        strict=False,
        description='Names and globs from `models:`, `!` denies. Absent: none. ["*"]: all of them.',
    )
    default_provider: str | None = Field(
        default=None,
        description='Serves paths that name no model, for keys with models ["*"]. A name from `providers:`.',
    )
    keys: tuple[Key, ...] = Field(default=(), strict=False, description="The keys of this team.")


class Gateway(_Part):
    """The whole file."""

    listen: Listen = Field(default=Listen(), description="Where clients connect, and the largest body.")
    admin: Admin = Field(default=Admin(), description="Health, readiness and metrics.")
    state: State = Field(default=State(), description="Where the ledger is kept: SQLite or PostgreSQL.")
    timeouts: Timeouts = Field(default=Timeouts(), description="How long to wait for providers.")
    providers: dict[f.ProviderName, Provider] = Field(min_length=1, description="The upstreams, by a name of your own.")
    models: dict[f.ModelName, Model] = Field(
        default={},
        description="The models that clients may name: aliases, or globs such as `gpt-*`; the first match serves.",
    )
    prices: dict[f.PriceKey, Price] = Field(
        default={}, description='Prices by "provider/model", globs allowed; else from the bundled price data.'
    )
    teams: dict[f.PlainName, Team] = Field(default={}, description="Who may use what, and with which keys.")


@cache
def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of gateway.yaml, for editors; `extproc schema` prints it."""
    schema = Gateway.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "extproc gateway.yaml",
        "description": "One file says everything: where to listen, the providers, the models, the teams and keys.",
    }


def part_at(path: KeyPath) -> dict[str, Any]:
    """The JSON schema of the part at `path` of a document, with its `properties`; empty where nothing is known."""
    root = json_schema()
    node: dict[str, Any] = root
    for step in (*path, None):
        variants = node.get("anyOf", [node])
        node = next((v for v in variants if v.get("type") not in ("null", "string")), variants[0])
        if "$ref" in node:
            node = root["$defs"][node["$ref"].rpartition("/")[2]]
        if step is None:
            break
        rest = node.get("items") if isinstance(step, int) else node.get("additionalProperties")
        node = node.get("properties", {}).get(step) or (rest if isinstance(rest, dict) else {})
    return node
