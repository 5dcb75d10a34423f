"""Finding the one plain `model` part of a multipart/form-data body (RFC 7578), and its place in the bytes.

decide uses it for audio and image uploads. The surprising thing: it is stricter than the standard. A second `model`
part, a file under that name, a folded or repeated Content-Disposition are refused, because a provider that read them
differently would serve a model that nobody judged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from extproc.dialects.body import Edit
from extproc.errors import Code, Refusal

_BOUNDARY = re.compile(
    r"""^multipart/form-data;\s*boundary=(?:"([^"\r\n]{1,70})"|([0-9A-Za-z'()+_,\-./:=?]{1,70}))\s*$""", re.I
)
_NAME = re.compile(rb"""^form-data((?:;[ \t]*[a-zA-Z*]+=(?:"(?:[^"\\\r\n]|\\.)*"|[^";\s]+))+)[ \t]*$""", re.I)
_PARAMETER = re.compile(rb""";[ \t]*([a-zA-Z*]+)=(?:"((?:[^"\\\r\n]|\\.)*)"|([^";\s]+))""")
_MAX_PARTS = 256
_MAX_PART_HEADER_BYTES = 8192
_MAX_MODEL_BYTES = 256


@dataclass(frozen=True, slots=True)
class MultipartModel:
    """The `model` part's value and where it stands; None where the form names no model."""

    model: str | None
    start: int = 0
    end: int = 0

    def replace(self, model: str) -> Edit:
        return Edit(self.start, self.end, model.encode())


def boundary_of(content_type: str) -> bytes | None:
    """The boundary that a multipart/form-data content type names as its only parameter."""
    match = _BOUNDARY.match(content_type)
    return (match.group(1) or match.group(2)).encode("latin-1") if match else None


def read_model(body: bytes, content_type: str) -> MultipartModel | Refusal:
    """The form's model, or why the form can not be trusted to have just one."""
    boundary = boundary_of(content_type)
    if boundary is None:
        return _refuse("its content type names no usable boundary")
    delimiter = b"--" + boundary
    if not body.startswith(delimiter):
        return _refuse("it does not begin with its boundary")
    found: MultipartModel | None = None
    at = len(delimiter)
    for _ in range(_MAX_PARTS):
        if body.startswith(b"--", at):
            return found or MultipartModel(None)
        head_end = body.find(b"\r\n\r\n", at, at + _MAX_PART_HEADER_BYTES)
        end = body.find(b"\r\n" + delimiter, max(head_end, at))
        if not body.startswith(b"\r\n", at) or head_end < 0 or end < 0:
            return _refuse("a part has no end or no header")
        name = _field_name(body[at + 2 : head_end])
        if name is None:
            return _refuse("a part's header can be read in more than one way")
        if name.casefold() == "model":
            if found is not None or name != "model":
                return _refuse("it names the model more than once")
            found = _plain_model(body, head_end + 4, end)
            if found is None:
                return _refuse("its model is not plain text")
        at = end + 2 + len(delimiter)
    return _refuse(f"it has more than {_MAX_PARTS} parts")


def _plain_model(body: bytes, start: int, end: int) -> MultipartModel | None:
    if end - start > _MAX_MODEL_BYTES:
        return None
    try:
        value = body[start:end].decode("utf-8")
    except UnicodeDecodeError:
        return None
    return MultipartModel(value, start, end) if value.isprintable() else None


def _field_name(head: bytes) -> str | None:
    """The form field a part carries; None where two readers could disagree, as for a `model` sent as a file."""
    name: bytes | None = None
    plain = True
    for line in head.split(b"\r\n"):
        header, colon, value = line.partition(b":")
        if not colon or header[:1] in (b" ", b"\t") or header.strip() != header:
            return None
        match header.lower():
            case b"content-disposition":
                parameters = _parameters(value.strip())
                if name is not None or parameters is None or b"name" not in parameters:
                    return None
                name = parameters[b"name"]
                plain = plain and b"filename" not in parameters and b"filename*" not in parameters
            case b"content-transfer-encoding":
                plain = False
    if name is None or b"\\" in name:
        return None
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if plain or text.casefold() != "model" else None


def _parameters(disposition: bytes) -> dict[bytes, bytes] | None:
    match = _NAME.match(disposition)
    if match is None:
        return None
    parameters: dict[bytes, bytes] = {}
    for key, quoted, bare in _PARAMETER.findall(match.group(1)):
        if key.lower() in parameters or key.lower() == b"name*":
            return None
        parameters[key.lower()] = quoted or bare
    return parameters


def _refuse(why: str) -> Refusal:
    return Refusal(Code.INVALID_MULTIPART, f"The multipart body is refused: {why}.")
