"""What Envoy itself answers (a body too large, a path with two readings, a sidecar that is gone), in the client's dialect.

Part of the listener. The surprising thing: answers of decide pass here too, because Envoy sends them as local replies;
the first mapper leaves them as decide wrote them.
"""

from __future__ import annotations

from envoy_data_plane.envoy.config.accesslog.v3 import (
    AccessLogFilter,
    AndFilter,
    ComparisonFilter,
    ComparisonFilterOp,
    HeaderFilter,
    MetadataFilter,
    StatusCodeFilter,
)
from envoy_data_plane.envoy.config.core.v3 import RuntimeUInt32, SubstitutionFormatString
from envoy_data_plane.envoy.config.route.v3 import HeaderMatcher
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import ResponseMapper
from envoy_data_plane.envoy.type.matcher.v3 import (
    MetadataMatcher,
    MetadataMatcherPathSegment,
    StringMatcher,
    ValueMatcher,
)
from envoy_data_plane.google.protobuf import Struct, Value

from extproc.decision import NAMESPACE
from extproc.errors import Code, Dialect, Refusal, error_document

_LOCAL_REPLIES = (
    (413, 413, Code.BODY_TOO_LARGE, "The body is larger than this gateway takes."),
    (400, 499, Code.INVALID_REQUEST, "The request is not one that this gateway reads."),
    (500, 599, Code.GATEWAY_UNAVAILABLE, "The gateway can not decide on requests now."),
)


def local_replies() -> list[ResponseMapper]:
    """What Envoy itself refuses reads like every other refusal; what decide has refused stays as decide wrote it."""
    mappers = [ResponseMapper(filter=_decided())]
    for dialect, path_prefix in ((Dialect.ANTHROPIC, "/v1/messages"), (Dialect.OPENAI, "/")):
        for low, high, code, message in _LOCAL_REPLIES:
            document = error_document(Refusal(code, message), dialect, "%REQ(X-REQUEST-ID)%")
            mappers.append(
                ResponseMapper(
                    filter=_answers(low, high, path_prefix),
                    body_format_override=SubstitutionFormatString(json_format=_struct(document)),
                )
            )
    return mappers


def _decided() -> AccessLogFilter:
    matcher = MetadataMatcher(
        filter=NAMESPACE,
        path=[MetadataMatcherPathSegment(key="dialect")],
        value=ValueMatcher(present_match=True),
    )
    return AccessLogFilter(metadata_filter=MetadataFilter(matcher=matcher, match_if_key_not_found=False))


def _answers(low: int, high: int, path_prefix: str) -> AccessLogFilter:
    path = HeaderMatcher(name=":path", string_match=StringMatcher(prefix=path_prefix))
    bounds = ((ComparisonFilterOp.GE, low), (ComparisonFilterOp.LE, high))
    statuses = [
        AccessLogFilter(
            status_code_filter=StatusCodeFilter(
                comparison=ComparisonFilter(op=op, value=RuntimeUInt32(default_value=value, runtime_key="unused"))
            )
        )
        for op, value in bounds
    ]
    return AccessLogFilter(
        and_filter=AndFilter(filters=[*statuses, AccessLogFilter(header_filter=HeaderFilter(header=path))])
    )


def _struct(document: dict[str, object]) -> Struct:
    return Struct(fields={name: _value(value) for name, value in document.items()})


def _value(value: object) -> Value:
    match value:
        case dict():
            return Value(struct_value=_struct(value))
        case None:
            return Value(null_value=0)
        case _:
            return Value(string_value=str(value))
