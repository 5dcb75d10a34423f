"""Envoy's configuration as the files that it watches: what a running Envoy is given, and given anew at a reload.

Rendered by the supervisor. The surprising thing: routes stand in a file of their own. A changed listener makes Envoy
drain the connections of the old one; changed routes and clusters touch no connection, and those are what change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from betterproto2 import Message
from envoy_data_plane.envoy.config.bootstrap.v3 import (
    Bootstrap,
    BootstrapDynamicResources,
    BootstrapStaticResources,
)
from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from envoy_data_plane.envoy.config.core.v3 import ConfigSource, PathConfigSource, WatchedDirectory
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse
from envoy_data_plane.google.protobuf import Any

from extproc.config.snapshot import Snapshot
from extproc.render.bootstrap import admin, as_json, node
from extproc.render.clusters import RECORD, SIDECAR, UNDECIDED, clusters
from extproc.render.deployment import Deployment
from extproc.render.listener import listener
from extproc.render.routes import route_configuration


@dataclass(frozen=True, slots=True)
class Watched:
    """One file that Envoy watches. `version` is what Envoy reports once it has taken this text."""

    version: str
    text: str


@dataclass(frozen=True, slots=True)
class EnvoyFiles:
    """Contents of the four files. `clusters` and `routes` change with gateway.yaml, `listeners` seldom does."""

    bootstrap: str
    listeners: Watched
    routes: Watched
    clusters: Watched


def envoy_files(snapshot: Snapshot, deployment: Deployment, *, also: Sequence[Snapshot] = ()) -> EnvoyFiles:
    """The files for `snapshot`. Requests that were decided by the snapshots in `also` still find their way too."""
    rendered: dict[str, Cluster] = {}
    for each in (*reversed(also), snapshot):
        rendered |= {cluster.name: cluster for cluster in clusters(each, deployment)}
    fixed = [rendered.pop(name) for name in (SIDECAR, RECORD, UNDECIDED)]
    bootstrap = Bootstrap(
        node=node(),
        admin=admin(deployment),
        static_resources=BootstrapStaticResources(clusters=fixed),
        dynamic_resources=BootstrapDynamicResources(
            cds_config=_watched(deployment, deployment.clusters_file),
            lds_config=_watched(deployment, deployment.listeners_file),
        ),
    )
    routes = route_configuration(snapshot, also=also)
    gateway = listener(snapshot, routes_from=_watched(deployment, deployment.routes_file), journal=deployment.journal)
    return EnvoyFiles(
        bootstrap=as_json(bootstrap),
        listeners=_resources(gateway),
        routes=_resources(routes),
        clusters=_resources(*rendered.values()),
    )


def _watched(deployment: Deployment, path: object) -> ConfigSource:
    directory = WatchedDirectory(path=str(deployment.config_dir))
    return ConfigSource(path_config_source=PathConfigSource(path=str(path), watched_directory=directory))


def _resources(*messages: Message) -> Watched:
    response = DiscoveryResponse(resources=[Any.pack(message) for message in messages])
    response.version_info = sha256(bytes(response)).hexdigest()[:16]
    return Watched(response.version_info, as_json(response))
