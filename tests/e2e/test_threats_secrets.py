"""Where secrets are, and that they are nowhere else: files, logs, dumps, process lists, environments, answers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.raw_http import Answer
from tests.e2e.threats import (
    ALPHA_SECRET,
    BETA_SECRET,
    BODY,
    CHAT,
    MESSAGES,
    World,
    bare,
    bearer,
    code_of,
    post,
    running,
)
from tests.gateway import KEY, NARROW_KEY, Gateway, config, digest
from tests.upstream import RecordingUpstream, Reply

pytestmark = pytest.mark.e2e

FILE_SECRET = "file-secret-91c4"
SECRETS = [ALPHA_SECRET, BETA_SECRET, FILE_SECRET, KEY, NARROW_KEY]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("secrets")) as world:
        yield world


@pytest.fixture
def world(started: World) -> World:
    started.forget()
    return started


def holds_secret(text: bytes) -> list[str]:
    return [secret for secret in SECRETS if secret.encode() in text]


def tree(gateway: Gateway) -> list[int]:
    """The gateway's process and all below it."""
    found = [gateway.pid]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += (int(child) for child in task.read_text().split())
    return found


def command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def envoy_of(gateway: Gateway) -> int:
    (pid,) = [pid for pid in tree(gateway) if command(pid)[0].endswith("/envoy")]
    return pid


def run_dir(gateway: Gateway) -> Path:
    """The folder of sockets and secret files, as Envoy's command line tells it."""
    words = command(envoy_of(gateway))
    return Path(words[words.index("-c") + 1]).parent


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("envoy", timeout=10)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def envoy_admin(gateway: Gateway, path: str) -> bytes:
    (admin,) = run_dir(gateway).rglob("*admin*.sock")
    assert stat.S_IMODE(admin.stat().st_mode) == 0o600
    connection = UnixConnection(admin)
    connection.request("GET", path)
    return connection.getresponse().read()


def traffic(world: World) -> list[Answer]:
    """Requests of every fate, so that whatever logs has had something to log."""
    world.alpha.behave(Reply(status=401, body=f'{{"error":"bad key {ALPHA_SECRET}"}}'.encode()), times=1)
    raws = [
        post(),
        post(),
        post(CHAT, BODY, auth=[bearer("garbage")]),
        post(CHAT, b"{"),
        post(MESSAGES),
        bare("/", bearer()),
    ]
    raws += [post(f"{CHAT}?key={KEY}"), bare("/v1/models", bearer())]
    raws += [post(CHAT, BODY.replace(b"demo", b"failing-over"))]
    with world.rows(len(raws)):
        return [world.send(raw) for raw in raws]


def test_secrets_are_in_no_answer_log_ledger_or_metric(world: World) -> None:
    answers = traffic(world)
    assert [answer.status for answer in answers][:6] == [502, 200, 401, 400, 200, 404]
    for answer in answers:
        assert not holds_secret(repr(answer.headers).encode() + answer.body.replace(KEY.encode(), b"")), answer
    gateway = world.gateway
    assert not holds_secret(gateway.log().encode())
    for file in gateway.folder.glob("ledger.db*"):
        text = file.read_bytes()
        assert not [secret for secret in (ALPHA_SECRET, BETA_SECRET, NARROW_KEY) if secret.encode() in text], file
    assert all(row["key_id"] in (None, "search-all") for row in gateway.rows())


def test_envoys_dumps_hold_no_secret(world: World) -> None:
    traffic(world)
    dump = envoy_admin(world.gateway, "/config_dump?include_eds")
    assert len(json.loads(dump)["configs"]) > 3
    for path in ("/config_dump?include_eds", "/server_info", "/clusters?format=json", "/stats", "/listeners", "/certs"):
        assert not holds_secret(envoy_admin(world.gateway, path)), path


def test_only_secret_files_hold_secrets_and_only_their_owner_reads_them(world: World) -> None:
    holding = []
    for file in run_dir(world.gateway).rglob("*"):
        if file.is_file() and holds_secret(file.read_bytes()):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
            assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700, file
            holding.append(file.name)
    assert sorted(holding) == ["alpha.json", "beta.json", "claude.json"]
    assert stat.S_IMODE(run_dir(world.gateway).stat().st_mode) == 0o700


def test_no_command_line_and_no_childs_environment_holds_a_secret(world: World) -> None:
    processes = tree(world.gateway)
    assert len(processes) >= 3
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = file.read_bytes()
        except OSError:
            continue
        assert not holds_secret(text), text
    for pid in processes[1:]:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert environ
        assert not holds_secret(environ), command(pid)
    assert ALPHA_SECRET.encode() in Path(f"/proc/{processes[0]}/environ").read_bytes()


