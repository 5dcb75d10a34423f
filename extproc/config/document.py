"""The YAML document under gateway.yaml: bytes in, a tree of plain values out, each knowing its line.

First step of loading the configuration; nothing here knows what the keys mean. The surprising thing: it reads YAML
events and builds the tree itself. The C parser's events for 10,000 keys take 0.1 s where a loader takes seconds, and
duplicate keys, tags, merges and alias bombs are met here with their line, before any of them costs memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from ruamel.yaml import YAML
from ruamel.yaml import events as ev
from ruamel.yaml.error import MarkedYAMLError, YAMLError

Mark = tuple[int, int]
"""Line and column, both counted from 1."""

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the document's root."""

MAX_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 64
MAX_ALIASED_NODES = 100_000
"""Bound of the nodes that aliases may repeat, over the whole file."""

_MAX_NUMBER_CHARS = 40  # a sha256 of digits only is text, and no number takes quadratic time to read
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "-.inf", ".nan", ".NaN", ".NAN"), Decimal("NaN")),
}
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# What libyaml and ruamel say, by a part of it, and what a person needs to hear. Their own words may repeat the text.
_SYNTAX: tuple[tuple[str, str, str], ...] = (
    ("mapping values are not allowed", "a second `:` on this line, or wrong indentation", "quote the value, or indent"),
    ("unexpected end of stream", "a quote opened here is never closed", "close the quote"),
    ("',' or ']'", "a `[` opened here is never closed, or a comma is missing", "close it with `]`"),
    ("',' or '}'", "a `{` opened here is never closed, or a comma is missing", "close it with `}`"),
    ("cannot start any token", "this character cannot begin a value", "put the value in quotes"),
    ("unknown escape", "an unknown backslash escape in double quotes", "use single quotes, or double the backslash"),
    ("undefined tag handle", "tags (`!name`) are not used in this file", "remove the tag"),
    ("incompatible YAML document", "an unknown YAML version", "remove the %YAML line"),
    ("expected ':'", "a key without its `:`, or a line that belongs to nothing", "write `key: value`"),
    ("expected key", "indentation that fits no key above", "align it with the key that it belongs beside"),
    ("<block end>", "indentation that fits no key above", "align it with the key that it belongs beside"),
    ("'-' indicator", "a key among the items of a list", "begin the item with `- `, or indent the list"),
)
_NAMES_THE_START = ("end of stream", "',' or")


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something to mend at `path`. `message` and `fix` never hold a value of the file that might be a secret."""

    path: KeyPath
    message: str
    fix: str
    mark: Mark | None = None


class MappingNode(dict[str, object]):
    """A YAML mapping; `marks` says where each key stands. Keys are always text, as the file spells them."""

    __slots__ = ("marks",)

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, Mark] = {}


class SequenceNode(list[object]):
    """A YAML list; `marks` says where each item stands."""

    __slots__ = ("marks",)

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[Mark] = []


def read_document(raw: bytes) -> tuple[MappingNode | None, list[Mistake]]:
    """The root mapping of the file's one document (None when it cannot be read), and every mistake met on the way."""
    if len(raw) > MAX_BYTES:
        return None, [Mistake((), f"the file is larger than {MAX_BYTES} bytes", "split the configuration", (1, 1))]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        mark = _mark_in(raw[: error.start].decode("utf-8", "replace"))
        return None, [Mistake((), "not UTF-8 text", "save the file as UTF-8", mark)]
    if unprintable := _UNPRINTABLE.search(text):
        mark = _mark_in(text[: unprintable.start()])
        return None, [Mistake((), "a control character, which YAML does not allow", "remove it", mark)]
    builder = _Builder(text)
    try:
        return builder.document(), builder.mistakes
    except _StopError as stop:
        return None, [*builder.mistakes, stop.mistake]
    except YAMLError as error:
        return None, [*builder.mistakes, _syntax_mistake(error)]


def mark_at(root: MappingNode, path: KeyPath) -> Mark:
    """Where `path` stands in the file; a part that is missing there stands where its parent does."""
    mark = (1, 1)
    node: object = root
    for part in path:
        match node, part:
            case MappingNode(), str() if part in node:
                mark, node = node.marks[part], node[part]
            case SequenceNode(), int() if part < len(node):
                mark, node = node.marks[part], node[part]
            case _:
                return mark
    return mark


def value_at(root: MappingNode, path: KeyPath) -> object:
    """The value at `path`, None where there is none."""
    node: object = root
    for part in path:
        match node, part:
            case MappingNode(), str():
                node = node.get(part)
            case SequenceNode(), int() if part < len(node):
                node = node[part]
            case _:
                return None
    return node


class _StopError(Exception):
    """Reading further would cost too much, or has no meaning."""

    def __init__(self, mistake: Mistake) -> None:
        super().__init__()
        self.mistake = mistake


