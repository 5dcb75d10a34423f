"""Hot reload: a changed gateway.yaml becomes live in Envoy and in the workers, or changes nothing at all.

Run by the supervisor beside everything else. The surprising thing: order is all there is to it. Envoy first learns all
clusters and routes of the new configuration while it keeps those of the old, then the workers begin to decide by the
new one, and what only the old one used goes at a later reload. At no moment can a decision name what Envoy has not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from extproc.config.secrets import SecretError, read_secret
from extproc.config.snapshot import Snapshot
from extproc.config.source import format_problems, parse
from extproc.server.envoy_folder import ConfigRejectedError
from extproc.server.watching import changes

_log = logging.getLogger(__name__)
_KEPT_SNAPSHOTS = 3
"""How many earlier configurations Envoy keeps clusters and routes of, for requests that they decided."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that is good: its bytes, what they compile to, and the secrets that they name."""

    raw: bytes
    snapshot: Snapshot
    secrets: Mapping[str, str]


class BadConfigError(Exception):
    """Why a configuration is not taken, in words that are safe to show."""


def read_config(file: Path, environ: Mapping[str, str]) -> Loaded:
    """Read, check and compile `file`, and read its secrets. Raises BadConfigError."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise BadConfigError(f"{file}: {error.strerror or error}") from None
    snapshot = parse(raw, path=file, environ=environ, require_secrets=True)
    if not isinstance(snapshot, Snapshot):
        raise BadConfigError(format_problems(snapshot))
    try:
        secrets = {
            provider.name: read_secret(provider.secret, environ)
            for provider in snapshot.providers.values()
            if provider.secret is not None
        }
    except SecretError as error:  # it went between the check and now
        raise BadConfigError(str(error)) from None
    return Loaded(raw, snapshot, secrets)


def files_of(file: Path, snapshot: Snapshot) -> list[Path]:
    """The files whose change is a change of the configuration."""
    secrets = [provider.secret for provider in snapshot.providers.values()]
    named = [Path(secret.name) for secret in secrets if secret is not None and secret.source == "file"]
    authorities = [provider.ca_file for provider in snapshot.providers.values() if provider.ca_file is not None]
    return [file, *named, *authorities]


def needs_restart(old: Snapshot, new: Snapshot) -> str | None:
    """The first setting that has changed and that a running gateway can not take, or None."""
    if old.admin != new.admin:
        return "admin"
    if (old.sql_url, old.sql_secret) != (new.sql_url, new.sql_secret):
        return "state.sql"
    if old.listen.max_body_bytes != new.listen.max_body_bytes:
        return "listen.max_body_bytes"
    return None


Apply = Callable[[Loaded, tuple[Snapshot, ...]], Awaitable[None]]


class Reloader:
    """Watches and reloads. `apply` makes a good configuration live, or raises ConfigRejectedError or BadConfigError."""

    def __init__(self, file: Path, first: Loaded, environ: Mapping[str, str], apply: Apply) -> None:
        self._file = file
        self._environ = environ
        self._apply = apply
        self._before: tuple[Snapshot, ...] = ()
        self._asked = asyncio.Event()
        self.loaded = first
        self.reloads = 0
        self.last_error = ""

    def ask(self) -> None:
        """SIGHUP: look at once, and reload even if no file seems to have changed."""
        self._asked.set()

    async def outcomes(self) -> AsyncIterator[str]:
        """One line in words for each change: what is live now, or why it is not."""
        async for _ in changes(self._files, self._asked):
            line = await self._reload()
            if line:
                yield line

    def _files(self) -> Iterable[Path]:
        return files_of(self._file, self.loaded.snapshot)

    async def _reload(self) -> str:
        try:
            loaded = await asyncio.to_thread(read_config, self._file, self._environ)
            if (loaded.raw, loaded.secrets) == (self.loaded.raw, self.loaded.secrets):
                return self._recovered()
            setting = needs_restart(self.loaded.snapshot, loaded.snapshot)
            if setting is not None:
                raise BadConfigError(f"{self._file}: {setting} has changed, which takes a restart")
            await self._apply(loaded, (self.loaded.snapshot, *self._before))
        except (BadConfigError, ConfigRejectedError) as error:
            self.last_error = str(error)
            _log.error("gateway.yaml is not taken, the last good one goes on: %s", error)
            return f"not reloaded, the last good configuration goes on:\n{error}"
        self._before = (self.loaded.snapshot, *self._before)[:_KEPT_SNAPSHOTS]
        self.loaded = loaded
        self.reloads += 1
        self.last_error = ""
        return f"reloaded: revision {loaded.snapshot.revision} is live"

    def _recovered(self) -> str:
        """The file is again what is live."""
        if not self.last_error:
            return ""
        self.last_error = ""
        return f"the file is good again: revision {self.loaded.snapshot.revision} is live"
