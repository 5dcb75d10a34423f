"""The pool: a warm parent that forks workers, and forks the next one the moment one dies or hangs.

`extproc serve` runs it; `extproc run` starts it beside Envoy. The surprising thing: the parent holds the listening
sockets. While a worker is replaced, Envoy's new connections wait in the socket's queue instead of being refused, so
only the streams that were open on the dead worker are lost. Because the parent has everything loaded, a fork serves
within milliseconds and shares its memory.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BEAT_EVERY_S = 0.2
"""How often a worker says that its event loop turns."""
_STOPPED_AFTER_S = 0.7
_HUNG_AFTER_S = 5.0
"""A worker that misses beats is replaced: at once where the system says it is stopped, later where it is just busy."""
_START_TIMEOUT_S = 30.0
_POLL_S = 0.1
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.0, 5.0
_STEADY_S = 5.0
_END_TIMEOUT_S = 12.0

BEAT, READY = b".", b"r"
RELOADED, NOT_RELOADED, RECONCILED, NOT_RECONCILED = b"R", b"E", b"J", b"N"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerPipes:
    """A worker's ends: `tell` takes beats, from `hear` come the parent's commands, and its end is the parent's."""

    number: int
    listener: socket.socket | None
    tell: int
    hear: int


@dataclass(slots=True)
class _Slot:
    number: int
    listener: socket.socket | None
    pid: int = 0
    hear: int = -1
    tell: int = -1
    ready: bool = False
    began: float = 0.0
    last_beat: float = 0.0
    restarts: int = -1
    backoff_s: float = _FIRST_BACKOFF_S
    fork_at: float = 0.0
    reloading: bool = False
    reconciling: bool = False


