"""The soak: minutes of mixed traffic with killed and hung workers, reloads, upstream resets and slow clients.

`python -m tests.soak --minutes 10`. At the end the clients' own count, the upstream's and the ledger are held against
each other, request by request, and memory and descriptors against what they were. The surprising thing: nothing is
allowed to fail but what was in flight on a worker at the moment that it was killed, and that must have failed closed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.gateway import KEY, TEAMS, Gateway, config, wait_for
from tests.upstream import RecordingUpstream, Reply, Usage

MARKER = "x-test-marker"
_KILL_EVERY_S = 5.0
_RELOAD_EVERY_S = 2.0
_RESETS = 0.02
_SLOW_CLIENTS = 0.05
_LEAVERS = 0.05


@dataclass
class Tally:
    """What the clients saw. `answered`: whole answers by marker, with the request id; `failed`: statuses."""

    answered: dict[str, str] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    failed: dict[str, int] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    kills: int = 0
    hangs: int = 0
    reloads: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        RecordingUpstream(usage=_usage) as first,
        RecordingUpstream(usage=_usage) as second,
    ):
        return _soak(Path(folder), (first, second), options)


def _usage(request: Any) -> Usage:
    """By the request's own bytes, so that a row can be held against the request it belongs to."""
    return Usage(input_tokens=10 + len(request.body) % 500, output_tokens=5 + len(request.body) % 40)


def _soak(folder: Path, upstreams: tuple[RecordingUpstream, RecordingUpstream], options: argparse.Namespace) -> int:
    sections = config(
        providers={
            name: {"kind": "openai", "endpoint": f"{upstream.url}/v1", "api_key": {"env": "PROVIDER_KEY"}}
            for name, upstream in zip(("one", "two"), upstreams, strict=True)
        },
        models={"m": {"targets": [{"provider": "one", "priority": 0}, {"provider": "two", "priority": 1}]}},
        teams={"search": TEAMS["search"]},
        prices={f"{name}/*": {"input": 1, "output": 2} for name in ("one", "two")},
    )
    draw = random.Random(options.seed)
    upstreams[0].behave(Reply(reset_before_headers=True), where=lambda _: draw.random() < _RESETS)
    tally = Tally()
    with Gateway(folder, sections, {"EXTPROC_WORKERS": "2"}) as gateway:
        before = _size(gateway)
        asyncio.run(_run(gateway, sections, tally, options, draw))
        after = _size(gateway)
        wait_for(lambda: _row_count(gateway) >= len(tally.answered), 30, "the ledger")
        time.sleep(5)
        faults = _compare(gateway, upstreams, tally)
    print(json.dumps({"kills": tally.kills, "hangs": tally.hangs, "reloads": tally.reloads}))
    print(f"answered {len(tally.answered)}, left early {len(tally.left)}, failed {Counter(tally.failed.values())}")
    print(f"before {before}\nafter  {after}")
    faults += tally.odd + _grown(before, after)
    print("\n".join(faults[:40]) or "every count agrees")
    return 1 if faults else 0


async def _run(
    gateway: Gateway, sections: dict[str, Any], tally: Tally, options: argparse.Namespace, draw: random.Random
) -> None:
    ends = time.monotonic() + options.minutes * 60
    async with httpx.AsyncClient(
        base_url=gateway.url, timeout=30, headers={"authorization": f"Bearer {KEY}"}, limits=httpx.Limits()
    ) as client:
        await asyncio.gather(
            *(_client(client, number, ends, tally, draw) for number in range(options.clients)),
            _kill(gateway, ends, tally, draw),
            _reload(gateway, sections, ends, tally),
        )


async def _client(client: httpx.AsyncClient, number: int, ends: float, tally: Tally, draw: random.Random) -> None:
    count = 0
    while time.monotonic() < ends:
        count += 1
        marker = f"{number}-{count}"
        body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x" * draw.randint(1, 3000)}]}
        if draw.random() < 0.5:
            body["stream"] = True
        try:
            await _ask(client, marker, body, tally, draw)
        except httpx.HTTPError as error:
            tally.odd.append(f"{marker}: {type(error).__name__} {error}")
        await asyncio.sleep(draw.random() * 0.3)  # the recorder keeps every request: not too many


