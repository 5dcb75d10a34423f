"""gateway.yaml from disk: either a snapshot or every mistake in it, each with its line and how to mend it.

Called at start, on reload and by `extproc check`. The surprising thing: schema and cross-checks both run on the
document as written, so one mistake hides no other, and no mistake ever repeats a value of the file that might be a
secret: pydantic's own messages and inputs never leave this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from extproc.config.check import check, entries
from extproc.config.compile import compile_snapshot, located, revision_of
from extproc.config.document import MAX_BYTES, KeyPath, MappingNode, Mistake, mark_at, read_document, value_at
from extproc.config.explain import dotted, schema_mistakes
from extproc.config.fields import reference, sql_url
from extproc.config.schema import Gateway
from extproc.config.secrets import SecretError, read_secret
from extproc.config.snapshot import SecretRef, Snapshot


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake of one file. `line` and `column` count from 1; `key` is the dotted path, empty for the whole file."""

    file: str
    line: int
    key: str
    message: str
    fix: str
    column: int = 1


def load(path: Path, *, environ: Mapping[str, str], require_secrets: bool) -> Snapshot | tuple[Problem, ...]:
    """The snapshot of the file at `path`, or all its problems by line.

    Without `require_secrets`, a missing secret or CA file is no problem; an optional provider whose secret is missing
    is left out either way. Never raises for what the file holds.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a path"
        return (Problem(str(path), 1, "", f"cannot be read: {reason}", "name a file that exists and can be read"),)
    return parse(raw, path=path, environ=environ, require_secrets=require_secrets)


def parse(
    raw: bytes, *, path: Path, environ: Mapping[str, str], require_secrets: bool
) -> Snapshot | tuple[Problem, ...]:
    """The same for the bytes of a file that stands, or will stand, at `path`."""
    folder = path.absolute().parent
    root, mistakes = read_document(raw)
    if root is None:
        return _problems(path, MappingNode(), mistakes)
    gateway: Gateway | None = None
    try:
        gateway = Gateway.model_validate(root)
    except ValidationError as error:
        mistakes.extend(schema_mistakes(root, error.errors(include_url=False, include_input=False)))
    mistakes.extend(check(root))
    absent: set[str] = set()
    mistakes.extend(_outside(root, folder, environ, absent, require_secrets=require_secrets))
    if mistakes or gateway is None:
        return _problems(path, root, mistakes)
    return compile_snapshot(gateway, revision=revision_of(raw), folder=folder, absent=frozenset(absent))


def format_problems(problems: Iterable[Problem]) -> str:
    """Plain text, two lines for each problem: `file:line:column: key: message`, and how to mend it."""
    lines = []
    for problem in problems:
        key = f"{problem.key}: " if problem.key else ""
        lines.append(
            f"{problem.file}:{problem.line}:{problem.column}: {key}{problem.message}\n    fix: {problem.fix}\n"
        )
    return "".join(lines)


def _problems(path: Path, root: MappingNode, mistakes: Iterable[Mistake]) -> tuple[Problem, ...]:
    found = set()
    for mistake in mistakes:
        line, column = mistake.mark or mark_at(root, mistake.path)
        found.add(Problem(str(path), line, dotted(mistake.path), mistake.message, mistake.fix, column))
    return tuple(sorted(found, key=lambda problem: (problem.line, problem.column, problem.key, problem.message)))


def _outside(
    root: MappingNode, folder: Path, environ: Mapping[str, str], absent: set[str], *, require_secrets: bool
) -> Iterator[Mistake]:
    """Mistakes in what the file points to; adds to `absent` the optional providers that are not there."""
    for name, provider in entries(root, "providers"):
        ref = _ref(provider.get("api_key"))
        if ref is not None:
            try:
                read_secret(located(ref, folder), environ)
            except SecretError as error:
                if error.missing and provider.get("optional") is True:
                    absent.add(name)
                elif require_secrets or not error.missing:
                    yield Mistake(("providers", name, "api_key", ref.source), error.message, error.fix)
        ca = provider.get("ca")
        if (
            require_secrets
            and name not in absent
            and isinstance(ca, MappingNode)
            and isinstance(file := ca.get("file"), str)
        ):
            yield from _certificate(("providers", name, "ca", "file"), folder, file)
    ref = _ref(value_at(root, ("state", "sql")))
    if ref is not None:
        try:
            sql_url(read_secret(located(ref, folder), environ))
        except SecretError as error:
            if require_secrets or not error.missing:
                yield Mistake(("state", "sql", ref.source), error.message, error.fix)
        except PydanticCustomError as error:
            context = error.context or {}
            yield Mistake(("state", "sql", ref.source), context["message"], context["fix"])


def _ref(value: object) -> SecretRef | None:
    if not isinstance(value, MappingNode):
        return None
    try:
        return reference(value)
    except PydanticCustomError:
        return None  # the schema says what is wrong with it


def _certificate(path: KeyPath, folder: Path, file: str) -> Iterator[Mistake]:
    try:
        pem = (folder / file).read_bytes()
    except (OSError, ValueError):
        yield Mistake(path, "the file cannot be read", "mend the path; relative ones are from this file's folder")
        return
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        yield Mistake(path, "the file holds no PEM certificate", "name a file with -----BEGIN CERTIFICATE-----")
