"""Finding the one plain `model` part of a multipart/form-data body (RFC 7578), and its place in the bytes.

decide uses it for audio and image uploads. The surprising thing: it is stricter than the standard. Whatever two
readers could take apart in two ways (a second `model`, a bare line feed before a boundary, an escaped quote in a file's
name) is refused, because a provider that read it differently would serve a model that nobody judged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from extproc.dialects.body import Edit
from extproc.errors import Code, Refusal

_CHARSET = r"""(?:[ \t]*;[ \t]*charset="?utf-8"?)?"""
_BOUNDARY = re.compile(
    rf"""multipart/form-data{_CHARSET}[ \t]*;[ \t]*boundary="""
    r"""(?:"([0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?])"|([0-9A-Za-z+_\-.]{1,70}))"""
    rf"""{_CHARSET}[ \t]*""",
    re.I,
)
"""Quoted, all that RFC 2046 allows; unquoted, only what no reader could take for the value's end."""
_VALUE = rb"""(?:"([^"\r\n]*)"|([A-Za-z0-9!#$&+\-.^_`|~%']+))"""
_PARAMETER = re.compile(rb"""[ \t]*;[ \t]*(name|filename\*?)=""" + _VALUE, re.I)
_DISPOSITION = re.compile(rb"""form-data((?:[ \t]*;[ \t]*(?:name|filename\*?)=""" + _VALUE + rb""")+)""", re.I)
_HEADER_NAME = re.compile(rb"[A-Za-z0-9\-]+")
_FIELD = re.compile(r"[A-Za-z0-9_.\-\[\]]{1,128}")
_TEXT = re.compile(rb"""text/plain(?:[ \t]*;[ \t]*charset="?(utf-8|us-ascii|iso-8859-1)"?)?""", re.I)
_LENGTH = re.compile(rb"\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.I)
_IDENTITY = frozenset((b"", b"7bit", b"8bit", b"binary"))
_MAX_PARTS = 256
_MAX_PART_HEADER_BYTES = 8192
_MAX_MODEL_BYTES = 256


@dataclass(frozen=True, slots=True)
class MultipartModel:
    """The `model` part's value and where it stands; None where the form names no model.

    `length` is the place of the part's own Content-Length, which few clients write and some servers read by.
    """

    model: str | None
    start: int = 0
    end: int = 0
    length: tuple[int, int] | None = None

    def replace(self, model: str) -> list[Edit]:
        """The edits that give the part another value; only where it has one."""
        value = model.encode()
        edits = [Edit(self.start, self.end, value)]
        if self.length is not None:
            edits.append(Edit(*self.length, b"%d" % len(value)))
        return edits


@dataclass(frozen=True, slots=True)
class _Part:
    """A part's headers by lower-case name, and the places of its head and content."""

    headers: dict[bytes, bytes]
    head: int
    start: int
    end: int


def boundary_of(content_type: str) -> bytes | None:
    """The boundary that a multipart/form-data content type names, with no parameter beside it but charset=utf-8."""
    match = _BOUNDARY.fullmatch(content_type)
    return (match.group(1) or match.group(2)).encode("latin-1") if match else None


class _TwoReadings(Exception):  # noqa: N818 - says why, and never leaves this module
    """Readers could disagree on this body."""


def read_model(body: bytes, content_type: str) -> MultipartModel | Refusal:
    """The form's model, or why the form can not be trusted to have just one."""
    boundary = boundary_of(content_type)
    try:
        if boundary is None:
            raise _TwoReadings("its content type names no usable boundary")
        return _model(body, _parts(body, b"--" + boundary))
    except _TwoReadings as why:
        return Refusal(Code.INVALID_MULTIPART, f"The multipart body is refused: {why}.")


def _model(body: bytes, parts: list[_Part]) -> MultipartModel:
    found: MultipartModel | None = None
    for part in parts:
        name = _field_name(part)
        if re.split(r"[.\[]", name, maxsplit=1)[0].casefold() != "model":
            continue
        if found is not None or name != "model":
            raise _TwoReadings("it names the model more than once")
        found = _plain_model(body, part)
    return found or MultipartModel(None)


def _parts(body: bytes, delimiter: bytes) -> list[_Part]:
    """Every part, where all readers agree on where each begins and ends."""
    if not body.startswith(delimiter):
        raise _TwoReadings("it does not begin with its boundary")
    parts: list[_Part] = []
    at = len(delimiter)
    while not body.startswith(b"--", at):
        head_end = body.find(b"\r\n\r\n", at, at + _MAX_PART_HEADER_BYTES)
        end = body.find(b"\r\n" + delimiter, head_end + 4)
        if not body.startswith(b"\r\n", at) or head_end < 0 or end < 0:
            raise _TwoReadings("a part has no end or no header")
        parts.append(_Part(_headers(body[at + 2 : head_end]), at + 2, head_end + 4, end))
        if len(parts) > _MAX_PARTS:
            raise _TwoReadings(f"it has more than {_MAX_PARTS} parts")
        at = end + 2 + len(delimiter)
    if body[at + 2 :] not in (b"", b"\r\n"):
        raise _TwoReadings("something follows its end")
    if body.count(b"\n" + delimiter) != len(parts) or body.count(b"\r" + delimiter):
        raise _TwoReadings("its boundary also stands where only some readers would see it")
    return parts


def _headers(head: bytes) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        broken = any(end in value for end in (b"\r", b"\n", b"\0"))
        if broken or not _HEADER_NAME.fullmatch(name) or name.lower() in headers:
            raise _TwoReadings("a part's header can be read in more than one way")
        headers[name.lower()] = value.strip(b" \t")
    return headers


def _field_name(part: _Part) -> str:
    """The form field that a part carries, unless it is a `model` sent as a file."""
    parameters = _parameters(part.headers.get(b"content-disposition", b""))
    name = parameters.get(b"name", b"").decode("latin-1")
    if not _FIELD.fullmatch(name) or name == "_charset_":
        raise _TwoReadings("a part has no plain name")
    if len(parameters) > 1 and name.casefold() == "model":
        raise _TwoReadings("its model is a file")
    length = b"%d" % (part.end - part.start)
    if part.headers.get(b"content-length", length) != length:
        raise _TwoReadings("a part has another length than it says")
    return name


def _parameters(disposition: bytes) -> dict[bytes, bytes]:
    match = _DISPOSITION.fullmatch(disposition)
    if match is None or rb"\"" in disposition:  # one reader's escaped quote is another's end of the value
        raise _TwoReadings("a part's header can be read in more than one way")
    parameters: dict[bytes, bytes] = {}
    for key, quoted, bare in _PARAMETER.findall(match.group(1)):
        if key.lower() in parameters:
            raise _TwoReadings("a part has two names")
        parameters[key.lower()] = quoted or bare
    return parameters


def _plain_model(body: bytes, part: _Part) -> MultipartModel:
    text = _TEXT.fullmatch(part.headers.get(b"content-type", b"text/plain"))
    coding = part.headers.get(b"content-transfer-encoding", b"").lower()
    value = body[part.start : part.end]
    if text is None or coding not in _IDENTITY or len(value) > _MAX_MODEL_BYTES:
        raise _TwoReadings("its model is not plain text")
    is_utf8 = (text.group(1) or b"utf-8").lower() == b"utf-8"
    try:
        model = value.decode("utf-8" if is_utf8 else "ascii")
    except UnicodeDecodeError:
        raise _TwoReadings("its model is not plain text") from None
    if not model.isprintable():
        raise _TwoReadings("its model is not plain text")
    length = _LENGTH.search(body, part.head - 1, part.start)
    return MultipartModel(model, part.start, part.end, length.span(1) if length else None)
