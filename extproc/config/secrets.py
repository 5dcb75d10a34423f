"""Secrets: a reference from gateway.yaml becomes a value here, and nowhere else.

Not on the request's path: read when the configuration is checked and when Envoy's secret files are written. The
surprising thing: an error names neither the value nor, unless it plainly is one, the variable; people paste keys there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from extproc.config.snapshot import SecretRef, Snapshot

MAX_SECRET_BYTES = 65536

_PLAINLY_A_VARIABLE = re.compile(r"(?=.{1,16}$|.*_)[A-Z][A-Z0-9_]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class SecretError(Exception):
    """A secret cannot be used. `message` and `fix` are safe to print; `missing` is True where nothing is there."""

    def __init__(self, message: str, fix: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.missing = missing


def read_secret(ref: SecretRef, environ: Mapping[str, str]) -> str:
    """The value that `ref` names, without the line break that ends a file; raises SecretError."""
    match ref.source:
        case "env":
            return _checked(_from_environment(ref.name, environ))
        case "file":
            return _checked(_from_file(Path(ref.name)))


def ledger_url(snapshot: Snapshot, environ: Mapping[str, str]) -> str:
    """The ledger's SQLAlchemy URL, its password included; raises SecretError. Never log it."""
    return snapshot.sql_url if snapshot.sql_secret is None else read_secret(snapshot.sql_secret, environ)


def _from_environment(name: str, environ: Mapping[str, str]) -> str:
    shown = f"the variable {name}" if _PLAINLY_A_VARIABLE.fullmatch(name) else "the variable that it names"
    value = environ.get(name)
    if not value:
        state = "is not set" if value is None else "is empty"
        raise SecretError(f"{shown} {state}", "set it where extproc starts", missing=True)
    return value


def _from_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SECRET_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        fix = "create it, or mend the path; relative paths are from the folder of gateway.yaml"
        raise SecretError("the file that it names does not exist", fix, missing=True) from None
    except (OSError, ValueError):
        raise SecretError("the file that it names cannot be read", "let extproc's user read it") from None
    if len(raw) > MAX_SECRET_BYTES:
        raise SecretError(f"the secret is larger than {MAX_SECRET_BYTES} bytes", "name the file of one secret")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise SecretError("the secret is not UTF-8 text", "save the file as plain text") from None
    return text.removesuffix("\n").removesuffix("\r")


def _checked(value: str) -> str:
    if not value.strip():
        raise SecretError("the secret is empty", "write the credential there")
    if "\r" in value or "\n" in value:
        raise SecretError("the secret holds a line break", "keep it on one line")
    if _CONTROL.search(value):
        raise SecretError("the secret holds a control character", "write it again, as plain text")
    if value != value.strip():
        raise SecretError("the secret begins or ends with a space", "remove the space")
    return value
