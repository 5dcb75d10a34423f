"""An Envoy on another machine: `extproc serve` behind TCP with mutual TLS, and Envoy on what `extproc render` prints.

The surprising thing: both stand on loopback here, so what keeps strangers out is the certificates alone. The server's
names `localhost`, so an Envoy that looks for 127.0.0.1 meets a wrong name. Secret files are written as
docs/operations.md tells an operator to.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import certifi
import httpx
import psutil
import pytest
import trustme

from tests.gateway import KEY, NARROW_KEY, PROVIDER_SECRET, TEAMS, config, free_port, wait_for
from tests.gateway import Gateway as Ledger
from tests.upstream import RecordingUpstream

pytestmark = pytest.mark.e2e

ENVOY = Path(sysconfig.get_paths()["purelib"]) / "envoy" / "_bin" / "envoy"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What an HTTP/2 client says first (RFC 9113 section 3.4)."""


class Authority:
    """A CA that signs the server (`localhost`) and its client, and another that signs a stranger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = folder / "ca.pem"
        good, other = trustme.CA(), trustme.CA()
        good.cert_pem.write_to_path(str(self.ca))
        self._write("server", good.issue_cert("localhost"))
        self._write("envoy", good.issue_cert("envoy@gateway.example"))
        self._write("stranger", other.issue_cert("envoy@gateway.example"))

    def _write(self, name: str, leaf: trustme.LeafCert) -> None:
        certificate, key = self.pair(name)
        certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key.write_bytes(leaf.private_key_pem.bytes())

    def pair(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"


class Sidecar:
    """`extproc serve FILE`, started as a service manager would: with nothing on its standard input."""

    def __init__(self, folder: Path, *options: str, environ: dict[str, str] | None = None) -> None:
        self._log = folder / "serve.log"
        self._command = [sys.executable, "-m", "extproc", "serve", str(folder / "gateway.yaml"), *options]
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self._environ = {**os.environ, "TMPDIR": str(self.temporary), **(environ or {})}

    def __enter__(self) -> Sidecar:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self._environ
            )
        wait_for(lambda: "\nready\n" in self.log() or self.process.poll() is not None, 60, "the workers to be ready")
        assert self.process.poll() is None, self.log()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def log(self) -> str:
        return self._log.read_text()

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@dataclass
class Lab:
    folder: Path
    authority: Authority
    upstream: RecordingUpstream
    sidecar: Sidecar
    sidecar_port: int
    port: int
    """Of the Envoy that is told the sidecar's right name."""
    wrong_port: int
    """Of the one that is told its address, which is not on its certificate."""
    ledger: Ledger

    def chat(self, *, port: int | None = None, key: str = KEY, **more: Any) -> httpx.Response:
        url = f"http://127.0.0.1:{port or self.port}/v1/chat/completions"
        return httpx.post(url, headers={"authorization": f"Bearer {key}"}, json={**CHAT, **more}, timeout=15)


