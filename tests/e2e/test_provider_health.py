"""Providers in trouble: cooldowns that all workers share, the order of targets, and what `extproc status` shows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.gateway import KEY, TEAMS, Gateway, config, wait_for
from tests.upstream import RecordingUpstream, Reply

pytestmark = pytest.mark.e2e

Pair = tuple[RecordingUpstream, RecordingUpstream]


@pytest.fixture(scope="module")
def upstreams() -> Iterator[Pair]:
    with RecordingUpstream() as first, RecordingUpstream() as second:
        yield first, second


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstreams: Pair) -> Iterator[Gateway]:
    first, second = (upstream.url for upstream in upstreams)
    sections = config(
        providers={
            "asks": {"kind": "openai", "endpoint": f"{first}/v1"},
            "fails": {"kind": "openai", "endpoint": f"{first}/v1"},
            "named": {"kind": "openai", "endpoint": f"{first.replace('127.0.0.1', 'localhost')}/v1"},
            "dear": {"kind": "openai", "endpoint": f"{first}/v1"},
            "good": {"kind": "openai", "endpoint": f"{second}/v1"},
        },
        models={
            "asking": {"targets": [{"provider": "asks", "priority": 0}, {"provider": "good", "priority": 1}]},
            "failing": {"targets": [{"provider": "fails", "priority": 0}, {"provider": "good", "priority": 1}]},
            "alone": {"targets": [{"provider": "named"}]},
            "cheap": {"order": "cost", "targets": [{"provider": "dear", "weight": 99}, {"provider": "good"}]},
        },
        prices={"dear/*": {"input": 9, "output": 9}, "good/*": {"input": 1, "output": 1}},
        teams={"search": TEAMS["search"]},
    )
    with Gateway(tmp_path_factory.mktemp("health"), sections, {"EXTPROC_WORKERS": "2"}) as running:
        yield running


@pytest.fixture(autouse=True)
def all_well(upstreams: Pair) -> Iterator[None]:
    yield
    for upstream in upstreams:
        upstream.behave_normally()
        upstream.clear()


def chat(gateway: Gateway, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=20)


def cooling(gateway: Gateway, name: str) -> float:
    providers = httpx.get(f"{gateway.admin_url}/healthz").json()["providers"]
    return float(next(each["cooling_s"] for each in providers if each["name"] == name))


def test_a_provider_that_asks_to_be_left_alone_is_by_every_worker(gateway: Gateway, upstreams: Pair) -> None:
    upstreams[0].behave(Reply(status=429, headers=(("Retry-After", "3"),)))
    assert chat(gateway, "asking").headers["x-extproc-provider"] == "good"
    wait_for(lambda: cooling(gateway, "asks") > 0, 5, "the cooldown")
    asked = len(upstreams[0].requests)
    assert [chat(gateway, "asking").status_code for _ in range(12)] == [200] * 12
    assert len(upstreams[0].requests) == asked
    upstreams[0].behave_normally()
    wait_for(lambda: chat(gateway, "asking").headers["x-extproc-provider"] == "asks", 8, "the provider to be back")


def test_a_provider_that_keeps_failing_is_tried_last_and_comes_back(gateway: Gateway, upstreams: Pair) -> None:
    upstreams[0].behave(Reply(status=500))
    wait_for(lambda: chat(gateway, "failing").status_code == 200 and cooling(gateway, "fails") > 0, 10, "the cooldown")
    asked = len(upstreams[0].requests)
    assert chat(gateway, "failing").status_code == 200
    assert len(upstreams[0].requests) == asked
    upstreams[0].behave_normally()
    wait_for(lambda: chat(gateway, "failing").headers["x-extproc-provider"] == "fails", 10, "the provider to be back")


def test_the_only_provider_of_a_model_is_tried_however_often_it_has_failed(gateway: Gateway, upstreams: Pair) -> None:
    """Neither the cooldown nor Envoy's outlier ejection may leave a request without anyone to ask."""
    upstreams[0].behave(Reply(status=500), times=12)
    assert {chat(gateway, "alone").status_code for _ in range(12)} == {503}
    assert len(upstreams[0].requests) == 12
    time.sleep(0.3)
    assert chat(gateway, "alone").status_code == 200


def test_the_cheapest_target_comes_first_where_a_model_says_so(gateway: Gateway) -> None:
    assert {chat(gateway, "cheap").headers["x-extproc-provider"] for _ in range(10)} == {"good"}


def test_status_shows_workers_configuration_and_what_befell_each_provider(gateway: Gateway, upstreams: Pair) -> None:
    upstreams[0].behave(Reply(status=502), times=1)
    chat(gateway, "alone")

    def told() -> dict[str, object]:
        command = [sys.executable, "-m", "extproc", "status", str(gateway.file), "--json"]
        found: dict[str, object] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return found

    def named() -> dict[str, object]:
        providers = told()["providers"]
        assert isinstance(providers, list)
        found: dict[str, object] = next(each for each in providers if each["name"] == "named")
        return found

    wait_for(lambda: named()["last_failure"] == "502", 8, "the failure")
    found = told()
    assert found["problems"] == []
    assert len(found["workers"]) == 2  # type: ignore[arg-type]
    assert found["config"]["last_error"] is None  # type: ignore[index]
    shown = subprocess.run(
        [sys.executable, "-m", "extproc", "status", str(gateway.file)], capture_output=True, check=True, text=True
    ).stdout
    assert "named" in shown
    assert "502" in shown
