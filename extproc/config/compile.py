"""From gateway.yaml's models to the snapshot: names become lookups, globs expressions, keys raw digests.

Runs once for each version of the file, after every check has passed, and reads nothing but its arguments. The
surprising thing: a provider that is left out takes its targets along, and a model without any left is simply unknown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from sqlalchemy.engine import make_url

from extproc.catalog import PriceBook, PriceOverride
from extproc.config import schema
from extproc.config import snapshot as snap
from extproc.config.globs import is_glob
from extproc.providers.kinds import KINDS


def compile_snapshot(gateway: schema.Gateway, *, revision: str, folder: Path, absent: frozenset[str]) -> snap.Snapshot:
    """The snapshot of a file in `folder` (absolute); `absent` names the optional providers that are left out."""
    providers = {
        name: _provider(name, provider, gateway.timeouts, folder)
        for name, provider in gateway.providers.items()
        if name not in absent
    }
    models = [
        model for name, entry in gateway.models.items() if (model := _model(name, entry, frozenset(providers))).targets
    ]
    teams = {
        name: snap.Team(
            name=name,
            models=snap.Patterns(team.models),
            default_provider=team.default_provider if team.default_provider in providers else None,
        )
        for name, team in gateway.teams.items()
    }
    sql = gateway.state.sql
    return snap.Snapshot(
        revision=revision,
        folder=folder,
        listen=snap.Listen(gateway.listen.address, gateway.listen.port, gateway.listen.max_body_bytes),
        admin=snap.Admin(gateway.admin.address, gateway.admin.port),
        sql_url=_sql_url(sql, folder) if isinstance(sql, str) else "",
        sql_secret=None if isinstance(sql, str) else located(sql, folder),
        timeouts=snap.Timeouts(gateway.timeouts.first_byte_s, gateway.timeouts.stream_idle_s),
        providers=providers,
        models={model.name: model for model in models if not is_glob(model.name)},
        globs=tuple((re.compile(translate(model.name)), model) for model in models if is_glob(model.name)),
        keys=_keys(gateway.teams, teams),
        teams=teams,
        prices=PriceBook({name: PriceOverride(**dict(price)) for name, price in gateway.prices.items()}),
    )


def revision_of(raw: bytes) -> str:
    """A short name of exactly these bytes."""
    return hashlib.sha256(raw).hexdigest()[:12]


def located(ref: snap.SecretRef, folder: Path) -> snap.SecretRef:
    """`ref` with its path made absolute."""
    return ref if ref.source == "env" else snap.SecretRef("file", str(folder / ref.name))


def _provider(name: str, entry: schema.Provider, timeouts: schema.Timeouts, folder: Path) -> snap.Provider:
    url = entry.endpoint or KINDS[entry.kind].default_endpoint
    overrides = snap.TimeoutOverrides(entry.timeouts.first_byte_s, entry.timeouts.stream_idle_s)
    return snap.Provider(
        name=name,
        kind=entry.kind,
        endpoint=_endpoint(url) if url else None,
        secret=None if entry.api_key is None else located(entry.api_key, folder),
        headers=tuple((header.lower(), value) for header, value in entry.headers.items()),
        ca_file=None if entry.ca is None else folder / entry.ca.file,
        timeouts=overrides.over(snap.Timeouts(timeouts.first_byte_s, timeouts.stream_idle_s)),
        stream_usage=entry.stream_usage,
    )


def _endpoint(url: str) -> snap.Endpoint:
    parts = urlsplit(url)
    scheme: Literal["http", "https"] = "https" if parts.scheme == "https" else "http"
    return snap.Endpoint(
        scheme=scheme,
        host=parts.hostname or "",
        port=parts.port or (443 if scheme == "https" else 80),
        base_path=parts.path.rstrip("/"),
    )


def _model(name: str, entry: schema.Model, present: frozenset[str]) -> snap.Model:
    targets = [snap.Target(t.provider, t.model, t.priority, t.weight) for t in entry.targets if t.provider in present]
    timeouts = entry.timeouts
    return snap.Model(
        name=name,
        targets=tuple(sorted(targets, key=lambda target: target.priority)),  # stable: the file's order within one
        timeouts=None if timeouts is None else snap.TimeoutOverrides(timeouts.first_byte_s, timeouts.stream_idle_s),
        order=entry.order,
    )


def _keys(entries: Mapping[str, schema.Team], teams: Mapping[str, snap.Team]) -> dict[bytes, snap.Key]:
    patterns: dict[tuple[str, ...], snap.Patterns] = {}

    def narrowed(names: Iterable[str] | None) -> snap.Patterns | None:
        return None if names is None else patterns.setdefault(tuple(names), snap.Patterns(tuple(names)))

    return {
        bytes.fromhex(key.sha256): snap.Key(
            principal=snap.Principal(name, key.project, key.user, key.agent, key.id),
            team=teams[name],
            models=narrowed(key.models),
        )
        for name, team in entries.items()
        for key in team.keys
    }


def _sql_url(url: str, folder: Path) -> str:
    """A relative SQLite path stands for one in the file's folder, wherever the process was started."""
    parsed = make_url(url)
    if parsed.drivername != "sqlite" or parsed.database is None:
        return url
    return parsed.set(database=str(folder / parsed.database)).render_as_string(hide_password=False)
