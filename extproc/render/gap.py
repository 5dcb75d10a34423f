"""The seam: messages that Envoy 1.40 accepts and envoy-data-plane 2.2 does not have yet, declared here by hand.

Used by `routes` and `usage` only. The surprising thing: `AiProtocolManager` does exist in envoy-data-plane, as an empty
message, so its module must not be imported beside this one (both would register the same type URL). Field numbers are
those in the descriptors that the Envoy binary itself carries. When the package catches up, delete the class here and
import theirs; `make golden` then proves that nothing changed.
"""

from __future__ import annotations

import betterproto2
from envoy_data_plane.google.protobuf import UInt32Value
from envoy_data_plane.message_pool import default_message_pool
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid")


@dataclass(eq=False, repr=False, config=_STRICT)
class TokenUsageExtraction(betterproto2.Message):
    """envoy.extensions.filters.http.ai_protocol_manager.v3.TokenUsageExtraction"""

    include_unconfigured_routes: bool = betterproto2.field(1, betterproto2.TYPE_BOOL)


@dataclass(eq=False, repr=False, config=_STRICT)
class ResponseHandling(betterproto2.Message):
    """envoy.extensions.filters.http.ai_protocol_manager.v3.ResponseHandling"""

    token_usage: TokenUsageExtraction | None = betterproto2.field(1, betterproto2.TYPE_MESSAGE, optional=True)


@dataclass(eq=False, repr=False, config=_STRICT)
class AiProtocolManager(betterproto2.Message):
    """envoy.extensions.filters.http.ai_protocol_manager.v3.AiProtocolManager"""

    response_handling: ResponseHandling | None = betterproto2.field(2, betterproto2.TYPE_MESSAGE, optional=True)


@dataclass(eq=False, repr=False, config=_STRICT)
class ClusterWeight(betterproto2.Message):
    """envoy.extensions.router.cluster_specifiers.priority_group.v3.ClusterWeight"""

    cluster_name: str = betterproto2.field(1, betterproto2.TYPE_STRING)
    weight: int | None = betterproto2.field(2, betterproto2.TYPE_MESSAGE, unwrap=lambda: UInt32Value, optional=True)


@dataclass(eq=False, repr=False, config=_STRICT)
class PriorityGroup(betterproto2.Message):
    """envoy.extensions.router.cluster_specifiers.priority_group.v3.PriorityGroup"""

    name: str = betterproto2.field(1, betterproto2.TYPE_STRING)
    clusters: list[ClusterWeight] = betterproto2.field(2, betterproto2.TYPE_MESSAGE, repeated=True)


@dataclass(eq=False, repr=False, config=_STRICT)
class PriorityGroupClusterSpecifier(betterproto2.Message):
    """envoy.extensions.router.cluster_specifiers.priority_group.v3.PriorityGroupClusterSpecifier"""

    priority_groups: list[PriorityGroup] = betterproto2.field(1, betterproto2.TYPE_MESSAGE, repeated=True)
    override_metadata_namespace: str = betterproto2.field(2, betterproto2.TYPE_STRING)


def _register(package: str, message: type[betterproto2.Message]) -> None:
    default_message_pool.register_message(package, message.__name__, message)


_register("envoy.extensions.router.cluster_specifiers.priority_group.v3", PriorityGroupClusterSpecifier)
_register("envoy.extensions.filters.http.ai_protocol_manager.v3", AiProtocolManager)
