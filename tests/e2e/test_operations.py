"""The gateway as an operator has it: check, render, spend, probes, ports, signals, and processes that die.

The surprising thing: nothing here asks how the gateway is made of processes. All that run below `extproc run` are
found by the system's own account of them, so that what lingers is found whatever it is.
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.gateway import KEY, PROVIDER_SECRET, Gateway, config, wait_for
from tests.upstream import RecordingUpstream, Reply
from tests.upstream_answers import WORDS

pytestmark = pytest.mark.e2e

AUTH = {"authorization": f"Bearer {KEY}"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
PRICES = {"acme/m": {"input": 2, "output": 10}}


def sections_for(upstream: RecordingUpstream, **more: Any) -> dict[str, Any]:
    acme = {"kind": "openai", "endpoint": f"{upstream.url}/v1", "api_key": {"env": "PROVIDER_KEY"}}
    models = {"m": "acme", "narrow": "acme", "demo": "demo"}
    return config(
        providers={"acme": acme, "demo": {"kind": "demo"}},
        models={name: {"targets": [{"provider": provider}]} for name, provider in models.items()},
        prices=PRICES,
        **more,
    )


@pytest.fixture(scope="module")
def upstream() -> Iterator[RecordingUpstream]:
    with RecordingUpstream() as recording:
        yield recording


@pytest.fixture(scope="module")
def gateway(upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(tmp_path_factory.mktemp("operations"), sections_for(upstream)) as running:
        yield running


@pytest.fixture(autouse=True)
def _anew(upstream: RecordingUpstream) -> None:
    upstream.behave_normally()


def extproc(
    *arguments: str, environ: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """One run of the program, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "extproc", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        env={**os.environ, "PROVIDER_KEY": PROVIDER_SECRET, "COLUMNS": "200", **(environ or {})},
        timeout=60,
        check=False,
    )


def chat(gateway: Gateway, **change: Any) -> httpx.Response:
    return httpx.post(f"{gateway.url}/v1/chat/completions", headers=AUTH, json={**CHAT, **change}, timeout=30)


def processes(gateway: Gateway) -> list[psutil.Process]:
    """All that run below `extproc run`, at any depth."""
    return psutil.Process(gateway.pid).children(recursive=True)


def run_folder(gateway: Gateway) -> Path:
    """Where it keeps sockets and secrets."""
    sockets = (argument for process in processes(gateway) for argument in process.cmdline() if "/extproc-" in argument)
    return next(parent for parent in Path(next(sockets)).parents if parent.name.startswith("extproc-"))


def wait_until_gone(before: list[psutil.Process], timeout_s: float) -> None:
    _, alive = psutil.wait_procs(before, timeout=timeout_s)
    left = [process.cmdline() for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert left == []


# Spend, probes and metrics of a gateway that served


def test_spend_shows_what_was_spent_as_a_table_as_json_and_as_csv(gateway: Gateway) -> None:
    asked = [chat(gateway) for _ in range(3)]
    for answer in asked:
        gateway.wait_for_rows(1, f"request_id = '{answer.headers['x-request-id']}'")
    arguments = ("spend", str(gateway.file), "--by", "team,model", "--since", "1h")
    table = extproc(*arguments)
    assert table.returncode == 0, table.stderr
    document = json.loads(extproc(*arguments, "--json").stdout)
    assert document["since"]
    (line,) = [each for each in document["lines"] if each["model"] == "m"]
    assert line["team"] == "search"
    assert (line["input_tokens"], line["output_tokens"]) == (line["requests"] * 11, line["requests"] * 7)
    cost_usd = line["requests"] * (11 * 2 + 7 * 10) / 1_000_000
    assert float(line["cost_usd"]) == pytest.approx(cost_usd)
    (row,) = [each for each in csv.DictReader(io.StringIO(extproc(*arguments, "--csv").stdout)) if each["model"] == "m"]
    assert row["requests"] == str(line["requests"])
    assert float(row["cost_usd"]) == pytest.approx(cost_usd)
    assert "search" in table.stdout
    assert str(line["requests"] * 11) in table.stdout


@pytest.mark.parametrize(
    ("arguments", "words"), [(("--by", "colour"), "colour"), (("--since", "yesterdayish"), "yesterdayish")]
)
def test_spend_says_what_it_does_not_understand(gateway: Gateway, arguments: tuple[str, str], words: str) -> None:
    ended = extproc("spend", str(gateway.file), *arguments)
    assert ended.returncode == 1
    assert words in ended.stderr


def test_probes_answer_and_metrics_count(gateway: Gateway) -> None:
    answer = chat(gateway)
    gateway.wait_for_rows(1, f"request_id = '{answer.headers['x-request-id']}'")
    assert httpx.get(f"{gateway.admin_url}/healthz").json()["alive"] is True
    ready = httpx.get(f"{gateway.admin_url}/readyz")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "problems": []})
    name = 'extproc_requests_total{outcome="ok",provider="acme",team="search"}'
    wait_for(lambda: name in httpx.get(f"{gateway.admin_url}/metrics").text, 5, "the request in the metrics")
    metrics = httpx.get(f"{gateway.admin_url}/metrics").text
    assert 'extproc_tokens_total{kind="input",provider="acme",team="search"}' in metrics
    assert KEY not in metrics


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "169.254.169.254", ""])
def test_the_admin_port_refuses_a_foreign_host(gateway: Gateway, host: str) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/nowhere"):
        answer = httpx.get(gateway.admin_url + path, headers={"host": host})
        assert answer.status_code in ((400, 403) if host == "" else (403,))
    assert httpx.get(f"{gateway.admin_url}/readyz", headers={"host": "LOCALHOST:1"}).status_code == 200


