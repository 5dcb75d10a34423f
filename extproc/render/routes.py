"""Routes: one for each idle timeout that a decided request may have, and a dead end for all that is not decided.

The surprising thing: the header that a route matches on is the decision's own mark. Envoy drops a client's copy before
any filter runs, so a request reaches a provider only if decide sent it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

ROUTES = "gateway"
_ON = FilterConfig(config=Any())
"""Turns on a filter that is off by default, with the configuration it has in the listener."""


def route_configuration(snapshot: Snapshot, *, also: Sequence[Snapshot] = ()) -> RouteConfiguration:
    """The listener's only route configuration; requests that the snapshots in `also` decided find their way too."""
    idle_times = sorted({int(value) for each in (snapshot, *also) for value in _idle_values(each)})
    decided = [_decided(idle_ms) for idle_ms in idle_times]
    metered = [_undecided(RouteMatch(path=path), name=f"metered {path}") for path in METERED_BY_JSON_PATHS]
    for route in metered:
        route.typed_per_filter_config = {JSON_USAGE: Any.pack(_ON)}
    return RouteConfiguration(
        name=ROUTES,
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


def _idle_values(snapshot: Snapshot) -> Iterator[str]:
    """Every value that decide may give `IDLE_HEADER`: a request has the timeouts of its first target."""
    for provider in snapshot.providers.values():
        yield idle_value(provider.timeouts, 1)
    for model in (*snapshot.models.values(), *(model for _, model in snapshot.globs)):
        for target in model.targets:
            timeouts = model.timeouts_at(snapshot.providers[target.provider])
            yield from (idle_value(timeouts, number) for number in range(1, len(model.targets) + 1))


def _decided(idle_ms: int) -> Route:
    return Route(
        name=f"decided {idle_ms} ms",
        match=RouteMatch(
            prefix="/", headers=[HeaderMatcher(name=IDLE_HEADER, string_match=StringMatcher(exact=str(idle_ms)))]
        ),
        route=RouteAction(
            inline_cluster_specifier_plugin=_priority_group(),
            auto_host_rewrite=True,
            timeout=timedelta(0),
            idle_timeout=timedelta(milliseconds=idle_ms),
            retry_policy=RetryPolicy(
                retry_on="5xx,reset,connect-failure,retriable-status-codes",
                retriable_status_codes=[408, 429],
                num_retries=0,  # decide says how many, by header
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
