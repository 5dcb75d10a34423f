"""Hot reload: a change of gateway.yaml is live in a second, drops no stream, and a bad one changes nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway import KEY, PROVIDER_SECRET, TEAMS, Gateway, config, digest, wait_for
from tests.upstream import RecordingUpstream, Reply, sse

pytestmark = pytest.mark.e2e

HEADERS = {"authorization": f"Bearer {KEY}"}


class Edited:
    """A running gateway whose file a test may change, and which is as it was afterwards."""

    def __init__(self, gateway: Gateway, sections: dict[str, Any]) -> None:
        self.gateway = gateway
        self.sections = sections

    def write(self, **changes: Any) -> None:
        """Put another file in its place by an atomic rename, as editors and operators do."""
        draft = self.gateway.file.with_suffix(".draft")
        draft.write_text(json.dumps({**self.sections, **changes}))
        draft.replace(self.gateway.file)

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.gateway.admin_url}/healthz").json()
        return found

    def wait_for_reloads(self, count: int) -> None:
        wait_for(lambda: self.health()["config"]["reloads"] >= count, 8, f"{count} reloads")

    def reloads(self) -> int:
        return int(self.health()["config"]["reloads"])

    def chat(self, model: str, key: str = KEY) -> httpx.Response:
        return httpx.post(
            f"{self.gateway.url}/v1/chat/completions",
            headers={"authorization": f"Bearer {key}"},
            json={"model": model, "messages": [{"role": "user", "content": "hi"}]},
        )


@pytest.fixture(scope="module")
def upstreams() -> Iterator[tuple[RecordingUpstream, RecordingUpstream]]:
    with RecordingUpstream() as first, RecordingUpstream() as second:
        yield first, second


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("secrets") / "key"
    file.write_text(f"{PROVIDER_SECRET}\n")
    return file


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory,
    upstreams: tuple[RecordingUpstream, RecordingUpstream],
    secret: Path,
) -> Iterator[Edited]:
    sections = config(
        providers={"up": {"kind": "openai", "endpoint": f"{upstreams[0].url}/v1", "api_key": {"file": str(secret)}}},
        models={"m": {"targets": [{"provider": "up"}]}},
        teams={"search": TEAMS["search"]},
    )
    with Gateway(tmp_path_factory.mktemp("reload"), sections, {"EXTPROC_WORKERS": "2"}) as gateway:
        yield Edited(gateway, sections)


@pytest.fixture(autouse=True)
def as_it_was(running: Edited) -> Iterator[None]:
    yield
    running.write()
    wait_for(lambda: running.chat("m").status_code == 200, 8, "the first configuration")
    wait_for(lambda: running.health()["config"]["last_error"] is None, 8, "no error")


def test_a_new_model_on_a_new_provider_is_live_within_a_second_and_no_request_fails_meanwhile(
    running: Edited, upstreams: tuple[RecordingUpstream, RecordingUpstream]
) -> None:
    statuses: list[int] = []
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            statuses.append(running.chat("m").status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    upstreams[1].clear()
    changed = time.monotonic()
    running.write(
        providers={**running.sections["providers"], "two": {"kind": "openai", "endpoint": f"{upstreams[1].url}/v1"}},
        models={**running.sections["models"], "new": {"targets": [{"provider": "two"}]}},
    )
    wait_for(lambda: running.chat("new").status_code == 200, 8, "the new model")
    took_s = time.monotonic() - changed
    ends.set()
    asking.join()
    assert set(statuses) == {200}
    assert len(upstreams[1].requests) >= 1
    print(f"live after {took_s:.2f} s")


def test_a_key_that_is_taken_out_is_refused_and_one_that_is_put_in_is_taken(running: Edited) -> None:
    before = running.reloads()
    team = {"models": ["*"], "keys": [{"id": "other", "sha256": digest("sk-other")}]}
    running.write(teams={"search": team})
    running.wait_for_reloads(before + 1)
    assert [running.chat("m").status_code for _ in range(6)] == [401] * 6  # every worker
    assert [running.chat("m", "sk-other").status_code for _ in range(6)] == [200] * 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid YAML"),
        (json.dumps({"providers": {"up": {"kind": "openai"}}, "modles": {}}), "modles"),
        ("", "gateway.yaml"),
    ],
)
def test_a_bad_change_is_told_everywhere_and_changes_nothing(running: Edited, text: str, said: str) -> None:
    before = running.reloads()
    running.gateway.file.write_text(text)
    wait_for(lambda: said in (running.health()["config"]["last_error"] or ""), 8, "the error on /healthz")
    wait_for(lambda: said in running.gateway.log(), 8, "the error on the screen")
    assert running.reloads() == before
    assert running.chat("m").status_code == 200
    assert running.gateway.ready()


def test_a_stream_that_is_open_at_a_reload_runs_to_its_end(
    running: Edited, upstreams: tuple[RecordingUpstream, RecordingUpstream]
) -> None:
    """Its provider's cluster is changed under it, and its own key taken out."""
    chunk = {"id": "x", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "t"}}]}
    chunks = (sse(json.dumps(chunk)),) * 20
    upstreams[0].behave(Reply(chunks=chunks, chunk_delay_s=0.15), times=1, where=lambda asked: b"slow" in asked.body)
    before = running.reloads()
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "slow"}]}
    with httpx.stream(
        "POST", f"{running.gateway.url}/v1/chat/completions", headers=HEADERS, json=body, timeout=20
    ) as stream:
        received = stream.iter_raw()
        first = next(received)
        running.write(
            providers={"up": {"kind": "openai", "endpoint": f"{upstreams[1].url}/v1"}},
            teams={"search": {"models": ["*"], "keys": [{"id": "other", "sha256": digest("sk-other")}]}},
        )
        running.wait_for_reloads(before + 1)
        rest = b"".join(received)
    assert (first + rest).count(b"data: ") == 20
    upstreams[1].clear()
    assert running.chat("m", "sk-other").status_code == 200
    assert len(upstreams[1].requests) == 1