@pytest.fixture(scope="module", params=["ngh2", "grpc-aio"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # a Unix socket's path is a short one
        upstream = stack.enter_context(RecordingUpstream())
        authority = Authority(folder)
        sections = sections_for(upstream)
        sidecar_port = free_port()
        files = (*named("--tls-certificate", "--tls-key", authority.pair("server")), "--tls-client-ca", authority.ca)
        ledger = Ledger(folder, sections)  # only to read it
        sidecar = stack.enter_context(
            Sidecar(
                folder,
                *("--listen", f"127.0.0.1:{sidecar_port}", *map(str, files)),
                *(("--workers", "2") if request.param == "ngh2" else ()),
                environ={"EXTPROC_TRANSPORT": request.param, "EXTPROC_WORKERS": "0", "PROVIDER_KEY": ""},
            )
        )
        port: int = sections["listen"]["port"]
        stack.enter_context(envoy(folder / "right", sections, authority, f"localhost:{sidecar_port}"))
        wrong = {**sections, "listen": {"address": "127.0.0.1", "port": free_port()}}
        stack.enter_context(envoy(folder / "wrong", wrong, authority, f"127.0.0.1:{sidecar_port}"))
        yield Lab(folder, authority, upstream, sidecar, sidecar_port, port, wrong["listen"]["port"], ledger)


def sections_for(upstream: RecordingUpstream) -> dict[str, Any]:
    return config(
        providers={"up": {"kind": "openai", "endpoint": f"{upstream.url}/v1", "api_key": {"env": "PROVIDER_KEY"}}},
        models={"m": {"targets": [{"provider": "up"}]}},
        teams={"search": TEAMS["search"]},
    )


def named(certificate: str, key: str, pair: tuple[Path, Path]) -> tuple[str, Path, str, Path]:
    return certificate, pair[0], key, pair[1]


@contextmanager
def envoy(folder: Path, sections: dict[str, Any], authority: Authority, sidecar: str) -> Iterator[None]:
    """An operator's Envoy: a run folder, secret files in it, the rendered configuration, the program."""
    run_dir = folder / "run"
    (run_dir / "secrets").mkdir(parents=True, mode=0o700)
    file = folder / "gateway.yaml"
    file.write_text(json.dumps(sections))
    (example,) = re.findall(r"```json\n(.*?)```", OPERATIONS.read_text(), re.DOTALL)
    secret = run_dir / "secrets" / "up.json"
    secret.write_text(example.replace("openai", "up").replace("sk-...", PROVIDER_SECRET))
    files = (*named("--sidecar-certificate", "--sidecar-key", authority.pair("envoy")), "--sidecar-ca", authority.ca)
    rendered = subprocess.run(
        [
            *(sys.executable, "-m", "extproc", "render", str(file), "--sidecar", sidecar, *map(str, files)),
            *("--run-dir", str(run_dir), "--ca-bundle", certifi.where()),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(secret) in rendered
    (folder / "envoy.json").write_text(rendered)
    command = [str(ENVOY), "-c", str(folder / "envoy.json"), "--use-dynamic-base-id", "--concurrency", "1"]
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen([*command, "--log-level", "warning"], stdout=log, stderr=subprocess.STDOUT)
    try:
        port: int = sections["listen"]["port"]
        wait_for(lambda: listens(port) or process.poll() is not None, 30, "Envoy to listen")
        assert process.poll() is None, (folder / "envoy.log").read_text()
        yield
    finally:
        process.terminate()
        process.wait(20)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_chat_and_a_stream_pass_and_are_in_the_ledger(lab: Lab) -> None:
    lab.upstream.clear()
    chat, stream = lab.chat(), lab.chat(stream=True, stream_options={"include_usage": True})
    assert (chat.status_code, stream.status_code) == (200, 200), lab.sidecar.log()
    assert stream.text.rstrip().endswith("data: [DONE]")
    assert [request.header("authorization") for request in lab.upstream.requests] == [f"Bearer {PROVIDER_SECRET}"] * 2
    for answer in (chat, stream):
        (row,) = lab.ledger.wait_for_rows(1, f"request_id = '{answer.headers['x-request-id']}'")
        assert (row["status"], row["outcome"], row["provider"], row["key_id"]) == (200, "ok", "up", "search-all")
        assert row["input_tokens"] > 0
        assert row["output_tokens"] > 0


def test_a_refusal_reaches_the_client_and_not_the_provider(lab: Lab) -> None:
    lab.upstream.clear()
    assert lab.chat(key="sk-unknown").status_code == 401
    assert lab.upstream.requests == []


def first_word(lab: Lab, client: str | None, version: ssl.TLSVersion) -> bytes:
    """What the sidecar says to a client with that certificate; nothing where it hangs up."""
    context = ssl.create_default_context(cafile=lab.authority.ca)
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    if client is not None:
        context.load_cert_chain(*lab.authority.pair(client))
    try:
        with (
            socket.create_connection(("127.0.0.1", lab.sidecar_port), timeout=5) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as connected,
        ):
            connected.sendall(PREFACE)
            return connected.recv(9)
    except (ssl.SSLError, ConnectionError):
        return b""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_only_a_client_with_a_certificate_of_the_ca_gets_a_connection(lab: Lab, version: ssl.TLSVersion) -> None:
    settings = 4  # the type of the frame that a server begins with
    assert first_word(lab, "envoy", version)[3] == settings
    assert first_word(lab, None, version) == b""
    assert first_word(lab, "stranger", version) == b""


def test_without_tls_nothing_is_heard(lab: Lab) -> None:
    with socket.create_connection(("127.0.0.1", lab.sidecar_port), timeout=5) as raw:
        raw.sendall(PREFACE)
        try:
            heard = raw.recv(1024)
        except ConnectionError:
            heard = b""
    assert heard[:1] in (b"", b"\x15"), "at most a TLS alert"


def test_a_sidecar_of_another_name_is_not_believed(lab: Lab) -> None:
    lab.upstream.clear()
    answer = lab.chat(port=lab.wrong_port)
    assert answer.status_code == 503
    assert lab.upstream.requests == []
    transport = httpx.HTTPTransport(uds=str(lab.folder / "wrong" / "run" / "envoy-admin.sock"))
    with httpx.Client(transport=transport, base_url="http://envoy") as admin:
        stats = admin.get("/stats", params={"filter": r"^cluster\.extproc\.ssl\.(fail_verify_san|handshake)$"}).text
    found = {
        name.rpartition(".")[2]: int(value) for name, _, value in (line.partition(": ") for line in stats.splitlines())
    }
    assert found["fail_verify_san"] > 0
    assert found["handshake"] == 0


def test_a_killed_worker_is_replaced(lab: Lab) -> None:
    before = {worker.pid for worker in lab.sidecar.workers()}
    victim = next(iter(before))
    os.kill(victim, signal.SIGKILL)

    def replaced() -> bool:
        now = {worker.pid for worker in lab.sidecar.workers()}
        return victim not in now and len(now) == len(before)

    wait_for(replaced, 10, "a new worker")
    wait_for(lambda: lab.chat().status_code == 200, 15, "an answer")


def test_load_reaches_every_worker_behind_the_one_port(lab: Lab) -> None:
    with ThreadPoolExecutor(64) as clients:
        statuses = list(clients.map(lambda _: lab.chat().status_code, range(256)))
    assert set(statuses) == {200}
    for worker in lab.sidecar.workers():
        assert [each for each in worker.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]


def test_sighup_reloads_the_file_and_a_bad_one_changes_nothing(lab: Lab) -> None:
    file = lab.folder / "gateway.yaml"
    good = json.loads(file.read_text())
    assert lab.chat(key=NARROW_KEY).status_code == 401

    def reload(text: str, answer: str) -> None:
        seen = lab.sidecar.log().count(f"\n{answer}")
        file.write_text(text)
        lab.sidecar.process.send_signal(signal.SIGHUP)
        wait_for(lambda: lab.sidecar.log().count(f"\n{answer}") > seen, 10, answer)

    reload(json.dumps({**good, "teams": {**good["teams"], "narrow": {**TEAMS["narrow"], "models": ["m"]}}}), "reloaded")
    assert lab.chat(key=NARROW_KEY).status_code == 200
    reload("{", "not-reloaded")
    reload(json.dumps({**good, "state": {"sql": "sqlite:///other.db"}}), "not-reloaded state.sql")
    file.unlink()
    lab.sidecar.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "No such file" in lab.sidecar.log(), 10, "a word about the missing file")
    assert lab.chat(key=NARROW_KEY).status_code == 200
    reload(json.dumps(good), "reloaded")
    assert lab.chat(key=NARROW_KEY).status_code == 401


def test_its_folder_is_its_owners_and_gone_at_the_end(tmp_path: Path) -> None:
    """On loopback TLS may be left out; nothing on standard input is no reason to end."""
    with RecordingUpstream() as upstream:
        (tmp_path / "gateway.yaml").write_text(json.dumps(sections_for(upstream)))
        port = free_port()
        with Sidecar(tmp_path, "--listen", f"127.0.0.1:{port}", "--workers", "2") as sidecar:
            (folder,) = sidecar.temporary.iterdir()
            assert folder.stat().st_mode & 0o777 == 0o700
            with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
                raw.sendall(PREFACE)
                assert raw.recv(9)[3] == 4
            sidecar.process.terminate()
            assert sidecar.process.wait(20) == 0
        assert list(sidecar.temporary.iterdir()) == []


def test_what_can_not_be_served_is_said_before_anything_starts(tmp_path: Path) -> None:
    with RecordingUpstream() as upstream:
        file = tmp_path / "gateway.yaml"
        file.write_text(json.dumps(sections_for(upstream)))
        taken = f"127.0.0.1:{upstream.port}"
        missing = [str(tmp_path / name) for name in ("no.pem", "no.key", "no-ca.pem")]
        tls = ("--tls-certificate", missing[0], "--tls-key", missing[1], "--tls-client-ca", missing[2])
        bad = tmp_path / "bad.yaml"
        bad.write_text("{listen: {prot: 1}}")
        for arguments, words in (
            ((str(file), "--listen", taken), "in use"),
            ((str(file), "--listen", f"127.0.0.1:{free_port()}", *tls), "no.pem"),
            ((str(file), "--listen", f"127.0.0.1:{free_port()}", *tls[:2]), "missing: --tls-key, --tls-client-ca"),
            ((str(file), "--listen", f"0.0.0.0:{free_port()}"), "without TLS"),
            ((str(file), "--listen", taken, "--transport", "grpc-aio", "--workers", "2"), "--workers 1"),
            ((str(bad),), "bad.yaml:1:11: listen.prot"),
        ):
            command = [sys.executable, "-m", "extproc", "serve", *arguments]
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False
            )
            assert ended.returncode == 1, ended
            assert words in ended.stderr
            assert "Traceback" not in ended.stderr
