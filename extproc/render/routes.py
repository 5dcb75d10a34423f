"""Routes: one for each idle timeout that a decided request may have, and a dead end for all that is not decided.

The surprising thing: the header that a route matches on is the decision's own mark. Envoy drops a client's copy before
any filter runs, so a request reaches a provider only if decide sent it there.
"""

from __future__ import annotations

from datetime import timedelta

from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig
from envoy_data_plane.envoy.config.route.v3 import (
    ClusterSpecifierPlugin,
    FilterConfig,
    HeaderMatcher,
    RetryPolicy,
    RetryPolicyRetryBackOff,
    Route,
    RouteAction,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from extproc.config.snapshot import Snapshot
from extproc.decide.headers import IDLE_HEADER, idle_value
from extproc.decision import ROUTE_NAMESPACE
from extproc.dialects.endpoints import METERED_BY_JSON_PATHS
from extproc.providers.kinds import CREDENTIAL_HEADERS
from extproc.render.clusters import UNDECIDED
from extproc.render.gap import ClusterWeight, PriorityGroup, PriorityGroupClusterSpecifier
from extproc.render.usage import JSON_USAGE

_FLUSH_S = 10.0
_ON = FilterConfig(config=Any())
"""Turns on a filter that is off by default, with the configuration it has in the listener."""


def route_configuration(snapshot: Snapshot) -> RouteConfiguration:
    """The listener's only route configuration."""
    idle_times = sorted({int(value) for value in _idle_values(snapshot)})
    longest_chain = max((len(model.targets) for model in snapshot.models.values()), default=1)
    longest_chain = max((longest_chain, *(len(model.targets) for _, model in snapshot.globs)))
    decided = [_decided(idle_ms, longest_chain) for idle_ms in idle_times]
    metered = [_undecided(RouteMatch(path=path), name=f"metered {path}") for path in METERED_BY_JSON_PATHS]
    for route in metered:
        route.typed_per_filter_config = {JSON_USAGE: Any.pack(_ON)}
    return RouteConfiguration(
        name="gateway",
        virtual_hosts=[
            VirtualHost(
                name="gateway",
                domains=["*"],
                routes=[*decided, *metered, _undecided(RouteMatch(prefix="/"), name="undecided")],
                request_body_buffer_limit=snapshot.listen.max_body_bytes,
                request_headers_to_remove=[*CREDENTIAL_HEADERS, "accept-encoding", "cookie"],
            )
        ],
    )


def _idle_values(snapshot: Snapshot) -> list[str]:
    timeouts = [provider.timeouts for provider in snapshot.providers.values()]
    for model in (*snapshot.models.values(), *(model for _, model in snapshot.globs)):
        timeouts += (model.timeouts_at(snapshot.providers[target.provider]) for target in model.targets)
    return [idle_value(each, stream=stream) for each in timeouts for stream in (True, False)]


def _decided(idle_ms: int, longest_chain: int) -> Route:
    idle = timedelta(milliseconds=idle_ms)
    return Route(
        name=f"decided {idle_ms} ms",
        match=RouteMatch(
            prefix="/", headers=[HeaderMatcher(name=IDLE_HEADER, string_match=StringMatcher(exact=str(idle_ms)))]
        ),
        route=RouteAction(
            inline_cluster_specifier_plugin=_priority_group(),
            auto_host_rewrite=True,
            timeout=timedelta(0),
            # The stream as a whole may be silent while each attempt in turn is; a client that does not read ends here.
            idle_timeout=idle * longest_chain + timedelta(seconds=_FLUSH_S),
            retry_policy=RetryPolicy(
                retry_on="5xx,reset,connect-failure,retriable-status-codes",
                retriable_status_codes=[408, 429],
                num_retries=0,  # decide says how many, by header
                per_try_idle_timeout=idle,
                refresh_cluster_on_retry=True,
                retry_back_off=RetryPolicyRetryBackOff(
                    base_interval=timedelta(milliseconds=25), max_interval=timedelta(milliseconds=250)
                ),
            ),
        ),
    )


def _undecided(match: RouteMatch, *, name: str) -> Route:
    return Route(name=name, match=match, route=RouteAction(cluster=UNDECIDED))


def _priority_group() -> ClusterSpecifierPlugin:
    nowhere = PriorityGroup(name=UNDECIDED, clusters=[ClusterWeight(cluster_name=UNDECIDED, weight=1)])
    specifier = PriorityGroupClusterSpecifier(override_metadata_namespace=ROUTE_NAMESPACE, priority_groups=[nowhere])
    return ClusterSpecifierPlugin(
        extension=TypedExtensionConfig(
            name="envoy.router.cluster_specifier_plugin.priority_group", typed_config=Any.pack(specifier)
        )
    )
