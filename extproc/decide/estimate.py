"""Estimates: how many tokens a request has, from its bytes alone, as this key's own past requests teach.

The cheap half of decide's token count, and what record charges a client that leaves before the usage arrives. The
surprising thing: bytes that are base64 (a picture) are no text, and must be taken off first (`non_text_bytes`), or one
picture would teach that a byte costs nothing. Pure and without a clock; one event loop owns an instance.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from math import ceil

import msgspec

PRIOR_TOKENS_PER_BYTE = 0.25
"""Bytes / 4: between -45% (JSON) and +21% (code) of the count, as measured on mixed texts."""
_PRIOR_ERROR = 1.0
_NEWEST_WEIGHT = 0.2
_LEAST_RATIO, _GREATEST_RATIO = 1e-4, 4.0
_PRIOR_OUTPUT_TOKENS_PER_BYTE = {"stream": 1 / 180, "whole": 1 / 6}
"""A streamed token comes in an event of some 180 bytes; a whole answer is text, with little around it."""


class Estimate(msgspec.Struct, frozen=True):
    """`tokens`, from `samples` past requests (0: a prior), usually off by `relative_error` (0.1 is 10%)."""

    tokens: int
    samples: int
    relative_error: float


@dataclass(slots=True)
class _Ratio:
    tokens_per_byte: float
    relative_error: float = _PRIOR_ERROR
    samples: int = 1

    def observe(self, ratio: float) -> None:
        self.relative_error += _NEWEST_WEIGHT * (abs(self.tokens_per_byte - ratio) / ratio - self.relative_error)
        # The plain mean while there are few samples, then the newest weigh most.
        self.samples += 1
        self.tokens_per_byte += max(_NEWEST_WEIGHT, 1 / self.samples) * (ratio - self.tokens_per_byte)


class LearnedRatios:
    """Tokens per byte by key and model, at most `capacity` of them; those unused for longest go first.

    A key without a past takes the model's average over all keys, a model without one the prior. Each call costs O(1).
    """

    __slots__ = ("_capacity", "_ratios")

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._ratios: OrderedDict[Hashable, _Ratio] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ratios)

    def observe(self, key_id: str, model: str, request_bytes: int, input_tokens: int) -> None:
        """Learns what a provider reported. `request_bytes`: text only; leave out requests with pictures or files."""
        for name in (("in", key_id, model), ("in", model)):
            self._learn(name, request_bytes, input_tokens)

    def estimate(self, key_id: str, model: str, request_bytes: int) -> Estimate:
        """Input tokens of a request with `request_bytes` bytes of text."""
        found = self._find(("in", key_id, model)) or self._find(("in", model))
        return _apply(found, request_bytes, PRIOR_TOKENS_PER_BYTE)

    def observe_output(
        self, model: str, endpoint: str, *, stream: bool, response_bytes: int, output_tokens: int
    ) -> None:
        """Learns from an answer that came to its end."""
        self._learn(("out", model, endpoint, stream), response_bytes, output_tokens)

    def estimate_output(self, model: str, endpoint: str, *, stream: bool, response_bytes: int) -> Estimate:
        """Output tokens that `response_bytes` bytes of an answer held: what a client owes that left before its end."""
        prior = _PRIOR_OUTPUT_TOKENS_PER_BYTE["stream" if stream else "whole"]
        return _apply(self._find(("out", model, endpoint, stream)), response_bytes, prior)

    def _find(self, name: Hashable) -> _Ratio | None:
        found = self._ratios.get(name)
        if found is not None:
            self._ratios.move_to_end(name)
        return found

    def _learn(self, name: Hashable, size_bytes: int, tokens: int) -> None:
        if size_bytes <= 0 or tokens <= 0:
            return
        ratio = min(max(tokens / size_bytes, _LEAST_RATIO), _GREATEST_RATIO)
        found = self._find(name)
        if found is not None:
            found.observe(ratio)
            return
        self._ratios[name] = _Ratio(ratio)
        if len(self._ratios) > self._capacity:
            self._ratios.popitem(last=False)


def _apply(ratio: _Ratio | None, size_bytes: int, prior: float) -> Estimate:
    size_bytes = max(0, size_bytes)
    if ratio is None:
        return Estimate(ceil(size_bytes * prior), 0, _PRIOR_ERROR)
    return Estimate(ceil(size_bytes * ratio.tokens_per_byte), ratio.samples, ratio.relative_error)


_DATA_URL = b";base64,"
_DATA_FIELD = b'data"'  # "data" (Anthropic, audio) and "file_data"
_URL_START = re.compile(_DATA_URL)
_FIELD_START = re.compile(rb'data"[ \t\r\n]{0,8}:[ \t\r\n]{0,8}"')
_BASE64_RUN = re.compile(rb"[A-Za-z0-9+/=\\]*")
_SHORTEST_FIELD = 512
"""A `data` field below this may as well be a word."""
_MOST_FIELDS = 2_000
"""More pictures than any provider takes in one request; what follows counts as text."""


def non_text_bytes(body: bytes) -> int:
    """Bytes of a raw JSON body that are base64 (data URLs, `data` and `file_data` fields), in one linear pass each.

    A guess for the estimate only: a text that looks like base64 passes for a picture. The exact count does not use it.
    """
    return sum(_runs(body, _DATA_URL, _URL_START, 0)) + sum(_runs(body, _DATA_FIELD, _FIELD_START, _SHORTEST_FIELD))


def _runs(body: bytes, marker: bytes, start: re.Pattern[bytes], shortest: int) -> Iterator[int]:
    at = 0
    for _ in range(_MOST_FIELDS):
        at = body.find(marker, at)
        if at < 0:
            return
        opening = start.match(body, at)
        at += len(marker)
        if opening and (run := _BASE64_RUN.match(body, opening.end())):
            at = run.end()
            length = run.end() - run.start()
            yield length if length >= shortest else 0