def test_rendered_files_and_checks_hold_no_secret(world: World) -> None:
    environ = {**os.environ, "PROVIDER_KEY": ALPHA_SECRET, "BETA_KEY": BETA_SECRET}
    for name in ("render", "check"):
        words = [sys.executable, "-m", "extproc", name, str(world.gateway.file)]
        done = subprocess.run(words, capture_output=True, env=environ, check=True, timeout=60)
        assert done.stdout
        assert not holds_secret(done.stdout + done.stderr), name


ECHO = json.dumps(
    {"error": {"message": f"Incorrect API key provided: {ALPHA_SECRET}", "code": "invalid_api_key"}}
).encode()
ECHOING = (("www-authenticate", f"Bearer {ALPHA_SECRET}"), ("x-debug", "none"))


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    ("status", "code"), [(401, "provider_auth"), (403, "provider_auth"), (500, "all_targets_failed")]
)
def test_a_providers_answer_that_repeats_the_key_does_not_pass(world: World, path: str, status: int, code: str) -> None:
    world.alpha.behave(Reply(status=status, body=ECHO, headers=ECHOING))
    with world.rows(1):
        answer = world.send(post(path))
    assert (answer.status, code_of(answer)) == (502 if code == "provider_auth" else 503, code)
    assert not holds_secret(repr(answer.headers).encode() + answer.body)
    world.assert_row("", answer.header("x-request-id"), code=code, outcome="failed", attempts=1)


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 451])
def test_a_providers_own_error_passes_without_our_key(world: World, status: int) -> None:
    echo = Reply(status=status, body=ECHO + ALPHA_SECRET.encode() * 2, headers=ECHOING)
    world.alpha.behave(echo, where=lambda seen: seen.json["model"] == "demo")
    world.alpha.behave(Reply(status=status, body=ECHO.replace(ALPHA_SECRET.encode(), b"sk-...x")))
    with world.rows(2):
        answer = world.send(post())
        benign = world.send(post(CHAT, BODY.replace(b"demo", b"narrow")))
    assert (answer.status, benign.status) == (status, status)
    assert answer.body == (ECHO + ALPHA_SECRET.encode() * 2).replace(ALPHA_SECRET.encode(), b"[withheld]")
    assert benign.body == ECHO.replace(ALPHA_SECRET.encode(), b"sk-...x")
    assert (answer.header("www-authenticate"), answer.header("x-debug")) == (None, "none")


def test_a_large_error_in_pieces_passes_without_our_key(world: World) -> None:
    page = b"x" * 100_000 + ALPHA_SECRET.encode() + b"y" * 100_000
    world.alpha.behave(Reply(status=400, body=page, chunk_bytes=1001))
    with world.rows(1):
        answer = world.send(post())
    assert (answer.status, answer.body) == (400, page.replace(ALPHA_SECRET.encode(), b"[withheld]"))


def test_an_error_too_large_to_be_read_does_not_pass(world: World) -> None:
    world.alpha.behave(Reply(status=400, body=b"x" * 3_000_000 + ALPHA_SECRET.encode()))
    with world.rows(1):
        answer = world.send(post())
    assert (answer.status, code_of(answer)) == (503, "all_targets_failed")


def test_secret_files_are_gone_when_the_gateway_has_ended(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ending")
    (folder / "secret.txt").write_text(FILE_SECRET + "\n")
    with RecordingUpstream() as upstream:
        providers = {"filed": {"kind": "openai", "endpoint": f"{upstream.url}/v1", "api_key": {"file": "secret.txt"}}}
        models = {name: {"targets": [{"provider": "filed"}]} for name in ("demo", "narrow")}
        teams = {"one": {"models": ["*"], "keys": [{"id": "k", "sha256": digest(KEY)}]}}
        with Gateway(folder, config(providers=providers, models=models, teams=teams)) as gateway:
            world = World(gateway, upstream, upstream)
            assert world.send(post()).status == 200
            where = run_dir(gateway)
            (secret,) = where.rglob("filed.json")
            assert FILE_SECRET in secret.read_text()
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600
            for pid in tree(gateway):
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                assert FILE_SECRET.encode() not in environ + "\0".join(command(pid)).encode()
            assert gateway.end(signal.SIGTERM) == 0
        assert not where.exists()
        assert FILE_SECRET not in gateway.log()
        (seen,) = upstream.requests
        assert seen.header("authorization") == f"Bearer {FILE_SECRET}"
