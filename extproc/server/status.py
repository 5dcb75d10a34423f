"""`extproc status`: what a running gateway says of itself on its admin port, as tables.

Read from outside, by the command. The surprising thing: it needs no login, so it shows counts and names alone.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from rich.table import Table
from rich.text import Text

from extproc.config.snapshot import Admin

_TIMEOUT_S = 3


class StatusUnavailableError(Exception):
    """No gateway answers there."""


def fetch(admin: Admin) -> dict[str, Any]:
    """The document of `/healthz`. Raises StatusUnavailableError."""
    host = f"[{admin.address}]" if ":" in admin.address else admin.address
    try:
        with urllib.request.urlopen(f"http://{host}:{admin.port}/healthz", timeout=_TIMEOUT_S) as answer:
            document: dict[str, Any] = json.load(answer)
            return document
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise StatusUnavailableError(f"no gateway answers on the admin port {admin.port}: {error}") from None


def render_status(found: dict[str, Any]) -> list[Table | Text]:
    """For a terminal: a line on the configuration, then workers and providers."""
    config = found["config"]
    told = Text(f"revision {config['revision']}, {config['reloads']} reloads")
    if found["problems"]:
        told.append(f"; {', '.join(found['problems'])}", style="red")
    if config["last_error"]:
        told.append(f"\nlast reload failed: {config['last_error']}", style="red")
    workers = Table("Worker", "Process", "Restarts")
    for worker in found["workers"]:
        workers.add_row(*(str(worker[key]) for key in ("number", "process", "restarts")))
    providers = Table("Provider", "Attempts", "Failures", "In a row", "Last failure", "Cools down (s)")
    for provider in found["providers"]:
        keys = ("name", "attempts", "failures", "failures_in_a_row", "last_failure", "cooling_s")
        providers.add_row(*("-" if provider[key] is None else str(provider[key]) for key in keys))
    return [told, workers, providers]