def test_the_admin_port_has_no_page_that_needs_a_login_yet(gateway: Gateway) -> None:
    assert {httpx.get(gateway.admin_url + path).status_code for path in ("/", "/config_dump", "/quitquitquit")} == {404}


# Secrets


def test_a_providers_secret_is_in_envoys_secret_files_and_nowhere_else(gateway: Gateway) -> None:
    assert chat(gateway).status_code == 200
    secret = PROVIDER_SECRET.encode()
    for process in processes(gateway):
        assert PROVIDER_SECRET not in " ".join(process.cmdline()), process
        assert PROVIDER_SECRET not in "".join(process.environ().values()), process
    assert PROVIDER_SECRET not in " ".join(psutil.Process(gateway.pid).cmdline()) + gateway.log()
    folder = run_folder(gateway)
    assert folder.stat().st_mode & 0o777 == 0o700
    holding = [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert [path.parent.name for path in holding] == ["secrets"]
    assert holding[0].stat().st_mode & 0o777 == 0o600
    for name in ("ledger.db", "ledger.db-wal"):
        path = gateway.folder / name
        assert not path.exists() or (secret not in path.read_bytes() and KEY.encode() not in path.read_bytes())
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(folder / "envoy-admin.sock"))) as envoy:
        assert PROVIDER_SECRET not in envoy.get("http://envoy/config_dump?include_eds").text


