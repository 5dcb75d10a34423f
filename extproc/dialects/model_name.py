"""Changing the one field that routes a request: the model's name, in JSON and in multipart bodies alike.

decide and adapt share it. The surprising thing: it edits and never re-encodes, so all other bytes are the client's.
"""

from __future__ import annotations

import msgspec

from extproc.dialects.body import Edit, JsonBody
from extproc.dialects.multipart import MultipartModel


def model_edits(form: JsonBody | MultipartModel | None, named: str | None, model: str) -> list[Edit]:
    """The edits that put `model` where the body names another, or none."""
    if named is None or named == model:
        return []
    match form:
        case JsonBody():
            return [form.replace("model", msgspec.json.encode(model))]
        case MultipartModel():
            return form.replace(model)
        case None:
            return []
