"""`GET /v1/models` in both dialects: what this key may use, answered by decide without a provider.

The surprising thing: names that only a glob in `models:` serves are listed when a team spells them out, and otherwise
can not be, because nobody but the provider knows them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from extproc.errors import Dialect

_CREATED = 1735689600
_CREATED_AT = "2025-01-01T00:00:00Z"
"""The same moment, once for each dialect: gateway.yaml does not say when a model was made, the SDKs require it."""


def every(names: Sequence[str], dialect: Dialect) -> bytes:
    """The list document. It has one page: lists here are as long as gateway.yaml."""
    data = [_entry(name, dialect) for name in names]
    match dialect:
        case Dialect.OPENAI:
            document: dict[str, object] = {"object": "list", "data": data}
        case Dialect.ANTHROPIC:
            ends = {"first_id": names[0] if names else None, "last_id": names[-1] if names else None}
            document = {"data": data, "has_more": False, **ends}
    return json.dumps(document).encode()


def one(name: str, names: Sequence[str], dialect: Dialect) -> bytes | None:
    """The document of one model, or None where this key has no such model."""
    return json.dumps(_entry(name, dialect)).encode() if name in names else None


def _entry(name: str, dialect: Dialect) -> dict[str, object]:
    match dialect:
        case Dialect.OPENAI:
            return {"id": name, "object": "model", "created": _CREATED, "owned_by": "extproc"}
        case Dialect.ANTHROPIC:
            head = {"type": "model", "id": name, "display_name": name}
            return {**head, "created_at": _CREATED_AT, "lifecycle": "active"}
