"""The quickstart as a newcomer meets it: the file in deploy/quickstart, and README's own commands, run as written.

Only ports are changed, so that the test disturbs no gateway that is running. The surprising thing: the snippets are cut
out of README.md, so a README that no longer works fails here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.gateway import Gateway, free_port

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "deploy" / "quickstart" / "gateway.yaml"
KEY = "sk-extproc-quickstart"
PROVIDER_KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY")


def snippets(language: str, wanted: str) -> list[str]:
    """README's fenced blocks in `language` that hold the text `wanted`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if wanted in block]


def sections() -> dict[str, Any]:
    """The quickstart's file on free ports."""
    found: dict[str, Any] = YAML(typ="safe").load(QUICKSTART)
    found["listen"]["port"], found["admin"]["port"] = free_port(), free_port()
    return found


def start(folder: Path, keys: dict[str, str]) -> Iterator[Gateway]:
    with pytest.MonkeyPatch.context() as patch:
        for name in PROVIDER_KEYS:
            patch.delenv(name, raising=False)
        gateway = Gateway(folder, sections(), keys)
    with gateway:
        yield gateway


@pytest.fixture(scope="module")
def without_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The quickstart on a machine that has no provider's key."""
    yield from start(tmp_path_factory.mktemp("quickstart"), {})


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The same with both keys set, to values that no provider takes."""
    yield from start(tmp_path_factory.mktemp("keys"), dict.fromkeys(PROVIDER_KEYS, "sk-not-a-real-key"))


def models(gateway: Gateway) -> set[str]:
    request = urllib.request.Request(f"{gateway.url}/v1/models", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return {model["id"] for model in json.load(answer)["data"]}


def run(command: list[str], gateway: Gateway) -> str:
    """What a snippet prints, its ports replaced by the test gateway's. Fails when it does."""
    placed = [word.replace("127.0.0.1:10000", f"127.0.0.1:{gateway.port}") for word in command]
    done = subprocess.run(placed, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_curl_is_answered(without_keys: Gateway) -> None:
    [snippet] = snippets("bash", "curl http://127.0.0.1:10000/v1/chat/completions")
    answer = json.loads(run(["bash", "-euc", snippet], without_keys))
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["total_tokens"] > 0


def test_readme_openai_sdk_is_answered_whole_and_as_a_stream(without_keys: Gateway) -> None:
    [snippet] = snippets("python", "from openai import OpenAI")
    printed = run([sys.executable, "-c", snippet], without_keys)
    assert printed.count("extproc demo provider") == 2


def test_readme_anthropic_sdk_is_answered(without_keys: Gateway) -> None:
    [snippet] = snippets("python", "from anthropic import Anthropic")
    assert "extproc demo provider" in run([sys.executable, "-c", snippet], without_keys)


def test_readme_spend_shows_what_was_asked(without_keys: Gateway) -> None:
    [snippet] = snippets("bash", "curl http://127.0.0.1:10000/v1/chat/completions")
    run(["bash", "-euc", snippet], without_keys)
    [command] = [
        line for block in snippets("bash", "extproc spend") for line in block.splitlines() if " spend " in line
    ]
    words = command.partition("#")[0].replace("deploy/quickstart/gateway.yaml", str(without_keys.file)).split()
    words[:1] = [sys.executable, "-m", "extproc"]
    printed = ""
    for _ in range(50):  # rows are written in batches
        printed = run(words, without_keys)
        if "quickstart" in printed:
            break
    assert re.search(r"quickstart +demo +[1-9]", printed), printed


def test_quickstart_serves_only_the_demo_without_keys(without_keys: Gateway) -> None:
    assert models(without_keys) == {"demo", "demo-embedding"}


def test_provider_keys_in_the_environment_bring_their_models(with_keys: Gateway) -> None:
    assert {"demo", "gpt-5.1", "claude-sonnet-4-5"} <= models(with_keys)
    assert "gpt-* (openai)" in with_keys.log()


def test_screen_says_what_to_type_next(without_keys: Gateway) -> None:
    log = without_keys.log()
    for wanted in ("curl http", "from openai import OpenAI", "from anthropic import Anthropic", KEY):
        assert wanted in log
