"""What request headers alone decide: refusals before any body arrives, and the headers that steer Envoy's router.

Used by both halves of the pipeline. The surprising thing: `x-extproc-idle-ms` is what makes a request routable at
all. Envoy's only routes to providers match on it, clients can not send it, and so no decision means no route.
"""

from __future__ import annotations

from extproc.config.snapshot import Timeouts
from extproc.decide import routing
from extproc.dialects.endpoints import Body, Endpoint
from extproc.dialects.multipart import boundary_of
from extproc.errors import Code, Refusal
from extproc.exchange import Headers, RequestHeaders

IDLE_HEADER = "x-extproc-idle-ms"


def speaks_anthropic(headers: Headers) -> bool:
    """Whether only Anthropic's clients would have sent these headers."""
    return headers.get("anthropic-version") is not None or (
        headers.get("x-api-key") is not None and headers.get("authorization") is None
    )


def refusal(event: RequestHeaders, endpoint: Endpoint, max_body_bytes: int) -> Refusal | None:
    """Why the headers alone rule the request out, or None."""
    headers = event.headers
    declared = headers.get("content-length")
    if declared is not None and (not declared.isdecimal() or int(declared[:20]) > max_body_bytes):
        return too_large(max_body_bytes)
    encodings = [encoding for value in headers.all("content-encoding") for encoding in value.split(",")]
    if any(encoding.strip().lower() not in ("", "identity") for encoding in encodings):
        return Refusal(Code.UNSUPPORTED_CONTENT_ENCODING, "Compressed bodies are not read here; send it plain.")
    types = headers.all("content-type")
    if len(types) > 1:
        return Refusal(Code.UNSUPPORTED_CONTENT_TYPE, "The request has more than one content type.")
    return _content_type_refusal(types[0] if types else "", endpoint, ends=event.ends)


def too_large(max_body_bytes: int) -> Refusal:
    """Also for a body that came without a length: Envoy reads up to a whole buffer beyond a limit that is smaller."""
    return Refusal(Code.BODY_TOO_LARGE, f"The body may have at most {max_body_bytes} bytes.")


def _content_type_refusal(content_type: str, endpoint: Endpoint, *, ends: bool) -> Refusal | None:
    match endpoint.body:
        case Body.JSON:
            fits = is_json(content_type)
            wanted = "application/json"
        case Body.MULTIPART:
            fits = boundary_of(content_type) is not None
            wanted = "multipart/form-data with a boundary"
        case Body.ANY:
            fits = ends or content_type == "" or is_json(content_type) or boundary_of(content_type) is not None
            wanted = "application/json or multipart/form-data"
        case Body.NONE:
            return None
    return None if fits else Refusal(Code.UNSUPPORTED_CONTENT_TYPE, f"This endpoint takes {wanted}.")


def is_json(content_type: str) -> bool:
    """application/json, in any case, with no charset or UTF-8 (RFC 8259 section 8.1)."""
    media, _, parameters = content_type.partition(";")
    charset = parameters.strip().lower().replace('"', "")
    return media.strip().lower() == "application/json" and charset in ("", "charset=utf-8", "charset=utf8")


def routing_headers(timeouts: Timeouts, attempts: int, body: bytes | None) -> tuple[tuple[str, str], ...]:
    """What Envoy's router reads: the route's idle time, retries and time to first byte; and the new body's length."""
    headers = (
        (IDLE_HEADER, idle_value(timeouts, attempts)),
        ("x-envoy-max-retries", str(attempts - 1)),
        ("x-envoy-upstream-rq-per-try-timeout-ms", str(milliseconds(timeouts.first_byte_s))),
    )
    return headers if body is None else (*headers, ("content-length", str(len(body))))


def idle_value(timeouts: Timeouts, attempts: int) -> str:
    """The value of `IDLE_HEADER` that the route for these timeouts and so many attempts matches."""
    return str(milliseconds(routing.idle_s(timeouts, attempts)))


def milliseconds(seconds: float) -> int:
    """At least one: Envoy takes 0 for no timeout at all."""
    return max(1, round(seconds * 1000))