def test_a_provider_that_is_taken_out_lets_its_open_streams_end(
    running: Edited, upstreams: tuple[RecordingUpstream, RecordingUpstream]
) -> None:
    two = {"kind": "openai", "endpoint": f"{upstreams[1].url}/v1"}
    before = running.reloads()
    running.write(
        providers={**running.sections["providers"], "two": two},
        models={**running.sections["models"], "new": {"targets": [{"provider": "two"}]}},
    )
    running.wait_for_reloads(before + 1)
    chunk = {"id": "x", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "t"}}]}
    upstreams[1].behave(Reply(chunks=(sse(json.dumps(chunk)),) * 30, chunk_delay_s=0.1), times=1)
    body = {"model": "new", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    with httpx.stream(
        "POST", f"{running.gateway.url}/v1/chat/completions", headers=HEADERS, json=body, timeout=20
    ) as stream:
        received = stream.iter_raw()
        first = next(received)
        running.write()
        running.wait_for_reloads(before + 2)
        assert running.chat("new").status_code == 404
        rest = b"".join(received)
    assert (first + rest).count(b"data: ") == 30


def test_a_secret_file_that_changes_is_sent_from_then_on(
    running: Edited, upstreams: tuple[RecordingUpstream, RecordingUpstream], secret: Path
) -> None:
    before = running.reloads()
    draft = secret.with_suffix(".draft")
    draft.write_text("rotated-secret\n")
    draft.replace(secret)
    running.wait_for_reloads(before + 1)

    def sent() -> str | None:
        upstreams[0].clear()
        running.chat("m")
        return upstreams[0].requests[0].header("authorization")

    wait_for(lambda: sent() == "Bearer rotated-secret", 5, "the new secret upstream")
    secret.write_text(f"{PROVIDER_SECRET}\n")
    wait_for(lambda: sent() == f"Bearer {PROVIDER_SECRET}", 8, "the old secret upstream")


def test_the_symlink_swap_of_a_config_map_reloads(
    tmp_path: Path, upstreams: tuple[RecordingUpstream, RecordingUpstream]
) -> None:
    """Kubernetes mounts gateway.yaml -> ..data/gateway.yaml and swaps the link `..data`."""
    sections = config(
        providers={"up": {"kind": "openai", "endpoint": f"{upstreams[0].url}/v1"}},
        models={"m": {"targets": [{"provider": "up"}]}},
        teams={"search": TEAMS["search"]},
    )
    with Gateway(tmp_path, sections) as gateway:
        edited = Edited(gateway, sections)
        assert edited.chat("two").status_code == 404
    for name, models in (("v1", sections["models"]), ("v2", {**sections["models"], "two": sections["models"]["m"]})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "gateway.yaml").write_text(json.dumps({**sections, "models": models}))
    gateway.file.unlink()
    (tmp_path / "..data").symlink_to("v1")
    gateway.file.symlink_to("..data/gateway.yaml")
    with gateway:
        assert edited.chat("two").status_code == 404
        (tmp_path / "..data_tmp").symlink_to("v2")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        wait_for(lambda: edited.chat("two").status_code == 200, 8, "the swapped configuration")


def test_sighup_looks_at_once(running: Edited) -> None:
    before = running.reloads()
    running.write(
        teams={
            "search": TEAMS["search"],
            "more": {"models": ["m"], "keys": [{"id": "more", "sha256": digest("sk-more")}]},
        }
    )
    os.kill(running.gateway.pid, signal.SIGHUP)
    running.wait_for_reloads(before + 1)
    assert running.chat("m", "sk-more").status_code == 200


def test_what_a_running_gateway_can_not_take_is_said(running: Edited) -> None:
    running.write(state={"sql": "sqlite:///other.db"})
    wait_for(lambda: "restart" in (running.health()["config"]["last_error"] or ""), 8, "the error on /healthz")
    assert running.chat("m").status_code == 200


def test_a_new_worker_begins_with_the_configuration_in_force(running: Edited) -> None:
    before = running.reloads()
    running.write(models={**running.sections["models"], "late": running.sections["models"]["m"]})
    running.wait_for_reloads(before + 1)
    workers = running.gateway.workers()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: len(set(running.gateway.workers()) - set(workers)) == 2, 8, "new workers")
    wait_for(lambda: running.chat("late").status_code == 200, 5, "an answer")
    assert [running.chat("late").status_code for _ in range(6)] == [200] * 6
