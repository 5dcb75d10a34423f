"""What finished requests tell about providers: when one asks to be left alone, keeps failing, or answers fast.

Part of record, read by decide at the next request. The surprising thing: cooldowns are shared by all workers at once
(`Board`), latencies are each worker's own, because a wrong guess of latency costs little and heals itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from extproc.record.finished import AttemptMade, Ending, Finished

FAILURES_BEFORE_COOLDOWN = 5
"""Failures in a row, without a success between them, that make a provider cool down."""
FIRST_COOLDOWN_S, LONGEST_COOLDOWN_S = 1.0, 30.0
LONGEST_RETRY_AFTER_S = 600.0
"""A provider may ask for an hour; it is tried again after this, at the end of chains it is tried anyway."""
_NEWEST_WEIGHT = 0.2
_REMEMBERED = 4096


class Board(Protocol):
    """What all workers share: until when each provider cools down, in seconds since the epoch."""

    def until(self, provider: str) -> float: ...
    def cool(self, provider: str, until: float) -> None: ...


class ProviderHealth:
    """Learns from record, answers decide (`decide.routing.Health`). `clock` gives seconds since the epoch."""

    def __init__(self, board: Board, clock: Callable[[], float]) -> None:
        self._board = board
        self._clock = clock
        self._failures: dict[str, int] = {}
        self._first_byte_s: OrderedDict[tuple[str, str], float] = OrderedDict()

    def is_cooling(self, provider: str) -> bool:
        return self._board.until(provider) > self._clock()

    def first_byte_s(self, provider: str, model: str) -> float | None:
        return self._first_byte_s.get((provider, model))

    def cooling(self, providers: Iterable[str]) -> dict[str, float]:
        """Those that cool down now, and for how many seconds yet."""
        now = self._clock()
        left = {name: self._board.until(name) - now for name in providers}
        return {name: seconds for name, seconds in left.items() if seconds > 0}

    def learn(self, finished: Finished) -> None:
        """What the attempts of one request say."""
        decision = finished.decision
        for made in finished.attempts:
            if made.status is not None or finished.ending is not Ending.CLIENT_LEFT:  # else the client did not wait
                self._learn_attempt(made)
        if decision is not None and len(finished.attempts) == 1 and finished.first_byte_s and finished.status < 400:
            self._learn_latency((finished.attempts[0].provider, decision.models[0]), finished.first_byte_s)

    def _learn_attempt(self, made: AttemptMade) -> None:
        if made.retry_after_s is not None:
            self._board.cool(made.provider, self._clock() + min(made.retry_after_s, LONGEST_RETRY_AFTER_S))
        if made.status is not None and made.status < 500:
            if made.status not in (408, 429):
                self._failures.pop(made.provider, None)
            return
        if self.is_cooling(made.provider):
            return  # requests that were under way when it began to fail say nothing new
        failures = self._failures.get(made.provider, 0) + 1
        self._failures[made.provider] = failures
        if failures >= FAILURES_BEFORE_COOLDOWN:
            doubled = FIRST_COOLDOWN_S * 2.0 ** min(failures - FAILURES_BEFORE_COOLDOWN, 10)
            self._board.cool(made.provider, self._clock() + min(doubled, LONGEST_COOLDOWN_S))

    def _learn_latency(self, name: tuple[str, str], seconds: float) -> None:
        known = self._first_byte_s.get(name, seconds)
        self._first_byte_s[name] = known + _NEWEST_WEIGHT * (seconds - known)
        self._first_byte_s.move_to_end(name)
        if len(self._first_byte_s) > _REMEMBERED:
            self._first_byte_s.popitem(last=False)
