"""Envoy's whole configuration for one snapshot and one place to run it in.

Rendered when the gateway starts and by `extproc render`. The surprising thing: it names where secrets are, and holds
none; they stand in files of their own (`secret_files`), readable by their owner alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from betterproto2 import Casing, Message
from envoy_data_plane.envoy.config.bootstrap.v3 import Admin, Bootstrap, BootstrapStaticResources
from envoy_data_plane.envoy.config.core.v3 import Address, DataSource, Node, Pipe
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import GenericSecret, Secret
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse
from envoy_data_plane.google.protobuf import Any

from extproc.config.snapshot import Snapshot
from extproc.providers.kinds import KINDS
from extproc.render.clusters import clusters, secret_name
from extproc.render.deployment import Deployment
from extproc.render.listener import listener

_OWNER_ONLY = 0o600


def render(snapshot: Snapshot, deployment: Deployment) -> str:
    """Envoy's bootstrap as JSON, the same for the same input."""
    bootstrap = Bootstrap(
        node=node(),
        admin=admin(deployment),
        static_resources=BootstrapStaticResources(
            listeners=[listener(snapshot)], clusters=clusters(snapshot, deployment)
        ),
    )
    return as_json(bootstrap)


def node() -> Node:
    """Who Envoy says it is."""
    return Node(id="gateway", cluster="extproc")


def admin(deployment: Deployment) -> Admin:
    """Envoy's admin pages, on a socket that is its owner's alone: they can stop it and show its configuration."""
    return Admin(address=Address(pipe=Pipe(path=str(deployment.admin_socket), mode=_OWNER_ONLY)))


def as_json(message: Message) -> str:
    """A message as Envoy reads it from a file."""
    return json.dumps(_plain(message.to_dict(casing=_CASING)), indent=2, ensure_ascii=False) + "\n"


def _field_name(name: str) -> str:
    """As the .proto file has it. (betterproto2's own snake case makes `consecutive_5_xx` of `consecutive_5xx`.)"""
    return name.rstrip("_")


_CASING = cast(Casing, _field_name)  # its type knows its own two casings alone; any function does


def _plain(value: object) -> object:
    """betterproto2 writes an empty Any as `{"@type": ""}`; protobuf's JSON, and so Envoy, has it as `{}`."""
    match value:
        case {"@type": ""}:
            return {}
        case dict():
            return {name: _plain(each) for name, each in value.items()}
        case list():
            return [_plain(each) for each in value]
        case _:
            return value


def secret_files(snapshot: Snapshot, deployment: Deployment, secrets: Mapping[str, str]) -> dict[str, str]:
    """Path to content of Envoy's secret files: `secrets` gives each provider's secret by the provider's name.

    Providers that name the same variable or file share one: Envoy watches each file with an inotify instance of its
    own, and a user has 128 of those by default.
    """
    files: dict[str, str] = {}
    for provider, secret in secrets.items():
        name = secret_name(snapshot.providers[provider], snapshot)
        prefix = KINDS[snapshot.providers[provider].kind].credential_prefix
        files[str(deployment.secret_file(name))] = _secret_file(name, prefix + secret)
    return files


def _secret_file(name: str, value: str) -> str:
    secret = Secret(name=name, generic_secret=GenericSecret(secret=DataSource(inline_string=value)))
    return json.dumps(DiscoveryResponse(resources=[Any.pack(secret)]).to_dict(casing=_CASING))
