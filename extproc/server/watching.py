"""Seeing that files have changed: gateway.yaml, and the secret and CA files it names.

Used by the supervisor's reload. The surprising thing: it polls. An atomic rename, an editor's save and the symlink swap
of a Kubernetes ConfigMap look different to every notification API and the same to `stat`, which follows links.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

POLL_S = 0.2

Signature = tuple[tuple[str, int, int, int], ...]


def signature(files: Iterable[Path]) -> Signature:
    """What tells one state of the files from another: inode, size and time of change of each that is there."""
    found: list[tuple[str, int, int, int]] = []
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            continue
        found.append((str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


async def changes(files: Callable[[], Iterable[Path]], asked: asyncio.Event) -> AsyncIterator[None]:
    """Yields once for each change that has come to rest, and at once when `asked` is set (SIGHUP).

    `files` is called anew each time, because a change of gateway.yaml may name other secret files.
    """
    known = signature(files())
    while True:
        try:
            await asyncio.wait_for(asked.wait(), POLL_S)
        except TimeoutError:
            seen = signature(files())
            if seen == known:
                continue
            while (settled := await _after_poll(files)) != seen:  # someone is still writing
                seen = settled
        asked.clear()
        known = signature(files())
        yield


async def _after_poll(files: Callable[[], Iterable[Path]]) -> Signature:
    await asyncio.sleep(POLL_S / 2)
    return signature(files())
