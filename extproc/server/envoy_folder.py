"""Envoy's folder: its configuration and secrets on disk, written before it starts and replaced while it runs.

Used by the supervisor. The surprising thing: a file counts as taken only when Envoy reports its version. One that Envoy
rejects is put back as it was, so that disk, Envoy and workers never disagree about which configuration is the last good
one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from extproc.config.snapshot import Snapshot
from extproc.render.bootstrap import secret_files
from extproc.render.deployment import Deployment
from extproc.render.files import EnvoyFiles, Watched, envoy_files
from extproc.server.envoy_admin import EnvoyAdmin

_TAKEN_WITHIN_S = 5.0
_POLL_S = 0.02
_STATS = {
    "clusters": "cluster_manager.cds",
    "routes": "http.gateway.rds.gateway",
    "listeners": "listener_manager.lds",
}


class ConfigRejectedError(Exception):
    """Envoy did not take a file that extproc rendered; the one before is back in place."""


class EnvoyFolder:
    """The files of one Envoy. Nothing here is readable by anyone but the owner."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._drafts = Path(deployment.run_dir) / "drafts"
        self._written: EnvoyFiles | None = None
        self._secrets: dict[str, str] = {}

    @property
    def bootstrap(self) -> Path:
        return Path(self._deployment.run_dir) / "envoy.json"

    def write(self, snapshot: Snapshot, secrets: Mapping[str, str]) -> None:
        """Everything, for an Envoy that has not started yet."""
        for folder in (self._drafts, Path(self._deployment.secrets_dir), Path(self._deployment.config_dir)):
            folder.mkdir(mode=0o700)
        files = envoy_files(snapshot, self._deployment)
        self._place_secrets(snapshot, secrets)
        for name, path in self._paths():
            self._place(path, getattr(files, name).text)
        self._place(self.bootstrap, files.bootstrap)
        self._written = files

    async def replace(
        self, snapshot: Snapshot, secrets: Mapping[str, str], admin: EnvoyAdmin, *, also: Sequence[Snapshot]
    ) -> None:
        """What has changed, clusters before the routes that may name them. Raises ConfigRejectedError."""
        before = self._written
        assert before is not None  # noqa: S101  (write comes first)
        files = await asyncio.to_thread(envoy_files, snapshot, self._deployment, also=also)
        self._place_secrets(snapshot, secrets)
        placed: list[tuple[Path, str]] = []
        try:
            for name, path in self._paths():
                old, new = getattr(before, name), getattr(files, name)
                if old.version != new.version:
                    placed.append((path, old.text))
                    await self._replace_one(name, path, new, admin)
        except ConfigRejectedError:
            for path, text in reversed(placed):
                self._place(path, text)
            raise
        self._written = files

    async def _replace_one(self, name: str, path: Path, new: Watched, admin: EnvoyAdmin) -> None:
        refusals = await admin.update_refusals(_STATS[name])
        self._place(path, new.text)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _TAKEN_WITHIN_S
        while await admin.version(_STATS[name]) != new.version:
            if await admin.update_refusals(_STATS[name]) > refusals:
                raise ConfigRejectedError(f"Envoy rejects the {name} of this configuration")
            if loop.time() > deadline:
                raise ConfigRejectedError(f"Envoy did not take the {name} of this configuration in time")
            await asyncio.sleep(_POLL_S)

    def _paths(self) -> list[tuple[str, Path]]:
        where = self._deployment
        return [
            ("clusters", Path(where.clusters_file)),
            ("routes", Path(where.routes_file)),
            ("listeners", Path(where.listeners_file)),
        ]

    def _place_secrets(self, snapshot: Snapshot, secrets: Mapping[str, str]) -> None:
        for path, text in secret_files(snapshot, self._deployment, secrets).items():
            if self._secrets.get(path) != text:
                self._place(Path(path), text)
                self._secrets[path] = text

    def _place(self, path: Path, text: str) -> None:
        """Whole or not at all, and never readable by others: written aside, then renamed."""
        draft = self._drafts / path.name
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        draft.replace(path)
