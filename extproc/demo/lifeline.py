"""A lifeline: a process ends when the one that started it has ended, however that one ended.

Watched by the demo provider, held by `server.children`. The surprising thing: it is standard input. The
starter keeps the other end of a pipe and writes nothing; the kernel closes that end even when the starter is killed, on
every Unix, and no signal of the parent's death is as portable.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

_STANDARD_INPUT = 0
_READ_BYTES = 4096


def watch(then: Callable[[], None], *, descriptor: int = _STANDARD_INPUT) -> None:
    """Call `then` once, from the running event loop, when the other end of the pipe at `descriptor` is closed."""
    loop = asyncio.get_running_loop()

    def readable() -> None:
        try:
            ended = os.read(descriptor, _READ_BYTES) == b""
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            loop.remove_reader(descriptor)
            then()

    loop.add_reader(descriptor, readable)
