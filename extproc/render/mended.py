"""The filter that says what lua/answer.lua has worded: the gateway's own answer in place of a provider's failure.

Part of the listener, outside the Lua filter, so it runs after it on the way back. The surprising thing: Lua can not
end a response. Its `body()` waits for the whole of a body that may be huge or have no end, so it leaves the text in
metadata and a mark on the headers, and this filter answers at once and lets go of the provider.
"""

from __future__ import annotations

from envoy_data_plane.envoy.config.core.v3 import (
    DataSource,
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
    SubstitutionFormatString,
)
from envoy_data_plane.envoy.extensions.filters.http.custom_response.v3 import CustomResponse
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.http.custom_response.local_response_policy.v3 import LocalResponsePolicy
from envoy_data_plane.envoy.type.matcher.v3 import HttpResponseHeaderMatchInput
from envoy_data_plane.google.protobuf import Any
from envoy_data_plane.xds.core.v3 import TypedExtensionConfig
from envoy_data_plane.xds.type.matcher.v3 import (
    Matcher,
    MatcherMatcherTree,
    MatcherMatcherTreeMatchMap,
    MatcherOnMatch,
)

from extproc.decision import ATTEMPTS_NAMESPACE, NAMESPACE
from extproc.errors import ANTHROPIC_REQUEST_ID

MARK = "x-extproc-mended"
"""Set by Lua, to `wait` or `now`: whether the client is told how long to wait. No provider's copy gets this far."""


def mended() -> HttpFilter:
    """The filter, inert on every response that does not bear the mark."""
    marks = {"now": MatcherOnMatch(action=_say()), "wait": MatcherOnMatch(action=_say(_retry_after()))}
    mark = TypedExtensionConfig(name="mark", typed_config=Any.pack(HttpResponseHeaderMatchInput(header_name=MARK)))
    matcher = Matcher(
        matcher_tree=MatcherMatcherTree(input=mark, exact_match_map=MatcherMatcherTreeMatchMap(map=marks))
    )
    return HttpFilter(name="mended", typed_config=Any.pack(CustomResponse(custom_response_matcher=matcher)))


def _say(*headers: HeaderValueOption) -> TypedExtensionConfig:
    """The answer: Lua's status, which stands on the response already, and Lua's text."""
    text = SubstitutionFormatString(
        text_format_source=DataSource(inline_string=f"%DYNAMIC_METADATA({ATTEMPTS_NAMESPACE}:answer)%"),
        content_type="application/json",
    )
    policy = LocalResponsePolicy(body_format=text, response_headers_to_add=[_json(), *_request_ids(), *headers])
    return TypedExtensionConfig(name="mended", typed_config=Any.pack(policy))


def _json() -> HeaderValueOption:
    return _header("content-type", "application/json")


def _request_ids() -> list[HeaderValueOption]:
    """Said by hand, because such an answer does not pass where Envoy adds it; twice, for each SDK reads its own."""
    request_id = f"%DYNAMIC_METADATA({NAMESPACE}:request_id)%"
    return [_header(name, request_id) for name in ("x-request-id", ANTHROPIC_REQUEST_ID)]


def _retry_after() -> HeaderValueOption:
    return _header("retry-after", f"%DYNAMIC_METADATA({ATTEMPTS_NAMESPACE}:wait)%")


def _header(name: str, value: str) -> HeaderValueOption:
    overwrite = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
    return HeaderValueOption(header=HeaderValue(key=name, value=value), append_action=overwrite)