# Ports


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("section", ["listen", "admin"])
def test_a_taken_port_ends_the_start_with_a_clear_message_and_leaves_nothing(
    upstream: RecordingUpstream, tmp_path: Path, section: str
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with taken_port() as port:
        file = tmp_path / "gateway.yaml"
        file.write_text(json.dumps(sections_for(upstream, **{section: {"port": port}})))
        ended = extproc("run", str(file), environ={"TMPDIR": str(temporary)})
    assert ended.returncode == 1
    assert str(port) in ended.stderr
    assert "in use" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(temporary.iterdir()) == []
    assert not [
        each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(each.info["cmdline"] or ())
    ]


def test_two_gateways_can_not_share_a_port(gateway: Gateway, upstream: RecordingUpstream, tmp_path: Path) -> None:
    second = Gateway(tmp_path, sections_for(upstream, listen={"port": gateway.port}))
    with pytest.raises(RuntimeError, match=f"port {gateway.port}"):
        second.__enter__()
    assert second.end() == 1
    assert chat(gateway).status_code == 200


# Processes that die or stand still


def test_whatever_is_killed_is_replaced_and_serves_again(gateway: Gateway) -> None:
    with httpx.Client(timeout=30) as probe:
        for victim in processes(gateway):
            with suppress(psutil.NoSuchProcess):  # it went with the one that was killed before
                victim.kill()
            psutil.wait_procs([victim], timeout=5)
            wait_for(gateway.ready, 20, f"the gateway without {victim.pid}")
            for model in ("m", "demo"):
                answer = probe.post(f"{gateway.url}/v1/chat/completions", headers=AUTH, json={**CHAT, "model": model})
                assert answer.status_code == 200, (victim, answer.text)
    assert gateway.running()
    answer = chat(gateway)
    gateway.wait_for_rows(1, f"request_id = '{answer.headers['x-request-id']}'")


def test_a_supervisor_that_stands_still_holds_up_no_request(gateway: Gateway) -> None:
    os.kill(gateway.pid, signal.SIGSTOP)
    try:
        with httpx.Client(timeout=10) as client:
            for _ in range(400):  # more lines than a pipe holds
                assert client.get(f"{gateway.url}/v1/models", headers=AUTH).status_code == 200
    finally:
        os.kill(gateway.pid, signal.SIGCONT)
    wait_for(gateway.ready, 10, "the supervisor to go on")


# The end. Each has a gateway of its own.


@pytest.fixture
def own(upstream: RecordingUpstream, tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(tmp_path, sections_for(upstream)) as running:
        yield running


def test_sigterm_lets_an_open_stream_finish_takes_no_new_one_and_leaves_nothing(
    own: Gateway, upstream: RecordingUpstream
) -> None:
    folder, before = run_folder(own), processes(own)
    upstream.behave(Reply(chunk_delay_s=0.25))
    begun, ended = threading.Event(), threading.Event()
    got: list[str] = []

    def stream() -> None:
        with httpx.stream("POST", f"{own.url}/v1/chat/completions", headers=AUTH, json={**CHAT, "stream": True}) as it:
            for text in it.iter_text():
                got.append(text)
                begun.set()
        ended.set()

    reader = threading.Thread(target=stream)
    reader.start()
    assert begun.wait(10)
    os.kill(own.pid, signal.SIGTERM)
    wait_for(lambda: not own.ready(), 5, "readiness to be withdrawn")
    assert httpx.get(f"{own.admin_url}/readyz").status_code == 503
    assert httpx.get(f"{own.admin_url}/healthz").status_code == 200
    wait_for(lambda: not accepts(own.port), 5, "the port to be closed")
    assert not ended.is_set()
    reader.join(20)
    assert "".join(got).count("data: ") == len(WORDS) + 3
    assert "".join(got).endswith("data: [DONE]\n\n")
    assert own.end() == 0
    wait_until_gone(before, 1)
    assert not folder.exists()
    (row,) = own.rows("stream = 1")
    assert (row["outcome"], row["output_tokens"]) == ("ok", 7)


def test_sigterm_without_open_streams_ends_everything_within_20_s(own: Gateway) -> None:
    folder, before = run_folder(own), processes(own)
    with httpx.Client() as idle:  # a connection that is kept alive is no reason to wait
        assert idle.get(f"{own.url}/v1/models", headers=AUTH).status_code == 200
        began = time.monotonic()
        assert own.end() == 0
        assert time.monotonic() - began < 20
    wait_until_gone(before, 1)
    assert not folder.exists()


def test_a_killed_supervisor_takes_everything_with_it(own: Gateway) -> None:
    folder, before = run_folder(own), processes(own)
    assert chat(own).status_code == 200
    assert own.end(signal.SIGKILL) == -signal.SIGKILL
    wait_until_gone(before, 20)
    assert not accepts(own.port)
    wait_for(lambda: not folder.exists(), 5, "the run folder to be removed")


def test_it_serves_on_when_nobody_reads_its_output(upstream: RecordingUpstream, tmp_path: Path) -> None:
    sections = sections_for(upstream)
    idle = Gateway(tmp_path, sections)  # writes the file, and is not started
    command = [sys.executable, "-m", "extproc", "run", str(idle.file)]
    environ = {**os.environ, "PROVIDER_KEY": PROVIDER_SECRET}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ) as process:
        try:
            wait_for(idle.ready, 30, "the gateway to be ready")
            assert process.stdout is not None
            process.stdout.close()
            for _ in range(3):
                assert chat(idle).status_code == 200
                time.sleep(0.3)  # for its line to come and find nobody
            assert idle.ready()
        finally:
            process.terminate()
        assert process.wait(20) == 0


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
