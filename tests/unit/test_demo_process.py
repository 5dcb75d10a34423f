"""The demo provider as the supervisor runs it: a child process on a Unix socket that ends on SIGTERM."""

from __future__ import annotations

import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from extproc.demo.server import serve_demo

DEADLINE_S = 20.0
PROMPT = "a-very-private-prompt"


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    socket = tmp_path / "demo.sock"
    command = [sys.executable, "-m", "extproc.demo", "--socket", str(socket), "--token-delay-ms", "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        yield process, socket
        process.kill()


def client(socket: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://demo", timeout=DEADLINE_S)


def test_it_serves_on_its_socket_ends_on_sigterm_and_logs_nothing(demo: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, socket = demo
    with client(socket) as http:
        answered = http.post(
            "/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
        )
        assert PROMPT in answered.json()["choices"][0]["message"]["content"]
        broken = http.post("/v1/chat/completions", content=PROMPT)
        assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    process.terminate()
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, output, socket.exists()) == (0, b"", False)


def test_an_open_stream_is_paced_and_ends_before_the_process(demo: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, socket = demo
    body = {"model": "m", "max_tokens": 20, "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    begun = time.monotonic()
    with client(socket) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert time.monotonic() - begun > 20 * 0.02
    assert process.wait(DEADLINE_S) == 0


async def test_a_bug_is_a_503_that_names_its_place_and_quotes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(text: str) -> list[str]:
        raise RuntimeError(text)

    runner = await serve_demo(token_delay_s=0, split=broken)
    body = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
    host, port = runner.addresses[0][:2]
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
        answer = await http.post("/v1/chat/completions", json=body)
    await runner.cleanup()
    assert answer.status_code == 503
    assert "RuntimeError in broken" in answer.json()["error"]["message"]
    assert PROMPT not in answer.text + caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status", "anthropic"),
    [
        ("GET", "/v1/nowhere", 404, False),
        ("GET", "/v1/chat/completions", 405, False),
        ("GET", "/v1/messages", 405, True),
        ("POST", "/v1/messages", 400, True),
    ],
)
def test_errors_have_the_shape_of_their_dialect(
    demo: tuple[subprocess.Popen[bytes], Path], method: str, path: str, status: int, anthropic: bool
) -> None:
    with client(demo[1]) as http:
        answer = http.request(method, path, headers={"x-request-id": "req-1"})
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("application/json")
    assert (answer.json().get("type") == "error") == anthropic
    assert "req-1" in answer.text