async def _ask(client: httpx.AsyncClient, marker: str, body: dict[str, Any], tally: Tally, draw: random.Random) -> None:
    slow, leaves = draw.random() < _SLOW_CLIENTS, draw.random() < _LEAVERS and "stream" in body
    async with client.stream("POST", "/v1/chat/completions", json=body, headers={MARKER: marker}) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode()
            tally.failed[marker] = answer.status_code
            if answer.status_code not in (503, 504) or "gateway_unavailable" not in text:
                tally.odd.append(f"{marker}: {answer.status_code} {text[:200]}")
            return
        async for _ in answer.aiter_raw():
            if leaves:
                tally.left.add(marker)
                return
            if slow:
                await asyncio.sleep(0.02)
        tally.answered[marker] = answer.headers["x-request-id"]


async def _kill(gateway: Gateway, ends: float, tally: Tally, draw: random.Random) -> None:
    while time.monotonic() + 2 * _KILL_EVERY_S < ends:
        await asyncio.sleep(draw.uniform(0.5, 1.5) * _KILL_EVERY_S)
        worker = draw.choice(gateway.workers() or [0])
        if worker == 0:
            continue
        hangs = draw.random() < 0.4
        os.kill(worker, signal.SIGSTOP if hangs else signal.SIGKILL)
        if hangs:
            tally.hangs += 1
        else:
            tally.kills += 1


async def _reload(gateway: Gateway, sections: dict[str, Any], ends: float, tally: Tally) -> None:
    while time.monotonic() + _RELOAD_EVERY_S < ends:
        await asyncio.sleep(_RELOAD_EVERY_S)
        tally.reloads += 1
        models = {**sections["models"], f"extra-{tally.reloads}": {"targets": [{"provider": "two"}]}}
        draft = gateway.file.with_suffix(".draft")
        draft.write_text(json.dumps({**sections, "models": models}))
        draft.replace(gateway.file)


def _row_count(gateway: Gateway) -> int:
    return len(gateway.rows("status = 200 and outcome = 'ok'"))


def _compare(gateway: Gateway, upstreams: tuple[RecordingUpstream, RecordingUpstream], tally: Tally) -> list[str]:
    """What does not agree, in words."""
    rows = {row["request_id"]: row for row in gateway.rows()}
    served = {request.marker: request for upstream in upstreams for request in upstream.requests if request.completed}
    faults: list[str] = []
    for marker, request_id in tally.answered.items():
        row, request = rows.get(request_id), served.get(marker)
        if row is None:
            faults.append(f"{marker}: answered, and not in the ledger")
        elif request is None or request.usage is None:
            faults.append(f"{marker}: answered, and the upstream knows nothing of it")
        elif (row["input_tokens"], row["output_tokens"]) != (request.usage.input_tokens, request.usage.output_tokens):
            faults.append(f"{marker}: {row['input_tokens']}/{row['output_tokens']} tokens, served {request.usage}")
        elif row["estimated"]:
            faults.append(f"{marker}: estimated, though it came to its end")
    faults += [f"{marker}: failed, and yet went upstream" for marker in tally.failed if marker in served]
    known = set(tally.answered.values())
    charged = [row for row in rows.values() if row["outcome"] == "ok" and row["request_id"] not in known]
    if len(charged) > len(tally.left):
        faults.append(f"{len(charged)} rows are ok that no client knows of")
    return faults


def _size(gateway: Gateway) -> dict[str, tuple[int, int]]:
    """Resident MB and open descriptors of each part."""
    found: dict[str, tuple[int, int]] = {}
    for process in (psutil.Process(gateway.pid), *psutil.Process(gateway.pid).children(recursive=True)):
        name = "envoy" if "envoy" in process.name() else "supervisor" if process.pid == gateway.pid else "python"
        resident, descriptors = found.get(name, (0, 0))
        found[name] = (resident + process.memory_info().rss // 2**20, descriptors + process.num_fds())
    return found


def _grown(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    """Parts that have grown by more than the warming-up explains."""
    return [
        f"{name} has grown from {was} to {after[name]}"
        for name, was in before.items()
        if after[name][0] > 1.5 * was[0] + 100 or after[name][1] > 2 * was[1] + 100
    ]


if __name__ == "__main__":
    sys.exit(main())
