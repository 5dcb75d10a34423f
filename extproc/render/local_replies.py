"""What Envoy itself answers (a body too large, a path with two readings, no sidecar), in the client's dialect.

Part of the listener. The surprising thing: answers of decide pass here too, because Envoy sends them as local replies;
the first mapper leaves them as decide wrote them. And what Envoy can not even parse has no request id and perhaps no
path: such an answer is given an id here, which the access log reports as the request's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from envoy_data_plane.envoy.config.accesslog.v3 import (
    AccessLogFilter,
    AndFilter,
    ComparisonFilter,
    ComparisonFilterOp,
    HeaderFilter,
    MetadataFilter,
    StatusCodeFilter,
)
from envoy_data_plane.envoy.config.core.v3 import (
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
    RuntimeUInt32,
    SubstitutionFormatString,
)
from envoy_data_plane.envoy.config.route.v3 import HeaderMatcher
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import ResponseMapper
from envoy_data_plane.envoy.type.matcher.v3 import (
    MetadataMatcher,
    MetadataMatcherPathSegment,
    StringMatcher,
    ValueMatcher,
)
from envoy_data_plane.google.protobuf import NullValue, Struct, Value

from extproc.decision import NAMESPACE
from extproc.errors import ANTHROPIC_REQUEST_ID, Code, Dialect, Refusal, error_document

REQUEST_ID = "x-request-id"
_NOT_READ = "The request is not one that this gateway reads."


@dataclass(frozen=True, slots=True)
class _LocalReply:
    """What Envoy answers with a status from `low` to `high`, and the status it gets instead (None: it stays)."""

    low: int
    high: int
    code: Code
    message: str
    status: int | None = None


_LOCAL_REPLIES = (
    _LocalReply(413, 413, Code.BODY_TOO_LARGE, "The body is larger than this gateway takes."),
    _LocalReply(403, 403, Code.INVALID_REQUEST, "This gateway upgrades no connection.", status=400),
    _LocalReply(400, 499, Code.INVALID_REQUEST, _NOT_READ),
    _LocalReply(501, 501, Code.INVALID_REQUEST, _NOT_READ, status=400),
    _LocalReply(500, 599, Code.GATEWAY_UNAVAILABLE, "The gateway can not decide on requests now.", status=503),
)


def local_replies() -> list[ResponseMapper]:
    """What Envoy itself refuses reads like every other refusal; what decide has refused stays as decide wrote it."""
    mappers = [ResponseMapper(filter=_decided())]
    for dialect, conditions in ((Dialect.ANTHROPIC, [_anthropic_path()]), (Dialect.OPENAI, [])):
        for reply in _LOCAL_REPLIES:
            named = _mapper(reply, dialect, "%REQ(X-REQUEST-ID)%", [*conditions, _has_request_id()])
            if dialect is Dialect.ANTHROPIC:
                named.headers_to_add = [_header(ANTHROPIC_REQUEST_ID, "%REQ(X-REQUEST-ID)%")]
            mappers.append(named)
            anonymous = _mapper(reply, dialect, "%RESP(X-REQUEST-ID)%", conditions)
            anonymous.headers_to_add = [_header(REQUEST_ID, "%UNIQUE_ID%")]  # set before the body is formatted
            mappers.append(anonymous)
    return mappers


def _mapper(
    reply: _LocalReply, dialect: Dialect, request_id: str, conditions: Sequence[AccessLogFilter]
) -> ResponseMapper:
    document = error_document(Refusal(reply.code, reply.message), dialect, request_id)
    bounds = ((ComparisonFilterOp.GE, reply.low), (ComparisonFilterOp.LE, reply.high))
    return ResponseMapper(
        filter=AccessLogFilter(and_filter=AndFilter(filters=[*(_status(*bound) for bound in bounds), *conditions])),
        status_code=reply.status,
        body_format_override=SubstitutionFormatString(json_format=_struct(document)),
    )


def _header(name: str, value: str) -> HeaderValueOption:
    overwrite = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
    return HeaderValueOption(header=HeaderValue(key=name, value=value), append_action=overwrite)


def _decided() -> AccessLogFilter:
    matcher = MetadataMatcher(
        filter=NAMESPACE,
        path=[MetadataMatcherPathSegment(key="dialect")],
        value=ValueMatcher(present_match=True),
    )
    return AccessLogFilter(metadata_filter=MetadataFilter(matcher=matcher, match_if_key_not_found=False))


def _status(op: ComparisonFilterOp, bound: int) -> AccessLogFilter:
    compared = ComparisonFilter(op=op, value=RuntimeUInt32(default_value=bound, runtime_key="unused"))
    return AccessLogFilter(status_code_filter=StatusCodeFilter(comparison=compared))


def _anthropic_path() -> AccessLogFilter:
    path = HeaderMatcher(name=":path", string_match=StringMatcher(prefix="/v1/messages"))
    return AccessLogFilter(header_filter=HeaderFilter(header=path))


def _has_request_id() -> AccessLogFilter:
    return AccessLogFilter(header_filter=HeaderFilter(header=HeaderMatcher(name=REQUEST_ID, present_match=True)))


def _struct(document: dict[str, object]) -> Struct:
    return Struct(fields={name: _value(value) for name, value in document.items()})


def _value(value: object) -> Value:
    match value:
        case dict():
            return Value(struct_value=_struct(value))
        case None:
            return Value(null_value=NullValue.NULL_VALUE)
        case _:
            return Value(string_value=str(value))
