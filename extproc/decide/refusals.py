"""How decide says no: refusals as answers in the client's dialect, and what the record will hold of them.

Used by every step of the pipeline. The surprising thing: a refusal is recorded by the same metadata as a decision, so a
refused request has its row in the ledger, with whoever was known to ask.
"""

from __future__ import annotations

from extproc.config.snapshot import Key
from extproc.decision import Decision
from extproc.dialects.endpoints import Endpoint, Miss
from extproc.errors import Code, Dialect, Refusal, error_body, error_headers
from extproc.exchange import MetadataValue, Respond

MAX_MODEL_NAME = 256
"""Characters; a longer name is none that gateway.yaml could serve."""


def unavailable(dialect: Dialect, request_id: str) -> Respond:
    """The answer when deciding itself broke: closed, and telling nothing of why."""
    return refuse(
        Refusal(Code.GATEWAY_UNAVAILABLE, "The gateway could not decide on this request."), dialect, request_id
    )


def refuse(
    refusal: Refusal,
    dialect: Dialect,
    request_id: str,
    key: Key | None = None,
    endpoint: Endpoint | None = None,
    *,
    alias: str = "",
) -> Respond:
    """The refusal as an answer in the client's dialect; `key` and `endpoint` are what is known of the request."""
    return Respond(
        refusal.status,
        error_body(refusal, dialect, request_id),
        metadata_of(dialect, key, endpoint, refusal.code.value, alias),
        error_headers(dialect, request_id),
        details=f"extproc:{refusal.code.value}",
    )


def metadata_of(
    dialect: Dialect, key: Key | None, endpoint: Endpoint | None, code: str = "", alias: str = ""
) -> dict[str, MetadataValue]:
    """What record will see of a request that decide answers itself."""
    principal = key.principal if key else None
    return Decision(
        dialect=dialect,
        endpoint=endpoint.name if endpoint else "",
        team=principal.team if principal else "",
        project=(principal.project if principal else "") or "",
        user=(principal.user if principal else "") or "",
        agent=(principal.agent if principal else "") or "",
        key_id=principal.key_id if principal else "",
        alias=alias,
        code=code,
    ).to_metadata()


def missed(miss: Miss) -> Refusal:
    """Why there is no endpoint."""
    match miss:
        case Miss.PATH:
            return Refusal(Code.UNKNOWN_PATH, "There is no such endpoint here.")
        case Miss.METHOD:
            return Refusal(Code.METHOD_NOT_ALLOWED, "This endpoint does not take that method.")


def unspoken(name: str, endpoint: Endpoint) -> Refusal:
    """The model is there, and nobody who serves it speaks this dialect."""
    spoken = "Anthropic's" if endpoint.dialect is Dialect.ANTHROPIC else "OpenAI's"
    return Refusal(
        Code.DIALECT_NOT_SUPPORTED, f"No provider of the model {quoted(name)} speaks {spoken} dialect.", "model"
    )


def quoted(name: str) -> str:
    """A client's text in a message: of bounded length, and nothing in it that a terminal or a log would act on."""
    shown = name if len(name) <= 80 else name[:80] + "..."
    return "'" + "".join(char if char.isprintable() else "?" for char in shown) + "'"
