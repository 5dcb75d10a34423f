"""One transport in a process of its own, until standard input ends: `python -m tests.serve_transport KIND SOCKET`."""

from __future__ import annotations

import sys
from pathlib import Path

from extproc.server.transport import Metadata, Method, Replies, Session, Shape
from tests.transports import served


class Descriptors:
    """How many file descriptors this process has open."""

    done = False

    def receive(self, _: bytes) -> Replies:
        return (b"%d" % len(list(Path("/dev/fd").iterdir())),)

    def finish(self) -> Replies:
        return ()


def _open(_: Metadata) -> Session:
    return Descriptors()


def main() -> None:
    """Serve."""
    with served(sys.argv[1], Path(sys.argv[2]), [Method("/test.Process/Descriptors", Shape.UNARY, _open)]):
        print("ready", flush=True)
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
