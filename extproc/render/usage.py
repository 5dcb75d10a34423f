"""The filters that read usage from answers inside Envoy, so that no answer need enter Python to be charged.

Part of the listener. The surprising thing: there are three readers. Envoy's AI filter reads chat, responses and
messages at a clean end, and nothing of embeddings or legacy completions; those have their usage copied field by field,
on their own paths only. Streams are also read by lua/answer.lua as they pass, because many clients hang up at `[DONE]`,
before the end that the AI filter waits for.
"""

from __future__ import annotations

from envoy_data_plane.envoy.extensions.filters.http.json_to_metadata.v3 import (
    JsonToMetadata,
    JsonToMetadataKeyValuePair,
    JsonToMetadataMatchRules,
    JsonToMetadataRule,
    JsonToMetadataSelector,
)
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.type.matcher.v3 import RegexMatcher
from envoy_data_plane.google.protobuf import Any

from extproc.decision import USAGE_NAMESPACE
from extproc.render.gap import AiProtocolManager, ResponseHandling, TokenUsageExtraction

JSON_USAGE = "json-usage"
"""Off, but on the routes of paths that `dialects.endpoints` says are metered this way."""


def usage_filters() -> list[HttpFilter]:
    """In the listener's order."""
    usage = AiProtocolManager(
        response_handling=ResponseHandling(token_usage=TokenUsageExtraction(include_unconfigured_routes=True))
    )
    return [
        HttpFilter(name="usage", typed_config=Any.pack(usage)),
        HttpFilter(name=JSON_USAGE, typed_config=Any.pack(_json_usage()), disabled=True),
    ]


_JSON = RegexMatcher(regex=r"(?i)application/json *(;.*)?")
_USAGE_FIELDS = (
    ("usage.prompt_tokens", "input_tokens"),
    ("usage.input_tokens", "input_tokens"),
    ("usage.completion_tokens", "output_tokens"),
    ("usage.output_tokens", "output_tokens"),
    ("usage.prompt_tokens_details.cached_tokens", "cached_tokens"),
    ("usage.completion_tokens_details.reasoning_tokens", "reasoning_tokens"),
    ("model", "model"),
)


def _usage_rules() -> list[JsonToMetadataRule]:
    return [
        JsonToMetadataRule(
            selectors=[JsonToMetadataSelector(key=part) for part in path.split(".")],
            on_present=JsonToMetadataKeyValuePair(metadata_namespace=USAGE_NAMESPACE, key=key),
        )
        for path, key in _USAGE_FIELDS
    ]


def _json_usage() -> JsonToMetadata:
    return JsonToMetadata(
        response_rules=JsonToMetadataMatchRules(rules=_usage_rules(), allow_content_types_regex=_JSON)
    )
