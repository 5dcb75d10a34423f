"""What Envoy's access log tells of one finished request, as record reads it: without protobuf, complete, immutable."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto

from extproc.catalog import Usage
from extproc.decision import Decision


class Ending(Enum):
    """How the exchange ended, as Envoy's response code details say."""

    WHOLE = auto()
    CLIENT_LEFT = auto()
    BROKEN = auto()
    """The answer had begun and stopped: reset, cut off, or silent for too long."""


@dataclass(frozen=True, slots=True)
class AttemptMade:
    """One attempt: the provider's name, the status it answered with (None: none came), and how long it asked to be
    left alone."""

    provider: str
    status: int | None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """One request, finished. `code` is what the gateway made of it on the way back (all targets failed, say)."""

    request_id: str
    started_at: datetime
    status: int
    ending: Ending
    decision: Decision | None
    attempts: tuple[AttemptMade, ...]
    code: str
    usage: Usage | None
    usage_whole: bool
    model_returned: str
    sent_upstream: bool
    first_byte_s: float | None
    duration_s: float
    request_bytes: int
    response_bytes: int
