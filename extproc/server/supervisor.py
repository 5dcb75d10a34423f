"""`extproc run`: Envoy, the worker and the demo provider as one program, from one file.

Above the request path: it starts what the path is made of, keeps it alive, answers the admin port and shows what
passes. The surprising thing: it is the only process that ever reads a provider's secret, and it forgets it as soon as
Envoy's secret file is written.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path, PurePosixPath
from typing import Literal

from extproc.config.secrets import read_secret
from extproc.config.snapshot import Snapshot
from extproc.render.bootstrap import render, secret_files
from extproc.render.deployment import Deployment, system_ca_bundle
from extproc.server.admin import Metrics, serve_admin
from extproc.server.app import READY_LINE
from extproc.server.children import Child
from extproc.server.envoy_admin import EnvoyAdmin
from extproc.server.screen import Screen
from extproc.server.watch import passed_of

_START_TIMEOUT_S = 30.0
_DRAIN_S = 25.0
_END_TIMEOUT_S = 5.0
_WORKER_END_TIMEOUT_S = 12.0
_LAST_RECORDS_S = 0.5
"""Envoy sends its last access-log entries within its flush interval (0.1 s)."""
_WITHHELD = "withheld"

_log = logging.getLogger(__name__)


class Supervisor:
    """Runs one snapshot until SIGTERM or SIGINT."""

    def __init__(self, file: Path, snapshot: Snapshot, environ: Mapping[str, str], screen: Screen) -> None:
        self._file = file
        self._snapshot = snapshot
        self._environ = environ
        self._screen = screen
        self._metrics = Metrics()
        self._children: list[Child] = []
        self._envoy_admin: EnvoyAdmin | None = None
        self._state: Literal["starting", "serving", "draining"] = "starting"

    def problems(self) -> list[str]:
        """See `admin.Health`."""
        if self._state != "serving":
            return [self._state]
        return [
            f"{child.name} is not running" for child in self._children if not (child.alive and child.ready.is_set())
        ]

    async def run(self) -> None:
        """Start all, wait for the signal, drain, end all. Raises ChildFailedError or OSError when a part can not start."""
        stop = asyncio.Event()
        for wanted in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(wanted, stop.set)
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="extproc-", ignore_cleanup_errors=True))
            deployment = Deployment(PurePosixPath(folder), PurePosixPath(system_ca_bundle()))
            config = self._write_files(deployment)
            stack.push_async_callback(await serve_admin(self._snapshot.admin, self, self._metrics))
            stack.push_async_callback(self._end_all)
            await self._start_all(deployment, config)
            self._state = "serving"
            self._screen.welcome(self._snapshot)
            await stop.wait()
            self._state = "draining"
            self._screen.note("ending: open requests may finish")
            await self._drain()

    def _write_files(self, deployment: Deployment) -> Path:
        """Envoy's configuration and secrets. The folder is new and the owner's alone; so is each secret file."""
        Path(deployment.secrets_dir).mkdir(mode=0o700)
        secrets = {
            provider.name: read_secret(provider.secret, self._environ)
            for provider in self._snapshot.providers.values()
            if provider.secret is not None
        }
        for path, content in secret_files(self._snapshot, deployment, secrets).items():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
        config = Path(deployment.run_dir) / "envoy.json"
        config.write_text(render(self._snapshot, deployment), encoding="utf-8")
        return config

    async def _start_all(self, deployment: Deployment, config: Path) -> None:
        if any(provider.kind == "demo" for provider in self._snapshot.providers.values()):
            await self._start(self._demo(deployment))
        await self._start(self._worker(deployment, 0))
        envoy = self._envoy(config)
        self._children.append(envoy)
        self._envoy_admin = EnvoyAdmin(Path(deployment.admin_socket))
        envoy.ready.set()
        await envoy.start(_START_TIMEOUT_S)
        await self._envoy_admin.wait_live(lambda: envoy.alive and envoy.restarts == 0, _START_TIMEOUT_S)

    async def _start(self, child: Child) -> None:
        self._children.append(child)
        await child.start(_START_TIMEOUT_S)

    def _demo(self, deployment: Deployment) -> Child:
        socket = Path(deployment.demo_socket)
        command = (sys.executable, "-m", "extproc.demo", "--socket", str(socket))
        return Child("demo provider", command, self._bare_environ(), lambda _: None, is_ready_line=_says_ready)

    def _worker(self, deployment: Deployment, number: int) -> Child:
        socket = str(deployment.worker_socket(number))
        command = (sys.executable, "-m", "extproc", "serve", str(self._file), "--socket", socket)
        return Child(f"worker {number}", command, self._worker_environ(), self._on_line, is_ready_line=_says_ready)

    def _envoy(self, config: Path) -> Child:
        binary = Path(sysconfig.get_paths()["purelib"]) / "envoy" / "_bin" / "envoy"
        command = (
            *(str(binary), "-c", str(config), "--log-level", "error", "--use-dynamic-base-id"),
            *("--concurrency", str(os.cpu_count() or 1), "--drain-time-s", str(int(_DRAIN_S))),
        )
        return Child("Envoy", command, self._bare_environ(), lambda _: None)

    def _bare_environ(self) -> dict[str, str]:
        """For children that need no secret: where programs and temporary files are, and nothing else."""
        kept = ("PATH", "HOME", "TMPDIR", "LANG", "PYTHONPATH", "VIRTUAL_ENV")
        return {name: self._environ[name] for name in kept if name in self._environ}

    def _worker_environ(self) -> dict[str, str]:
        """The worker compiles the same file, so the variables of providers must be set; their values need not be."""
        refs = [provider.secret for provider in self._snapshot.providers.values() if provider.secret is not None]
        withheld = {ref.name: _WITHHELD for ref in refs if ref.source == "env"}
        if self._snapshot.sql_secret is not None:
            withheld.pop(self._snapshot.sql_secret.name, None)
        return {**self._environ, **withheld}

    def _on_line(self, line: bytes) -> None:
        passed = passed_of(line)
        if passed is None:
            return
        self._metrics.count(passed)
        self._screen.passed(passed)

    async def _drain(self) -> None:
        if self._envoy_admin is not None:
            await self._envoy_admin.drain(_DRAIN_S)
            await asyncio.sleep(_LAST_RECORDS_S)

    async def _end_all(self) -> None:
        for child in reversed(self._children):
            await child.end(_WORKER_END_TIMEOUT_S if child.name.startswith("worker") else _END_TIMEOUT_S)


def _says_ready(line: bytes) -> bool:
    return line == READY_LINE
