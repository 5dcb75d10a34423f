"""The size of a prompt, at the least cost that is honest: an estimate where this key's past teaches one, else a count.

decide's last look at the body. The surprising thing: most requests are never tokenised. A 2 KB prompt's exact count
costs more than the whole decision, so it is made only until the provider's own reports have taught a ratio.
"""

from __future__ import annotations

import msgspec

from extproc.decide.estimate import LearnedRatios, non_text_bytes
from extproc.decide.pipeline import InputTokens
from extproc.decide.tokens import COUNTED, TokenCounter
from extproc.dialects.endpoints import Endpoint

ENOUGH_SAMPLES = 5
_DECODE = msgspec.json.Decoder(float_hook=float).decode
"""1e999 is legal JSON; msgspec alone refuses it."""
GOOD_ERROR = 0.25
"""An estimate is taken once it has come from this many requests and was off by no more than this."""


class Meter:
    """Implements `pipeline.TokenMeter`. `ratios` are taught by the record moment of the same worker."""

    def __init__(self, ratios: LearnedRatios, counter: TokenCounter) -> None:
        self._ratios = ratios
        self._counter = counter

    async def measure(self, endpoint: Endpoint, key_id: str, model: str, body: bytes) -> InputTokens:
        """Input tokens of `body`, which is known to be a JSON object where the endpoint has tokens to count."""
        if endpoint.name not in COUNTED:
            return InputTokens(0, exact=False, text_bytes=0)
        pictures = non_text_bytes(body)
        text_bytes = len(body) - pictures
        estimate = self._ratios.estimate(key_id, model, text_bytes)
        if not pictures and estimate.samples >= ENOUGH_SAMPLES and estimate.relative_error <= GOOD_ERROR:
            return InputTokens(estimate.tokens, exact=False, text_bytes=text_bytes)
        count = await self._counter.count(endpoint.name, _DECODE(body), model, text_bytes=text_bytes)
        taught = 0 if pictures else text_bytes
        if count is None:
            return InputTokens(estimate.tokens, exact=False, text_bytes=taught)
        return InputTokens(count.tokens, count.exact, taught)