class _Builder:
    """One pass over the events of one text."""

    def __init__(self, text: str) -> None:
        self.mistakes: list[Mistake] = []
        self._events: Iterator[ev.Event] = YAML(typ="safe", pure=False).parse(text)
        self._anchors: dict[str, tuple[object, int] | None] = {}
        self._nodes = 0
        self._aliased = 0

    def document(self) -> MappingNode:
        next(self._events)  # the stream's start
        first = next(self._events)
        if isinstance(first, ev.StreamEndEvent):
            raise _StopError(Mistake((), "the file is empty", "begin with `providers:`", (1, 1)))
        start = next(self._events)
        root = self._node(start, (), 0)
        next(self._events)  # the document's end
        if not isinstance(after := next(self._events), ev.StreamEndEvent):
            self._note((), after, "a second document begins here", "keep one document in the file, without `---`")
        if root is None:
            raise _StopError(Mistake((), "the file is empty", "begin with `providers:`", (1, 1)))
        if not isinstance(root, MappingNode):
            fix = "begin with a key such as `providers:`"
            raise _StopError(Mistake((), "the file must be a mapping of keys", fix, _mark(start)))
        return root

    def _node(self, event: ev.Event, path: KeyPath, depth: int) -> object:
        if isinstance(event, ev.AliasEvent):
            return self._alias(event, path)
        if depth > MAX_DEPTH:
            raise _StopError(Mistake((), f"nested more than {MAX_DEPTH} deep", "take the nesting out", _mark(event)))
        if not isinstance(event, ev.ScalarEvent | ev.CollectionStartEvent):
            raise _StopError(Mistake(path, "not valid YAML here", "check the indentation", _mark(event)))
        if event.tag not in (None, "!"):
            self._note(path, event, "tags (`!name`) are not used in this file", "remove the tag")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        before = self._nodes
        self._nodes += 1
        value: object
        if isinstance(event, ev.ScalarEvent):
            value = _plain(event.value) if event.implicit[0] else event.value
        elif isinstance(event, ev.SequenceStartEvent):
            value = self._sequence(path, depth)
        else:
            value = self._mapping(path, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._nodes - before)
        return value

    def _alias(self, event: ev.AliasEvent, path: KeyPath) -> object:
        known = self._anchors.get(event.anchor)
        if known is None:
            self._note(
                path, event, "an alias (`*name`) of an anchor that is not complete above", "define `&name` first"
            )
            return None
        value, size = known
        self._nodes += size
        self._aliased += size
        if self._aliased > MAX_ALIASED_NODES:
            message = f"aliases repeat more than {MAX_ALIASED_NODES} values"
            raise _StopError(Mistake((), message, "write fewer aliases of aliases", _mark(event)))
        return value

    def _sequence(self, path: KeyPath, depth: int) -> SequenceNode:
        sequence = SequenceNode()
        while not isinstance(event := next(self._events), ev.SequenceEndEvent):
            sequence.marks.append(_mark(event))
            sequence.append(self._node(event, (*path, len(sequence)), depth + 1))
        return sequence

    def _mapping(self, path: KeyPath, depth: int) -> MappingNode:
        mapping = MappingNode()
        merged: list[tuple[Mark, object]] = []
        while not isinstance(event := next(self._events), ev.MappingEndEvent):
            key = self._key(event, path, depth)
            mark = _mark(event)
            value = self._node(next(self._events), path if key is None else (*path, key), depth + 1)
            if key is None:
                continue
            if key == "<<" and isinstance(event, ev.ScalarEvent) and event.implicit[0]:
                merged.append((mark, value))
            elif key in mapping:
                message = f"the same key is on line {mapping.marks[key][0]}"
                self.mistakes.append(Mistake((*path, key), message, "keep one of the two", mark))
            else:
                mapping[key], mapping.marks[key] = value, mark
        for mark, value in merged:
            self._merge(mapping, value, path, mark)
        return mapping

    def _key(self, event: ev.Event, path: KeyPath, depth: int) -> str | None:
        if isinstance(event, ev.ScalarEvent):
            if event.anchor is not None:
                self._anchors[event.anchor] = (event.value, 1)
            return str(event.value)
        key = self._node(event, path, depth + 1)
        if not isinstance(key, str):
            self._note(path, event, "a key must be one word or text", "write `key: value`")
            return None
        return key

    def _merge(self, mapping: MappingNode, value: object, path: KeyPath, mark: Mark) -> None:
        for source in value if isinstance(value, SequenceNode) else (value,):
            if not isinstance(source, MappingNode):
                message = "`<<` takes an alias of a mapping"
                self.mistakes.append(Mistake(path, message, "write `<<: *name`, or remove it", mark))
                return
            self._count_merge(source, mark)
            for key, inherited in source.items():
                if key not in mapping:
                    mapping[key], mapping.marks[key] = inherited, source.marks[key]

    def _count_merge(self, source: MappingNode, mark: Mark) -> None:
        self._aliased += len(source)
        if self._aliased > MAX_ALIASED_NODES:
            message = f"merges repeat more than {MAX_ALIASED_NODES} values"
            raise _StopError(Mistake((), message, "write fewer merges of merges", mark))

    def _note(self, path: KeyPath, event: ev.Event, message: str, fix: str) -> None:
        self.mistakes.append(Mistake(path, message, fix, _mark(event)))


def _plain(text: str) -> object:
    """An unquoted scalar by YAML 1.2's core schema: `no`, `on` and `1_000` are text, a decimal stays exact."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _MAX_NUMBER_CHARS:
        return text
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return Decimal(text) if _FLOAT.fullmatch(text) else text


def _mark(event: ev.Event) -> Mark:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _mark_in(text_before: str) -> Mark:
    return text_before.count("\n") + 1, len(text_before) - text_before.rfind("\n")


def _syntax_mistake(error: YAMLError) -> Mistake:
    said = str(error.problem) if isinstance(error, MarkedYAMLError) else ""
    mark: Mark = (1, 1)
    if isinstance(error, MarkedYAMLError):
        at = error.problem_mark
        if error.context_mark is not None and any(part in said for part in _NAMES_THE_START):
            at = error.context_mark
        if at is not None:
            mark = (at.line + 1, at.column + 1)
    for part, message, fix in _SYNTAX:
        if part in said:
            return Mistake((), f"not valid YAML: {message}", f"{fix}; indent with spaces, never tabs", mark)
    return Mistake((), "not valid YAML from here on", "check quotes, colons and indentation (spaces, never tabs)", mark)
