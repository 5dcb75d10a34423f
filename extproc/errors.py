"""Refusals: every way a request can be turned away, and how each reads in the client's own dialect.

A refusal is a value. The pipeline returns it, the edge renders it as an immediate response, and the record moment
stores its `code`. The surprising thing: the `code` is the contract. Status and type follow from it, so a client
library that maps status to an error class and an operator who greps for a code always agree.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum


class Dialect(StrEnum):
    """The wire format a client speaks, and so the shape of the errors it understands."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Code(StrEnum):
    """Stable refusal codes, listed in docs/errors.md. Renaming one is a breaking change."""

    MISSING_KEY = "missing_api_key"
    INVALID_KEY = "invalid_api_key"
    CONFLICTING_CREDENTIALS = "conflicting_credentials"
    MODEL_NOT_ALLOWED = "model_not_allowed"
    MODEL_NOT_FOUND = "model_not_found"
    UNKNOWN_PATH = "unknown_path"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    DIALECT_NOT_SUPPORTED = "dialect_not_supported"
    NO_DEFAULT_PROVIDER = "no_default_provider"
    INVALID_JSON = "invalid_json"
    DUPLICATE_KEY = "duplicate_key"
    INVALID_TYPE = "invalid_type"
    MISSING_FIELD = "missing_field"
    INVALID_MULTIPART = "invalid_multipart"
    INVALID_REQUEST = "invalid_request"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_CONTENT_TYPE = "unsupported_content_type"
    UNSUPPORTED_CONTENT_ENCODING = "unsupported_content_encoding"
    PROVIDER_AUTH = "provider_auth"
    RATE_LIMITED = "rate_limited"
    ALL_TARGETS_FAILED = "all_targets_failed"
    GATEWAY_UNAVAILABLE = "gateway_unavailable"


@dataclass(frozen=True, slots=True)
class _Shape:
    status: int
    openai_type: str
    anthropic_type: str


_INVALID = "invalid_request_error"

_SHAPES: dict[Code, _Shape] = {
    Code.MISSING_KEY: _Shape(401, _INVALID, "authentication_error"),
    Code.INVALID_KEY: _Shape(401, _INVALID, "authentication_error"),
    Code.CONFLICTING_CREDENTIALS: _Shape(401, _INVALID, "authentication_error"),
    Code.MODEL_NOT_ALLOWED: _Shape(403, "permission_error", "permission_error"),
    Code.MODEL_NOT_FOUND: _Shape(404, _INVALID, "not_found_error"),
    Code.UNKNOWN_PATH: _Shape(404, _INVALID, "not_found_error"),
    Code.METHOD_NOT_ALLOWED: _Shape(405, _INVALID, _INVALID),
    Code.DIALECT_NOT_SUPPORTED: _Shape(400, _INVALID, _INVALID),
    Code.NO_DEFAULT_PROVIDER: _Shape(400, _INVALID, _INVALID),
    Code.INVALID_JSON: _Shape(400, _INVALID, _INVALID),
    Code.DUPLICATE_KEY: _Shape(400, _INVALID, _INVALID),
    Code.INVALID_TYPE: _Shape(400, _INVALID, _INVALID),
    Code.MISSING_FIELD: _Shape(400, _INVALID, _INVALID),
    Code.INVALID_MULTIPART: _Shape(400, _INVALID, _INVALID),
    Code.INVALID_REQUEST: _Shape(400, _INVALID, _INVALID),
    Code.BODY_TOO_LARGE: _Shape(413, _INVALID, "request_too_large"),
    Code.UNSUPPORTED_CONTENT_TYPE: _Shape(415, _INVALID, _INVALID),
    Code.UNSUPPORTED_CONTENT_ENCODING: _Shape(415, _INVALID, _INVALID),
    Code.PROVIDER_AUTH: _Shape(502, "server_error", "api_error"),
    Code.RATE_LIMITED: _Shape(429, "rate_limit_error", "rate_limit_error"),
    Code.ALL_TARGETS_FAILED: _Shape(503, "server_error", "overloaded_error"),
    Code.GATEWAY_UNAVAILABLE: _Shape(503, "server_error", "api_error"),
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request goes no further. `message` is safe to show: it never holds a secret or an internal name."""

    code: Code
    message: str
    param: str | None = None

    @property
    def status(self) -> int:
        return _SHAPES[self.code].status


def error_document(refusal: Refusal, dialect: Dialect, request_id: str) -> dict[str, object]:
    """The error as `dialect` has it, before encoding (OpenAI's and Anthropic's error references)."""
    shape = _SHAPES[refusal.code]
    match dialect:
        case Dialect.OPENAI:
            error = {
                "message": f"{refusal.message} (request id: {request_id})",
                "type": shape.openai_type,
                "param": refusal.param,
                "code": refusal.code.value,
            }
            return {"error": error}
        case Dialect.ANTHROPIC:
            error = {"type": shape.anthropic_type, "message": refusal.message, "code": refusal.code.value}
            return {"type": "error", "error": error, "request_id": request_id}


def error_body(refusal: Refusal, dialect: Dialect, request_id: str) -> bytes:
    """`error_document` as the bytes of an answer."""
    document = error_document(refusal, dialect, request_id)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


ANTHROPIC_REQUEST_ID = "request-id"
"""Where Anthropic's SDK looks for the id of a request that failed. OpenAI's reads `x-request-id`, which Envoy adds."""


def error_headers(dialect: Dialect, request_id: str) -> tuple[tuple[str, str], ...]:
    """The headers of an answer that holds `error_body`."""
    content_type = ("content-type", "application/json")
    match dialect:
        case Dialect.OPENAI:
            return (content_type,)
        case Dialect.ANTHROPIC:
            return (content_type, (ANTHROPIC_REQUEST_ID, request_id))
