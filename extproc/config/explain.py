"""Mistakes in a person's words: pydantic's errors and key paths, without any value that could be a secret.

Between the schema and whoever reads `extproc check`. The surprising thing: even an unknown key's name is only shown
where it looks like a key. Written as `{sk-...}`, a secret is a key of YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic_core import ErrorDetails

from extproc.config import fields
from extproc.config.check import nearest
from extproc.config.document import KeyPath, MappingNode, Mistake, SequenceNode, value_at
from extproc.config.schema import KINDS_NOT_SERVED, NOT_ENFORCED, part_at

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LIKELY_KEY = re.compile(r"[A-Za-z][A-Za-z_]{0,23}")
_EXPECTED = {
    "string_type": ("text", "put it in quotes"),
    "int_type": ("a whole number", "write a whole number, without quotes"),
    "bool_type": ("true or false", "write true or false, without quotes"),
    "model_type": ("a mapping of keys", "write `key: value` lines below it"),
    "dict_type": ("a mapping of names", "write `name: ...` lines below it"),
    "tuple_type": ("a list", "write `- ` items below it, or [...]"),
}


def dotted(path: KeyPath) -> str:
    """`teams.search.keys.0.id`; a name that is no plain word is quoted, one in the place of a secret not shown."""
    shown: list[str] = []
    for depth, part in enumerate(path):
        if isinstance(part, int) or _PLAIN_KEY.fullmatch(part):
            text = str(part)
        else:
            text = json.dumps(part if len(part) <= 80 else part[:80] + "...")
        if isinstance(part, str) and not _showable(path[:depth], part):
            break
        shown.append(text)
    return ".".join(shown)


def _showable(parent: KeyPath, name: str) -> bool:
    """May this key be repeated? The user's names and the schema's may; elsewhere it could be a secret gone astray."""
    part = part_at(parent)
    if "oneOf" in part:  # a reference to a secret
        return name in ("env", "file")
    known = part.get("properties", {})
    if name in known or isinstance(part.get("additionalProperties"), dict):
        return True
    return bool(known and _LIKELY_KEY.fullmatch(name))


def schema_mistakes(root: MappingNode, errors: Iterable[ErrorDetails]) -> Iterator[Mistake]:
    """What pydantic's errors mean to the person who wrote the document; never their inputs or their own messages."""
    for error in errors:
        # pydantic counts valid items only: a list whose items are all wrong is not also an empty one.
        if error["type"] != "too_short" or not value_at(root, tuple(error["loc"])):
            yield _schema_mistake(root, error)


def _schema_mistake(root: MappingNode, error: ErrorDetails) -> Mistake:
    path: KeyPath = tuple(error["loc"])
    if path and path[-1] == "[key]":
        path = path[:-1]
    context = error.get("ctx", {})
    match error["type"]:
        case fields.MISTAKE:
            return Mistake(path, context["message"], context["fix"])
        case "extra_forbidden":
            return _unknown_key(path)
        case "literal_error":
            return _unknown_choice(path, value_at(root, path), context)
        case kind if kind in _EXPECTED:
            expected, fix = _EXPECTED[kind]
            return Mistake(path, f"expected {expected}, found {_shape(value_at(root, path))}", fix)
        case kind:
            return _out_of_bounds(path, kind, context)


def _out_of_bounds(path: KeyPath, kind: str, context: Mapping[str, Any]) -> Mistake:
    meaning = part_at(path).get("description", "see the documentation")
    match kind:
        case "missing":
            return Mistake(path, "is missing", f"add `{path[-1]}`: {meaning}")
        case "greater_than_equal":
            return Mistake(path, f"must be at least {context['ge']}", f"write a number in range: {meaning}")
        case "less_than_equal":
            return Mistake(path, f"must be at most {context['le']}", f"write a number in range: {meaning}")
        case "too_short" | "string_too_short":
            return Mistake(path, "is empty: at least one is needed", f"add one: {meaning}")
        case _:
            return Mistake(path, "is not valid here", meaning)


def _unknown_key(path: KeyPath) -> Mistake:
    name = str(path[-1])
    if name in NOT_ENFORCED:
        message = f"this version does not enforce `{name}` yet"
        return Mistake(path, message, "remove it: what is not enforced must not look as if it were")
    known = list(part_at(path[:-1]).get("properties", {}))
    return Mistake(path, "unknown key", nearest(name, known))


def _unknown_choice(path: KeyPath, value: object, context: Mapping[str, Any]) -> Mistake:
    if isinstance(value, str) and path[-1] == "kind" and value in KINDS_NOT_SERVED:
        return Mistake(path, f"this version does not serve the kind `{value}` yet", "use a provider of another kind")
    expected = str(context.get("expected", ""))
    return Mistake(path, f"must be {expected}", nearest(str(value), re.findall(r"'([^']*)'", expected)))


def _shape(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case str():
            return "text"
        case MappingNode():
            return "a mapping"
        case SequenceNode():
            return "a list"
        case _:
            return "a number"
