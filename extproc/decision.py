"""The Decision: all that decide tells adapt, record and Envoy's own filters about one request.

It travels in Envoy's dynamic metadata (namespace `extproc.decision`), so no map in this process joins the moments and
any worker may serve any of them. The surprising thing: it travels twice. Python reads one field that holds all of it as
JSON, because building and reading twenty protobuf values costs more than the decision; the few that Envoy's Lua filters
read stand beside it by name. It never holds a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from extproc.errors import Dialect
from extproc.exchange import MetadataValue

NAMESPACE = "extproc.decision"
"""Written by decide; read by adapt, record and Lua."""
ROUTE_NAMESPACE = "extproc.route"
"""Read by Envoy's priority_group cluster specifier alone."""
ATTEMPTS_NAMESPACE = "extproc.attempts"
"""Written by the clusters' Lua filter, one set of fields for each attempt: `n`, `p1`, `s1`, `r1`, `p2`, ..."""
USAGE_NAMESPACE = "extproc.usage"
"""Written by Envoy's json_to_metadata and by Lua, where Envoy's AI filter reads no usage."""
WHOLE_FIELD = "decision"
"""The field of `NAMESPACE` that Python reads."""


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request as decided, or as refused (`code` set, and then no targets).

    `providers[i]` and `models[i]` are those of attempt i + 1. `model_in_body` is the name the body holds after decide;
    an attempt whose model differs runs through adapt. `input_tokens` is an estimate unless `input_exact`. `revision` is
    that of the snapshot which decided.
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
    revision: str = ""

    def to_metadata(self) -> dict[str, MetadataValue]:
        """As fields of a protobuf Struct: the whole, and what Lua needs where there is an answer to wait for."""
        fields: dict[str, MetadataValue] = {WHOLE_FIELD: _ENCODE(self).decode(), "dialect": self.dialect.value}
        if self.path:
            fields["path"] = self.path
            fields["request_id"] = self.request_id
            fields["models"] = self.models
            if self.stream:
                fields["stream"] = True
            if self.hide_usage:
                fields["hide_usage"] = True
        return fields

    @classmethod
    def from_metadata(cls, fields: Mapping[str, Any]) -> Decision | None:
        """The Decision that `to_metadata` wrote, or None where there is none (a request refused before decide)."""
        whole = fields.get(WHOLE_FIELD)
        return None if whole is None else decision_of(whole)


def decision_of(whole: str) -> Decision:
    """The Decision in the text of `WHOLE_FIELD`."""
    return _DECODE(whole)


_ENCODE = msgspec.json.Encoder().encode
_DECODE = msgspec.json.Decoder(Decision).decode
