"""A whole gateway for tests: `extproc run` on a config of the test's own, on free ports, ended when the test is done.

The surprising thing: nothing in it is faked. Envoy, the worker and the ledger are the ones that users run; the provider
behind them is `tests.upstream.RecordingUpstream`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

KEY = "sk-test-all-models"
"""A key that may use every model."""
NARROW_KEY = "sk-test-one-model"
"""A key that may use `demo` and `narrow` alone."""
PROVIDER_SECRET = "provider-secret-5e1f"
"""What the providers of a test config take as their key; it must be seen upstream and nowhere else."""
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 40.0


def digest(key: str) -> str:
    """What gateway.yaml holds for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


TEAMS: dict[str, Any] = {
    "search": {
        "models": ["*"],
        "keys": [{"id": "search-all", "sha256": digest(KEY), "project": "indexer", "user": "ada", "agent": "bot"}],
    },
    "narrow": {"models": ["demo", "narrow"], "keys": [{"id": "narrow-one", "sha256": digest(NARROW_KEY)}]},
}


def config(
    *, providers: Mapping[str, Any], models: Mapping[str, Any], teams: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """A gateway.yaml on free ports; `more` holds further top-level sections, such as `timeouts`."""
    sections: dict[str, Any] = {
        "listen": {"address": "127.0.0.1", "port": free_port()},
        "admin": {"address": "127.0.0.1", "port": free_port()},
        "state": {"sql": "sqlite:///ledger.db"},
        "providers": dict(providers),
        "models": dict(models),
        "teams": dict(TEAMS if teams is None else teams),
    }
    for name, section in more.items():
        sections[name] = {**sections[name], **section} if name in ("listen", "admin") else section
    return sections


class Gateway:
    """`extproc run`, from start to end. Use it as a context manager."""

    def __init__(self, folder: Path, sections: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.file = folder / "gateway.yaml"
        self.file.write_text(json.dumps(sections, indent=1))  # JSON is YAML
        listen, admin = sections["listen"], sections["admin"]
        self.url = f"http://127.0.0.1:{listen['port']}"
        self.port: int = listen["port"]
        self.admin_url = f"http://127.0.0.1:{admin['port']}"
        self._environ = {**os.environ, "PROVIDER_KEY": PROVIDER_SECRET, "EXTPROC_WORKERS": "1", **(environ or {})}
        self._log = folder / "gateway.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "extproc", "run", str(self.file)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environ,
            )
        wait_for(lambda: self.ready() or not self.running(), _START_TIMEOUT_S, "the gateway to be ready")
        if not self.running():
            raise RuntimeError(f"the gateway ended:\n{self.log()}")
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def end(self, how: int = signal.SIGTERM) -> int:
        """End it and give its exit code."""
        process = self._process
        assert process is not None
        if process.poll() is None:
            process.send_signal(how)
        try:
            return process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ready(self) -> bool:
        """Whether `/readyz` says so."""
        try:
            with urllib.request.urlopen(f"{self.admin_url}/readyz", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def log(self) -> str:
        """All that it printed."""
        return self._log.read_text(errors="replace")

    def workers(self) -> list[int]:
        """Process ids of the workers: forks of the pool, which is a child that runs `extproc serve`."""
        return [pid for pool in self.pools() for pid in _children(pool)]

    def pools(self) -> list[int]:
        """Process ids of the workers' parents; there is one."""
        return [pid for pid in self.children() if b"serve" in _command(pid).split(b"\0")]

    def children(self) -> list[int]:
        """Process ids of all that it started itself (Envoy, the pool, the demo provider)."""
        return _children(self.pid)

    def rows(self, where: str = "1=1") -> list[dict[str, Any]]:
        """The ledger's rows (SQLite), oldest first."""
        with sqlite3.connect(f"file:{self.folder / 'ledger.db'}?mode=ro", uri=True) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(f"select * from ledger where {where} order by started_at")]

    def wait_for_rows(self, count: int, where: str = "1=1", timeout_s: float = 15.0) -> list[dict[str, Any]]:
        """The ledger's rows, once there are `count` of them."""
        wait_for(lambda: len(self.rows(where)) >= count, timeout_s, f"{count} rows of the ledger")
        return self.rows(where)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until `condition` holds; TimeoutError says what was waited for."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError(f"waited {timeout_s} s for {what}")
