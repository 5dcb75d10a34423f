"""The endpoints a client may call: what their body is, whether they name a model, and where their usage is found.

decide looks a request up here right after it knows who asks. The surprising thing: a path that is not in this table
does not exist. Passing unknown paths on would let a new provider endpoint bypass the policy of the day before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from urllib.parse import unquote

from extproc.errors import Dialect


class Body(Enum):
    """What an endpoint takes."""

    JSON = auto()
    MULTIPART = auto()
    NONE = auto()
    ANY = auto()
    """JSON, multipart or nothing: pass-through endpoints of many shapes."""


class Naming(Enum):
    """Whether the body names the model that routes the request."""

    REQUIRED = auto()
    OPTIONAL = auto()
    """Named or not; unnamed goes the way of pass-through."""
    ABSENT = auto()
    """Pass-through: the default provider of the key's team, for keys that may use every model."""


class Metering(Enum):
    """Which of Envoy's filters reads the usage of a response."""

    AI = auto()
    JSON = auto()
    NONE = auto()


_MODEL_ALONE = {"model": "string"}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row of the table. `types` gives the JSON types that a field must have where it is present."""

    name: str
    dialect: Dialect
    body: Body
    naming: Naming
    metering: Metering = Metering.NONE
    types: Mapping[str, str] = field(default_factory=lambda: _MODEL_ALONE)
    required: tuple[str, ...] = ()
    stream_options: bool = False
    """Streams tell their usage only to who asks with `stream_options.include_usage`."""


_SAMPLING = {
    "temperature": "number",
    "top_p": "number",
    "max_tokens": "integer",
    "tools": "array",
    "metadata": "object",
}

CHAT = Endpoint(
    "chat",
    Dialect.OPENAI,
    Body.JSON,
    Naming.REQUIRED,
    Metering.AI,
    types={
        **_MODEL_ALONE,
        "messages": "array",
        "stream": "boolean",
        "stream_options": "object",
        "max_completion_tokens": "integer",
        "n": "integer",
        **_SAMPLING,
    },
    required=("messages",),
    stream_options=True,
)
COMPLETIONS = Endpoint(
    "completions",
    Dialect.OPENAI,
    Body.JSON,
    Naming.REQUIRED,
    Metering.JSON,
    types={
        **_MODEL_ALONE,
        "prompt": "string|array",
        "stream": "boolean",
        "stream_options": "object",
        "max_tokens": "integer",
        "n": "integer",
    },
    stream_options=True,
)
RESPONSES = Endpoint(
    "responses",
    Dialect.OPENAI,
    Body.JSON,
    Naming.REQUIRED,
    Metering.AI,
    types={
        **_MODEL_ALONE,
        "input": "string|array",
        "stream": "boolean",
        "max_output_tokens": "integer",
        "instructions": "string|array",
        **_SAMPLING,
    },
)
EMBEDDINGS = Endpoint(
    "embeddings",
    Dialect.OPENAI,
    Body.JSON,
    Naming.REQUIRED,
    Metering.JSON,
    types={**_MODEL_ALONE, "input": "string|array", "dimensions": "integer"},
    required=("input",),
)
MESSAGES = Endpoint(
    "messages",
    Dialect.ANTHROPIC,
    Body.JSON,
    Naming.REQUIRED,
    Metering.AI,
    types={
        **_MODEL_ALONE,
        "messages": "array",
        "stream": "boolean",
        "system": "string|array",
        "stop_sequences": "array",
        **_SAMPLING,
    },
    required=("messages",),
)
COUNT_TOKENS = replace(MESSAGES, name="count_tokens", metering=Metering.NONE)
INPUT_TOKENS = replace(RESPONSES, name="input_tokens", metering=Metering.NONE)
MODELS = Endpoint("models", Dialect.OPENAI, Body.NONE, Naming.ABSENT)
PASS_THROUGH = Endpoint("pass_through", Dialect.OPENAI, Body.ANY, Naming.ABSENT)
_ANTHROPIC_PASS_THROUGH = replace(PASS_THROUGH, dialect=Dialect.ANTHROPIC)

_JSON_NAMED = Endpoint(
    "", Dialect.OPENAI, Body.JSON, Naming.REQUIRED, Metering.JSON, types={**_MODEL_ALONE, "stream": "boolean"}
)
_MULTIPART_NAMED = Endpoint("", Dialect.OPENAI, Body.MULTIPART, Naming.REQUIRED, Metering.JSON)

_POSTS: dict[str, Endpoint] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/v1/responses/input_tokens": INPUT_TOKENS,
    "/v1/embeddings": EMBEDDINGS,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": COUNT_TOKENS,
    "/v1/moderations": replace(_JSON_NAMED, name="moderations", naming=Naming.OPTIONAL, metering=Metering.NONE),
    "/v1/rerank": replace(_JSON_NAMED, name="rerank"),
    "/v1/images/generations": replace(_JSON_NAMED, name="images", naming=Naming.OPTIONAL),
    "/v1/images/edits": replace(_MULTIPART_NAMED, name="images", naming=Naming.OPTIONAL),
    "/v1/images/variations": replace(_MULTIPART_NAMED, name="images", naming=Naming.OPTIONAL),
    "/v1/audio/speech": replace(_JSON_NAMED, name="speech", metering=Metering.NONE),
    "/v1/audio/transcriptions": replace(_MULTIPART_NAMED, name="transcriptions"),
    "/v1/audio/translations": replace(_MULTIPART_NAMED, name="translations"),
}

_PASS_THROUGH_FAMILIES = frozenset(
    (
        *("assistants", "batches", "containers", "conversations", "evals", "files", "fine_tuning"),
        *("responses", "threads", "uploads", "vector_stores", "videos"),
    )
)
"""First segments under /v1 whose stored objects belong to one provider, because their ids mean nothing to another."""

_ONE_READING = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9\-._~!$&'()*+,=:@]+)+")
"""Decoded paths that every server takes apart alike: no `;`, no second layer of `%`, no empty or dot segment."""

_METHODS = frozenset(("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD"))

METERED_BY_JSON_PATHS: tuple[str, ...] = tuple(
    path for path, endpoint in _POSTS.items() if endpoint.metering is Metering.JSON
)
"""Where render puts Envoy's json_to_metadata: its AI filter reads no usage of these."""


