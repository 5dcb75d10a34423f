"""Routes: one for each idle timeout that a decided request may have, and a dead end for all that is not decided.

The surprising thing: the header that a route matches on is the decision's own mark. Envoy drops a client's copy before
any filter runs, so a request reaches a provider only if decide sent it there.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from envoy_data_plane.envoy.type.matcher.v3 import (
    MetadataMatcher,
    MetadataMatcherPathSegment,
    StringMatcher,
    ValueMatcher,
)
from envoy_data_plane.google.protobuf import Any

from extproc.config.snapshot import Model, Snapshot, Timeouts
from extproc.decide.headers import IDLE_HEADER, idle_value
from extproc.decision import ATTEMPTS_NAMESPACE, ROUTE_NAMESPACE
from extproc.dialects.endpoints import METERED_BY_JSON_PATHS
from extproc.providers.kinds import CREDENTIAL_HEADERS
from extproc.render.clusters import UNDECIDED
from extproc.render.gap import ClusterWeight, PriorityGroup, PriorityGroupClusterSpecifier
from extproc.render.usage import JSON_USAGE

ROUTES = "gateway"
_SLACK_S = 10.0
"""For connecting and the pauses between attempts."""
_ON = FilterConfig(config=Any())
"""Turns on a filter that is off by default, with the configuration it has in the listener."""


def route_configuration(snapshot: Snapshot, *, also: Sequence[Snapshot] = ()) -> RouteConfiguration:
    """The listener's only route configuration; requests that the snapshots in `also` decided find their way too."""
    timeouts = [pair for each in (snapshot, *also) for pair in _timeouts(each)]
    idle_times = sorted({int(idle_value(pair, stream=stream)) for pair in timeouts for stream in (True, False)})
    longest_chain = max((len(model.targets) for each in (snapshot, *also) for model in _models(each)), default=1)
    wait = timedelta(seconds=max(pair.first_byte_s for pair in timeouts) * longest_chain + _SLACK_S)
    decided = [route for idle_ms in idle_times for route in (_answering(idle_ms), _decided(idle_ms, wait))]
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


def _models(snapshot: Snapshot) -> list[Model]:
    return [*snapshot.models.values(), *(model for _, model in snapshot.globs)]


def _timeouts(snapshot: Snapshot) -> list[Timeouts]:
    """Every pair of timeouts that decide may give a request."""
    pairs = [provider.timeouts for provider in snapshot.providers.values()]
    for model in _models(snapshot):
        pairs += (model.timeouts_at(snapshot.providers[target.provider]) for target in model.targets)
    return pairs


def _decided(idle_ms: int, wait: timedelta) -> Route:
    return Route(
        name=f"decided {idle_ms} ms",
        match=_mark(idle_ms),
        route=RouteAction(
            inline_cluster_specifier_plugin=_priority_group(),
            auto_host_rewrite=True,
            timeout=timedelta(0),
            # Each attempt has its own time to first byte; this bounds all of them together.
            idle_timeout=wait,
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


def _answering(idle_ms: int) -> Route:
    """Where a stream's request is found again once its answer has begun (lua/answer.lua), for the idle time alone.

    Not `per_try_idle_timeout`: Envoy drops its timer when the time to first byte is over, also where that was met.
    """
    begun = MetadataMatcher(
        filter=ATTEMPTS_NAMESPACE,
        path=[MetadataMatcherPathSegment(key="answering")],
        value=ValueMatcher(present_match=True),
    )
    match = _mark(idle_ms)
    match.dynamic_metadata = [begun]
    return Route(
        name=f"answering {idle_ms} ms",
        match=match,
        route=RouteAction(cluster=UNDECIDED, timeout=timedelta(0), idle_timeout=timedelta(milliseconds=idle_ms)),
    )


def _mark(idle_ms: int) -> RouteMatch:
    exact = HeaderMatcher(name=IDLE_HEADER, string_match=StringMatcher(exact=str(idle_ms)))
    return RouteMatch(prefix="/", headers=[exact])


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