class Pool:
    """Keeps one worker for each of `listeners` running until SIGTERM, SIGINT or the end of its supervisor.

    The parent holds the listening sockets, of which several may be the same; where there is None, the worker binds its
    own (grpcio takes none that is bound). `work` is a worker's whole life, run in the fork; `load` makes the parent's
    own copy of a configuration that later forks begin with, and raises ValueError where it is no good. `say` takes
    lines for whoever started the pool.

    A supervisor gives commands on standard input, whose end is the pool's. Without one, `on_hangup` is given and
    standard input never looked at: at SIGHUP it makes the file to reload, and raises ValueError where there is none.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket | None],
        work: Callable[[WorkerPipes], None],
        load: Callable[[Path], str],
        say: Callable[[str], None],
        *,
        on_hangup: Callable[[], Path] | None = None,
    ) -> None:
        self._slots = [_Slot(number, listener) for number, listener in enumerate(listeners)]
        self._work = work
        self._load = load
        self._say = say
        self._on_hangup = on_hangup
        self._hung_up = False
        self._ending = False
        self.orphaned = False
        """True once standard input has ended: whoever started the pool is gone."""
        self._said_ready = False
        self._watched = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._line = b""
        self._reloading: str | None = None

    def run(self) -> None:
        """Fork, watch, fork again; returns when all workers have ended."""
        wakeup, waker = socket.socketpair()
        for end in (wakeup, waker):
            end.setblocking(False)  # noqa: FBT003
        signal.set_wakeup_fd(waker.fileno())
        for wanted in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(wanted, self._on_signal)
        self._selector.register(wakeup, selectors.EVENT_READ, lambda: _drain(wakeup))
        if self._on_hangup is None:
            os.set_blocking(0, False)
            with suppress(PermissionError):  # a file or /dev/null can not be watched, and has no end to tell
                self._selector.register(0, selectors.EVENT_READ, self._on_command)
        else:
            signal.signal(signal.SIGHUP, self._on_signal)
        while not self._ending:
            self._reload_after_hangup()
            self._replace()
            for key, _ in self._selector.select(_POLL_S):
                key.data()
            self._watch()
        self._end()

    def _on_signal(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            self._hung_up = True
        elif number != signal.SIGCHLD:
            self._ending = True

    # Forking

    def _replace(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.pid == 0 and now >= slot.fork_at:
                self._fork(slot, now)

    def _fork(self, slot: _Slot, now: float) -> None:
        from_worker, tell = os.pipe()
        hear, to_worker = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._become_worker(slot, WorkerPipes(slot.number, slot.listener, tell, hear), (from_worker, to_worker))
        os.close(tell)
        os.close(hear)
        os.set_blocking(from_worker, False)
        os.set_blocking(to_worker, False)
        slot.pid, slot.hear, slot.tell = pid, from_worker, to_worker
        slot.ready, slot.began, slot.last_beat = False, now, now
        slot.restarts += 1
        self._selector.register(from_worker, selectors.EVENT_READ, lambda: self._on_beat(slot))
        self._say(f"worker {slot.number} {pid} {slot.restarts}")

    def _become_worker(self, slot: _Slot, pipes: WorkerPipes, parents: tuple[int, int]) -> None:
        """The child's side of a fork. Never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for wanted in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(wanted, signal.SIG_DFL)
            # A terminal that closes tells all of its processes; a worker hears of reloads from its parent alone.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            self._selector.close()
            for descriptor in parents:
                os.close(descriptor)
            for other in self._slots:
                if other is not slot and other.pid:
                    os.close(other.hear)
                    os.close(other.tell)
            self._work(pipes)
            code = 0
        except BaseException:
            _log.exception("worker %d failed", slot.number)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # Watching

    def _on_beat(self, slot: _Slot) -> None:
        try:
            beats = os.read(slot.hear, 4096)
        except BlockingIOError:
            return
        if not beats:
            self._selector.unregister(slot.hear)
            return
        slot.last_beat = time.monotonic()
        if READY in beats:
            slot.ready = True
            if not self._said_ready and all(each.ready for each in self._slots):
                self._said_ready = True
                self._say("ready")
        if slot.reconciling and (RECONCILED in beats or NOT_RECONCILED in beats):
            slot.reconciling = False
            self._say("reconciled" if RECONCILED in beats else "not-reconciled")
        if RELOADED in beats or NOT_RELOADED in beats:
            slot.reloading = False
            self._after_reload()

    def _watch(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            self._on_death(pid, os.waitstatus_to_exitcode(status))
        now = time.monotonic()
        was_stopped, self._watched = now - self._watched > _STOPPED_AFTER_S, now
        for slot in self._slots:
            if (
                was_stopped
            ):  # the pool itself was (a paused container): how long its workers were silent, it can not say
                slot.last_beat = now
            if slot.pid and self._hangs(slot, now):
                _log.error("worker %d (process %d) hangs and is replaced", slot.number, slot.pid)
                with suppress(ProcessLookupError):
                    os.kill(slot.pid, signal.SIGKILL)

    def _hangs(self, slot: _Slot, now: float) -> bool:
        silent_s = now - slot.last_beat
        if not slot.ready:
            return silent_s > _START_TIMEOUT_S
        return silent_s > _HUNG_AFTER_S or (silent_s > _STOPPED_AFTER_S and _is_stopped(slot.pid))

    def _on_death(self, pid: int, code: int) -> None:
        slot = next((each for each in self._slots if each.pid == pid), None)
        if slot is None:
            return
        now = time.monotonic()
        _log.error("worker %d (process %d) ended with %d and is replaced", slot.number, pid, code)
        with suppress(KeyError, ValueError):
            self._selector.unregister(slot.hear)
        os.close(slot.hear)
        os.close(slot.tell)
        steady = slot.ready and now - slot.began > _STEADY_S
        slot.backoff_s = _FIRST_BACKOFF_S if steady or slot.ready else min(slot.backoff_s * 2 + 0.1, _LONGEST_BACKOFF_S)
        slot.pid, slot.hear, slot.tell, slot.fork_at = 0, -1, -1, now + slot.backoff_s
        slot.reloading = False
        self._after_reload()
        if slot.reconciling:
            slot.reconciling = False
            self._say("not-reconciled")

    # Commands

    def _on_command(self) -> None:
        try:
            data = os.read(0, 4096)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(0)
            self.orphaned = self._ending = True
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "reload":
                self._reload(Path(rest))
            elif word == "reconcile":
                self._pass_on(line)

    def _reload_after_hangup(self) -> None:
        """One reload at a time: a signal that comes during one asks for another after it."""
        if self._hung_up and self._reloading is None and self._on_hangup is not None:
            self._hung_up = False
            try:
                file = self._on_hangup()
            except ValueError as error:
                self._say(f"not-reloaded {error}")
            else:
                self._reload(file)

    def _reload(self, file: Path) -> None:
        try:
            self._reloading = self._load(file)
        except ValueError as error:
            self._say(f"not-reloaded {error}")
            return
        for slot in self._slots:
            if slot.pid:
                slot.reloading = True
                with suppress(OSError):
                    os.write(slot.tell, f"reload {file}\n".encode())
        self._after_reload()

    def _pass_on(self, line: bytes) -> None:
        """Any one worker does."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.ready and now - slot.last_beat < _STOPPED_AFTER_S:
                with suppress(OSError):
                    os.write(slot.tell, line + b"\n")
                    slot.reconciling = True
                    return
        self._say("not-reconciled")

    def _after_reload(self) -> None:
        if self._reloading is not None and not any(slot.reloading for slot in self._slots):
            self._say(f"reloaded {self._reloading}")
            self._reloading = None

    # Ending

    def _end(self) -> None:
        for slot in self._slots:
            if slot.listener is not None:
                slot.listener.close()  # once the workers have closed theirs, connections are refused and do not wait
            if slot.pid:
                with suppress(ProcessLookupError):
                    os.kill(slot.pid, signal.SIGTERM)
        deadline = time.monotonic() + _END_TIMEOUT_S
        left = {slot.pid for slot in self._slots if slot.pid}
        while left and time.monotonic() < deadline:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            left.discard(pid)
            if pid == 0:
                time.sleep(0.02)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def listen_at(path: Path) -> socket.socket:
    """A Unix socket that its owner alone can connect to. Raises OSError."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(1024)
    listener.setblocking(False)  # noqa: FBT003
    return listener


def listen_on(host: str, port: int) -> socket.socket:
    """A TCP socket that all workers may share: each accepts from the one queue. Raises OSError."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    listener = socket.create_server(address[:2], family=family, backlog=1024, dualstack_ipv6=both)
    listener.setblocking(False)  # noqa: FBT003
    return listener


def _drain(wakeup: socket.socket) -> None:
    with suppress(BlockingIOError):
        wakeup.recv(4096)


def _is_stopped(pid: int) -> bool:
    """Whether the system holds the process stopped (SIGSTOP, a debugger). False where it can not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
