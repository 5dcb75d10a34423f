"""The board: what all workers of a machine know of each provider's health, in memory that they share.

Written by record, read by decide and by `status`. The surprising thing: there is no lock and no message. All map the
same file; a provider has its row before any worker hears of it, and from then on a row is one 8-byte number, which a
machine writes whole.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

_ROWS = 4096
_ROW = struct.Struct("<Qd")
_UNTIL = struct.Struct("<d")


class Board:
    """For each provider: until when (seconds since the epoch) it is better left alone."""

    __slots__ = ("_memory", "_places")

    def __init__(self, file: Path) -> None:
        """Map `file`, made where it is not there yet. Raises OSError."""
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, _ROWS * _ROW.size)
            self._memory = mmap.mmap(descriptor, _ROWS * _ROW.size)
        finally:
            os.close(descriptor)
        self._places: dict[str, int] = {}

    def know(self, providers: Iterable[str]) -> None:
        """Find each provider's row, or take a free one. The supervisor calls it before workers see new names.

        Raises ValueError beyond 4,096 names in the life of the board.
        """
        for name in providers:
            if name not in self._places:
                self._places[name] = self._place(name)

    def until(self, provider: str) -> float:
        """Until when `provider` cools down; 0.0 where nothing is known against it."""
        place = self._places.get(provider)
        if place is None:
            return 0.0
        found: float = _UNTIL.unpack_from(self._memory, place)[0]
        return found

    def cool(self, provider: str, until: float) -> None:
        """Leave `provider` alone until then; an earlier end never shortens a later one."""
        place = self._places.get(provider)
        if place is not None and until > self.until(provider):
            _UNTIL.pack_into(self._memory, place, until)

    def clear(self, provider: str) -> None:
        """It has served again."""
        place = self._places.get(provider)
        if place is not None and self.until(provider):
            _UNTIL.pack_into(self._memory, place, 0.0)

    def _place(self, name: str) -> int:
        """Offset of the row's number: open addressing by a hash of the name, so that each process finds the same."""
        key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") or 1
        for step in range(_ROWS):
            offset = (key + step) % _ROWS * _ROW.size
            (taken, _) = _ROW.unpack_from(self._memory, offset)
            if taken in (0, key):
                if taken == 0:
                    _ROW.pack_into(self._memory, offset, key, 0.0)
                return offset + 8
        raise ValueError(f"more than {_ROWS} providers")
