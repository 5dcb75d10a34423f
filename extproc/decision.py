"""The Decision: all that decide tells adapt, record and Envoy's own filters about one request.

It travels in Envoy's dynamic metadata (namespace `extproc.decision`), so no map in this process joins the moments and
any worker may serve any of them. The surprising thing: it is written for three readers, and two of them are not
Python: the Lua filters that render/lua holds read `path`, `models`, `dialect`, `request_id`
and `hide_usage` by name.
It never holds a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from extproc.errors import Dialect
from extproc.exchange import MetadataValue

NAMESPACE = "extproc.decision"
"""Written by decide; read by adapt, record and Lua."""
ROUTE_NAMESPACE = "extproc.route"
"""Read by Envoy's priority_group cluster specifier alone."""
ATTEMPTS_NAMESPACE = "extproc.attempts"
"""Written by the clusters' Lua filter, one set of fields for each attempt: `n`, `p1`, `s1`, `r1`, `p2`, ..."""
USAGE_NAMESPACE = "extproc.usage"
"""Written by Envoy's json_to_metadata and sse_to_metadata where its AI filter reads no usage."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One request as decided, or as refused (`code` set, and then no targets).

    `providers[i]` and `models[i]` are those of attempt i + 1. `model_in_body` is the name the body holds after decide;
    an attempt whose model differs runs through adapt. `input_tokens` is an estimate unless `input_exact`.
    """

    dialect: Dialect
    endpoint: str
    request_id: str = ""
    path: str = ""
    team: str = ""
    project: str = ""
    user: str = ""
    agent: str = ""
    key_id: str = ""
    alias: str = ""
    model_in_body: str = ""
    providers: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    stream: bool = False
    hide_usage: bool = False
    input_tokens: int = 0
    input_exact: bool = False
    text_bytes: int = 0
    code: str = ""

    def to_metadata(self) -> dict[str, MetadataValue]:
        """As fields of a protobuf Struct; empty ones are left out, because Envoy copies all of them each time."""
        fields: dict[str, MetadataValue] = {"dialect": self.dialect.value, "endpoint": self.endpoint}
        for name in _TEXTS:
            if value := getattr(self, name):
                fields[name] = value
        if self.providers:
            fields["providers"] = self.providers
            fields["models"] = self.models
        for name in _FLAGS:
            if getattr(self, name):
                fields[name] = True
        for name in _COUNTS:
            if count := getattr(self, name):
                fields[name] = count
        return fields

    @classmethod
    def from_metadata(cls, fields: Mapping[str, Any]) -> Decision | None:
        """The Decision that `to_metadata` wrote, or None where there is none (a request refused before decide)."""
        if "dialect" not in fields:
            return None
        values: dict[str, Any] = {name: fields[name] for name in (*_TEXTS, *_FLAGS) if name in fields}
        values |= {name: int(fields[name]) for name in _COUNTS if name in fields}
        values |= {name: tuple(fields[name]) for name in ("providers", "models") if name in fields}
        return cls(dialect=Dialect(fields["dialect"]), endpoint=fields["endpoint"], **values)


_TEXTS = ("request_id", "path", "team", "project", "user", "agent", "key_id", "alias", "model_in_body", "code")
_FLAGS = ("stream", "hide_usage", "input_exact")
_COUNTS = ("input_tokens", "text_bytes")
