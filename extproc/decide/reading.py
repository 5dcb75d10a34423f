"""What decide takes from a body, and the few edits it makes to it.

Between `admit` and routing. The surprising thing: asking for usage in a stream is an edit of the client's own bytes,
so it is made only where the client left the question open, and what it adds stands behind everything the client wrote.
"""

from __future__ import annotations

import msgspec

from extproc.decide.headers import is_json
from extproc.dialects.body import Edit, JsonBody, case_variant, read_json, wrong_type
from extproc.dialects.endpoints import Body, Endpoint, Naming
from extproc.dialects.model_name import model_edits
from extproc.dialects.multipart import MultipartModel, boundary_of, read_model
from extproc.errors import Code, Refusal


class Reading(msgspec.Struct, frozen=True):
    """A body as decide sees it: the model it names, whether it asks for a stream, and where to change it."""

    body: bytes
    model: str | None
    stream: bool
    form: JsonBody | MultipartModel | None


def read(body: bytes, endpoint: Endpoint, content_type: str) -> Reading | Refusal:
    """Read `body` as its endpoint and content type say, or the refusal."""
    match endpoint.body:
        case Body.JSON:
            return _read_json(body, endpoint)
        case Body.MULTIPART:
            return _read_multipart(body, endpoint, content_type)
        case Body.NONE:
            return Reading(body, None, stream=False, form=None)
        case Body.ANY:
            return _read_any(body, endpoint, content_type)


def _read_any(body: bytes, endpoint: Endpoint, content_type: str) -> Reading | Refusal:
    if not body:
        return Reading(body, None, stream=False, form=None)
    if boundary_of(content_type) is not None:
        return _unnamed(_read_multipart(body, endpoint, content_type))
    if is_json(content_type):
        return _unnamed(_read_json(body, endpoint))
    return Refusal(Code.UNSUPPORTED_CONTENT_TYPE, "This endpoint takes application/json or multipart/form-data.")


def _unnamed(reading: Reading | Refusal) -> Reading | Refusal:
    """Pass-through bodies may hold a `model` (fine-tuning does); it does not route them."""
    if isinstance(reading, Refusal):
        return reading
    return Reading(reading.body, None, stream=False, form=None)


def _read_json(body: bytes, endpoint: Endpoint) -> Reading | Refusal:
    form = read_json(body)
    if isinstance(form, Refusal):
        return form
    refusal = case_variant(form) or wrong_type(form, endpoint.types)
    if refusal is not None:
        return refusal
    model = form.value("model")
    if model is None and endpoint.naming is Naming.REQUIRED:
        return _missing("model")
    for name in endpoint.required:
        if form.raw(name) in (None, b"null"):
            return _missing(name)
    return Reading(body, model, form.raw("stream") == b"true", form)


def _read_multipart(body: bytes, endpoint: Endpoint, content_type: str) -> Reading | Refusal:
    form = read_model(body, content_type)
    if isinstance(form, Refusal):
        return form
    if form.model is None and endpoint.naming is Naming.REQUIRED:
        return _missing("model")
    return Reading(body, form.model, stream=False, form=form)


def _missing(name: str) -> Refusal:
    return Refusal(Code.MISSING_FIELD, f"'{name}' is required.", name)


def edits_for(reading: Reading, model: str, endpoint: Endpoint, *, may_ask_usage: bool) -> tuple[list[Edit], bool]:
    """The edits that make the body name `model` and ask for usage, and whether the usage is ours to hide."""
    edits = model_edits(reading.form, reading.model, model)
    if not (may_ask_usage and endpoint.stream_options and reading.stream and isinstance(reading.form, JsonBody)):
        return edits, False
    asked = _usage_edit(reading.form)
    return (edits if asked is None else [*edits, asked]), asked is not None


def _usage_edit(form: JsonBody) -> Edit | None:
    """Make `stream_options.include_usage` true; None where the client already did."""
    raw = form.raw("stream_options")
    if raw is None:
        return form.append("stream_options", b'{"include_usage":true}')
    if raw == b"null":
        return form.replace("stream_options", b'{"include_usage":true}')
    options = read_json(raw)
    if isinstance(options, Refusal) or options.raw("include_usage") == b"true":
        return None
    inner = (
        options.replace("include_usage", b"true")
        if "include_usage" in options
        else options.append("include_usage", b"true")
    )
    start = form.replace("stream_options", b"").start
    return Edit(start + inner.start, start + inner.end, inner.new)
