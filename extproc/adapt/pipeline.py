"""adapt: give one attempt the body its own target needs. Here that is the target's name of the model.

Second moment of the path, on `<provider>/adapt` clusters only. The surprising thing: it always sees the body as decide
left it, never one that an earlier attempt was given, so each attempt is adapted from the same start.
"""

from __future__ import annotations

from extproc.decision import Decision
from extproc.dialects.body import read_json, splice
from extproc.dialects.model_name import model_edits
from extproc.dialects.multipart import boundary_of, read_model
from extproc.errors import Refusal
from extproc.exchange import Rewrite


class UnknownAttemptError(LookupError):
    """Envoy made an attempt that the decision does not name. The attempt must fail, not guess."""


def adapt(decision: Decision, attempt: int, content_type: str, body: bytes) -> Rewrite:
    """The body for attempt number `attempt` (from 1).

    Raises UnknownAttemptError where the decision has no such attempt, ValueError where the body does not parse.
    """
    if not 1 <= attempt <= len(decision.models):
        raise UnknownAttemptError(attempt)
    model = decision.models[attempt - 1]
    form = read_model(body, content_type) if boundary_of(content_type) else read_json(body)
    if isinstance(form, Refusal):
        raise ValueError(form.code)
    edits = model_edits(form, decision.model_in_body, model)
    return Rewrite(splice(body, edits) if edits else None)