class Miss(Enum):
    """Why `find` has no endpoint."""

    PATH = auto()
    METHOD = auto()


def find(method: str, path: str) -> Endpoint | Miss:
    """The endpoint of a normalised path (no query). Exact in case; nothing is trimmed or decoded."""
    if path == "/v1/models" or path.startswith("/v1/models/"):
        return MODELS if method == "GET" else Miss.METHOD
    if (endpoint := _POSTS.get(path)) is not None and method == "POST":
        return endpoint
    family = _pass_through(path)
    if endpoint is not None and (family is None or method not in ("GET", "HEAD")):
        return Miss.METHOD
    if family is None:
        return Miss.PATH
    return family if method in _METHODS else Miss.METHOD


def _pass_through(path: str) -> Endpoint | None:
    """The family of a path that goes upstream as it is, and so must not read as another one there."""
    if not _ONE_READING.fullmatch(unquote(path) if "%" in path else path):
        return None
    match path.split("/"):
        case ["", "v1", "messages", *below]:
            return _ANTHROPIC_PASS_THROUGH if below[:1] == ["batches"] else None
        case ["", "v1", "chat", *below]:
            return PASS_THROUGH if below[:1] == ["completions"] else None
        case ["", "v1", family, *_] if family in _PASS_THROUGH_FAMILIES:
            return PASS_THROUGH
        case _:
            return None


def dialect_of(path: str, *, speaks_anthropic: bool) -> Dialect:
    """The dialect to answer in: by path where the path tells, else by the headers only Anthropic's clients send."""
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    endpoint = _POSTS.get(path)
    if endpoint is not None:
        return endpoint.dialect
    return Dialect.ANTHROPIC if speaks_anthropic else Dialect.OPENAI
