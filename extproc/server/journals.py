"""The journal's files: one folder for each run of a gateway, in the folder of gateway.yaml, kept until it is settled.

Used by the supervisor. The surprising thing: a lock tells a journal that is being written from one that a crash left
behind. The kernel lets go of it when its holder dies, however it dies.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import uuid
from pathlib import Path, PurePosixPath

_log = logging.getLogger(__name__)
_FOLDER = "extproc-journal"
LARGEST_BYTES = 64 << 20
"""A journal of this size is put aside and a new one begun."""


class Journals:
    """The journal of this run, and those that earlier runs left. Raises OSError where the folder can not be written."""

    def __init__(self, folder: Path) -> None:
        self._all = folder / _FOLDER
        self._own = self._all / uuid.uuid4().hex[:12]
        self._all.mkdir(mode=0o700, exist_ok=True)
        self._own.mkdir(mode=0o700)
        self._lock = _locked(self._own)
        self._aside = 0

    @property
    def file(self) -> PurePosixPath:
        """What Envoy writes."""
        return PurePosixPath(self._own.absolute()) / "journal.jsonl"

    def left_behind(self) -> list[Path]:
        """Folders of runs that have ended without settling theirs."""
        found: list[Path] = []
        for folder in sorted(self._all.iterdir()):
            if folder == self._own or not folder.is_dir():
                continue
            lock = _locked(folder)
            if lock is not None:
                os.close(lock)
                found.append(folder)
        return found

    def put_aside(self) -> Path | None:
        """Give a journal that has grown too large another name; Envoy writes there until it is told to reopen."""
        current = Path(self.file)
        try:
            if current.stat().st_size < LARGEST_BYTES:
                return None
        except FileNotFoundError:
            return None
        self._aside += 1
        aside = self._own / f"journal-{self._aside}.jsonl"
        current.rename(aside)
        return aside

    def remove_aside(self) -> None:
        """What was put aside is in the ledger."""
        for aside in self._own.glob("journal-*.jsonl"):
            aside.unlink()

    def close(self) -> None:
        """All of it is in the ledger: nothing is left behind."""
        shutil.rmtree(self._own, ignore_errors=True)
        self.let_go()
        try:
            self._all.rmdir()
        except OSError:
            _log.debug("another run's journal stays")

    def let_go(self) -> None:
        """Leave what there is to the next run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def files_in(folder: Path) -> list[Path]:
    """The journals of one run."""
    return sorted(folder.glob("*.jsonl"))


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None where another process holds it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
