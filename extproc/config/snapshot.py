"""The snapshot: gateway.yaml compiled into immutable lookups, read once per request and swapped whole.

`config.schema` is what a person writes; this is what the hot path reads. The surprising thing: it holds no secret.
A provider's credential is a reference, which only the process that renders Envoy's secret files ever resolves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from re import Pattern
from typing import Literal

from extproc.catalog import PriceBook, Vendor
from extproc.providers.kinds import KINDS, ProviderKind


@dataclass(frozen=True, slots=True)
class SecretRef:
    """Where a secret comes from: an environment variable's name, or an absolute file path. Never its value."""

    source: Literal["env", "file"]
    name: str


@dataclass(frozen=True, slots=True)
class Listen:
    address: str
    port: int
    max_body_bytes: int


@dataclass(frozen=True, slots=True)
class Admin:
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Timeouts:
    """`first_byte_s`: from the request's end to the response headers. `stream_idle_s`: between two chunks."""

    first_byte_s: float
    stream_idle_s: float


@dataclass(frozen=True, slots=True)
class TimeoutOverrides:
    """What a model says about timeouts; None where it says nothing."""

    first_byte_s: float | None
    stream_idle_s: float | None

    def over(self, base: Timeouts) -> Timeouts:
        """`base` (a provider's, which has the global ones merged in) with the fields set here in their place."""
        return Timeouts(
            first_byte_s=base.first_byte_s if self.first_byte_s is None else self.first_byte_s,
            stream_idle_s=base.stream_idle_s if self.stream_idle_s is None else self.stream_idle_s,
        )


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A provider's base URL, taken apart. `base_path` has no slash at its end and may be empty."""

    scheme: Literal["http", "https"]
    host: str
    port: int
    base_path: str

    @property
    def authority(self) -> str:
        """Host, and the port where it is not the scheme's own: what the Host header says."""
        bracketed = f"[{self.host}]" if ":" in self.host else self.host
        return bracketed if self.port == {"http": 80, "https": 443}[self.scheme] else f"{bracketed}:{self.port}"


@dataclass(frozen=True, slots=True)
class Provider:
    """One upstream. `endpoint` is None for kind `demo`, whose address is known only when it has started."""

    name: str
    kind: ProviderKind
    endpoint: Endpoint | None
    secret: SecretRef | None
    headers: tuple[tuple[str, str], ...]
    ca_file: Path | None
    timeouts: Timeouts
    stream_usage: bool

    @property
    def vendor(self) -> Vendor | None:
        """Whose list prices hold: the vendor's, where the provider is the vendor's own service."""
        kind = KINDS[self.kind]
        own = self.endpoint is not None and self.endpoint.host == kind.vendor_host
        return kind.vendor if own else None


@dataclass(frozen=True, slots=True)
class Target:
    """One place a model may be served: `model` is the provider's own name, None for the name asked for."""

    provider: str
    model: str | None
    priority: int
    weight: int


Order = Literal["weight", "latency", "cost"]
"""How targets of one priority are ordered."""


@dataclass(frozen=True, slots=True)
class Model:
    """An entry of `models:`. `name` is an alias or a glob; targets stand in order of priority, then of the file."""

    name: str
    targets: tuple[Target, ...]
    timeouts: TimeoutOverrides | None
    order: Order = "weight"

    def timeouts_at(self, provider: Provider) -> Timeouts:
        """How long to wait for this model at `provider`: field by field the model's, the provider's, the global one."""
        return provider.timeouts if self.timeouts is None else self.timeouts.over(provider.timeouts)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking, as the key says."""

    team: str
    project: str | None
    user: str | None
    agent: str | None
    key_id: str


class Patterns:
    """Allow and deny globs (`!` denies, and deny wins); matching is exact in case and never trims.

    One compiled expression for each side, so the cost of a match does not grow with the number of names.
    """

    __slots__ = ("_allow", "_deny", "names")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._allow = _union(tuple(name for name in names if not name.startswith("!")))
        self._deny = _union(tuple(name[1:] for name in names if name.startswith("!")))

    def allows(self, name: str) -> bool:
        return bool(self._allow and self._allow.match(name)) and not (self._deny and self._deny.match(name))

    @property
    def everything(self) -> bool:
        """True when the list is exactly what pass-through endpoints require: `["*"]`."""
        return self.names == ("*",)


@lru_cache(maxsize=4096)
def _union(globs: tuple[str, ...]) -> Pattern[str] | None:
    return re.compile("|".join(f"(?:{translate(glob)})" for glob in globs)) if globs else None


@dataclass(frozen=True, slots=True)
class Team:
    name: str
    models: Patterns
    default_provider: str | None


@dataclass(frozen=True, slots=True)
class Key:
    """A virtual key: who holds it, and what it narrows its team's models to (None: nothing)."""

    principal: Principal
    team: Team
    models: Patterns | None

    def allows(self, model: str) -> bool:
        return self.team.models.allows(model) and (self.models is None or self.models.allows(model))

    @property
    def everything(self) -> bool:
        return self.team.models.everything and (self.models is None or self.models.everything)


@dataclass(frozen=True)
class Snapshot:
    """The whole configuration, compiled. Lookups by key digest and model name cost the same at any size."""

    revision: str
    folder: Path
    listen: Listen
    admin: Admin
    sql_url: str
    timeouts: Timeouts
    providers: Mapping[str, Provider]
    models: Mapping[str, Model]
    globs: tuple[tuple[Pattern[str], Model], ...]
    keys: Mapping[bytes, Key]
    teams: Mapping[str, Team]
    prices: PriceBook
    sql_secret: SecretRef | None = None
    """Where the ledger's whole URL comes from when it holds a password; `sql_url` is empty then."""
    _resolved: dict[str, Model | None] = field(default_factory=dict, repr=False, compare=False)

    RESOLVED_NAMES = 4096
    """Bound of the memo of glob matches: a client can name any model, and must not make it grow."""

    def key_for(self, credential: str) -> Key | None:
        """The key whose sha256 is that of `credential`, or None."""
        return self.keys.get(hashlib.sha256(credential.encode("utf-8", "surrogateescape")).digest())

    def model_for(self, name: str) -> Model | None:
        """The entry of `models:` that serves `name`: its own, else the first glob in the file's order."""
        exact = self.models.get(name)
        if exact is not None or not self.globs:
            return exact
        if name in self._resolved:
            return self._resolved[name]
        found = next((model for pattern, model in self.globs if pattern.match(name)), None)
        if len(self._resolved) < self.RESOLVED_NAMES:
            self._resolved[name] = found
        return found

    def model_names_for(self, key: Key) -> tuple[str, ...]:
        """What `GET /v1/models` lists: aliases, and names a team spells out that a glob serves."""
        spelled = (name for name in key.team.models.names if not name.startswith("!") and not set(name) & set("*?["))
        known = dict.fromkeys((*self.models, *spelled))
        return tuple(name for name in known if key.allows(name) and self.model_for(name) is not None)
