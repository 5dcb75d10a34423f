"""Rendered Envoy configurations: compared with golden files, and each given to Envoy itself to validate.

The surprising thing: golden files hold `<lua/...>` where a Lua script stands, so that a change of a script is one diff
and not one for each cluster. Envoy validates the whole text. `--update-golden` rewrites them.
"""

from __future__ import annotations

import json
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import certifi
import pytest

from extproc.config.schema import json_schema
from extproc.config.snapshot import Snapshot
from extproc.config.source import format_problems, parse
from extproc.render.bootstrap import render, secret_files
from extproc.render.clusters import script
from extproc.render.deployment import Deployment
from extproc.render.files import envoy_files

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "render"
ENVOY = Path(sysconfig.get_paths()["purelib"]) / "envoy" / "_bin" / "envoy"
QUICKSTART = ROOT / "deploy" / "quickstart" / "gateway.yaml"
WHERE_IT_STANDS = Path("/etc/extproc/gateway.yaml")
PRODUCTION = Deployment(PurePosixPath("/run/extproc"), PurePosixPath("/etc/ssl/certs/ca-certificates.crt"))
SECRET = "sk-live-4f1c"
SCRIPTS = ("answer.lua", "attempt.lua")


@dataclass(frozen=True)
class Case:
    """A file to render, the variables that are set, and how many workers it runs."""

    file: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1

    def snapshot(self, folder: Path = WHERE_IT_STANDS.parent) -> Snapshot:
        """Compiled as if the file stood in `folder`, so that golden files hold no path of this machine."""
        found = parse(self.file.read_bytes(), path=folder / "gateway.yaml", environ=self.environ, require_secrets=False)
        assert isinstance(found, Snapshot), format_problems(found)
        return found

    def deployment(self, run_dir: PurePosixPath, ca_bundle: PurePosixPath) -> Deployment:
        return Deployment(run_dir, ca_bundle, self.workers)


CASES = {
    "quickstart-without-keys": Case(QUICKSTART),
    "quickstart-with-keys": Case(QUICKSTART, {"OPENAI_API_KEY": SECRET, "ANTHROPIC_API_KEY": SECRET}),
    "failover": Case(GOLDEN / "failover" / "gateway.yaml", workers=3),
    "private-ca": Case(GOLDEN / "private-ca" / "gateway.yaml"),
    "timeouts": Case(GOLDEN / "timeouts" / "gateway.yaml"),
    "odd-names": Case(GOLDEN / "odd-names" / "gateway.yaml"),
}
EXAMPLES = {
    "quickstart.json": Case(QUICKSTART, {"OPENAI_API_KEY": SECRET, "ANTHROPIC_API_KEY": SECRET}),
    "failover.json": Case(ROOT / "envoy" / "failover.yaml"),
}


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_is_rendered_as_its_golden_file_says(name: str, update: bool) -> None:
    case = CASES[name]
    text = without_scripts(render(case.snapshot(), case.deployment(PRODUCTION.run_dir, PRODUCTION.ca_bundle)))
    matches(GOLDEN / name / "envoy.json", text, update=update)


def test_every_golden_file_has_a_case(update: bool) -> None:
    expected = {GOLDEN / name / "envoy.json" for name in CASES}
    expected |= {case.file for case in CASES.values() if case.file.is_relative_to(GOLDEN)}
    found = {path for path in GOLDEN.rglob("*") if path.is_file()}
    if update:
        for path in found - expected:
            path.unlink()
        found &= expected
    assert found == expected


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_for_operators_are_what_render_prints(name: str, update: bool) -> None:
    matches(ROOT / "envoy" / name, render(EXAMPLES[name].snapshot(), PRODUCTION), update=update)


def test_the_published_json_schema_is_what_the_program_checks_with(update: bool) -> None:
    text = json.dumps(json_schema(), indent=2) + "\n"
    matches(ROOT / "docs" / "gateway.schema.json", text, update=update)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *EXAMPLES])
def test_envoy_takes_the_configuration_and_the_files_that_a_running_one_watches(name: str, tmp_path: Path) -> None:
    case = CASES.get(name) or EXAMPLES[name]
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "ca.pem").write_bytes(Path(certifi.where()).read_bytes())
    deployment = case.deployment(PurePosixPath(tmp_path), PurePosixPath(certifi.where()))
    snapshot = case.snapshot(tmp_path)
    write_files(snapshot, deployment)
    whole = tmp_path / "whole.json"
    whole.write_text(render(snapshot, deployment))
    assert_valid(whole)
    files = envoy_files(snapshot, deployment)
    for path, text in (
        (deployment.clusters_file, files.clusters.text),
        (deployment.routes_file, files.routes.text),
        (deployment.listeners_file, files.listeners.text),
        (deployment.run_dir / "split.json", files.bootstrap),
    ):
        Path(path).write_text(text)
    assert_valid(tmp_path / "split.json")


def test_envoy_refuses_what_is_no_configuration(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(render(CASES["failover"].snapshot(), PRODUCTION).replace('"lb_policy"', '"lb_polcy"'))
    with pytest.raises(AssertionError, match="lb_polcy"):
        assert_valid(broken)


@pytest.mark.parametrize("name", CASES)
def test_the_files_that_a_running_envoy_watches_say_what_render_prints(name: str) -> None:
    snapshot = CASES[name].snapshot()
    whole = json.loads(render(snapshot, PRODUCTION))["static_resources"]
    files = envoy_files(snapshot, PRODUCTION)
    split = json.loads(files.bootstrap)["static_resources"]["clusters"] + _resources(files.clusters.text)
    assert {each["name"]: each for each in split} == {each["name"]: each for each in whole["clusters"]}
    (routes,) = _resources(files.routes.text)
    (gateway,) = _resources(files.listeners.text)
    (expected,) = whole["listeners"]
    manager = _manager(expected)
    assert routes == manager.pop("route_config")
    assert _manager(gateway).pop("rds")["route_config_name"] == routes["name"]
    assert gateway == expected


@pytest.mark.parametrize("name", CASES)
def test_rendering_is_the_same_each_time_and_holds_no_secret(name: str) -> None:
    snapshot = CASES[name].snapshot()
    first = render(snapshot, PRODUCTION)
    assert first == render(CASES[name].snapshot(), PRODUCTION)
    assert SECRET not in first


def test_secrets_stand_in_files_of_their_own_named_after_their_providers() -> None:
    snapshot = CASES["quickstart-with-keys"].snapshot()
    files = secret_files(snapshot, PRODUCTION, {"openai": SECRET, "anthropic": SECRET})
    values = {
        path: resource["generic_secret"]["secret"]["inline_string"]
        for path, text in files.items()
        for resource in json.loads(text)["resources"]
    }
    assert values == {
        "/run/extproc/secrets/openai.json": f"Bearer {SECRET}",
        "/run/extproc/secrets/anthropic.json": SECRET,
    }


def test_providers_with_the_same_secret_share_a_file() -> None:
    """Envoy watches each file with an inotify instance, and a user has 128 of them by default."""
    document = {
        "providers": {
            name: {"kind": "openai", "endpoint": f"http://127.0.0.1:{port}/v1", "api_key": {"env": variable}}
            for name, port, variable in (("one", 1, "SHARED"), ("two", 2, "SHARED"), ("three", 3, "OWN"))
        }
    }
    environ = {"SHARED": SECRET, "OWN": "another"}
    snapshot = parse(json.dumps(document).encode(), path=Path("gateway.yaml"), environ=environ, require_secrets=True)
    assert isinstance(snapshot, Snapshot)
    files = secret_files(snapshot, PRODUCTION, {"one": SECRET, "two": SECRET, "three": "another"})
    assert sorted(files) == ["/run/extproc/secrets/one.json", "/run/extproc/secrets/three.json"]
    assert "secrets/two.json" not in render(snapshot, PRODUCTION)


def matches(golden: Path, text: str, *, update: bool) -> None:
    """Compare, or with `update` rewrite. A file that is missing is a difference."""
    if update:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == text, f"{golden.name} differs; --update-golden rewrites it"


def without_scripts(text: str) -> str:
    """Scripts give way to their names; the constants that stand above one stay."""
    for name in SCRIPTS:
        quoted = json.dumps(script(name), ensure_ascii=False)[1:-1]
        assert quoted in text
        text = text.replace(quoted, f"<lua/{name}>")
    return text


def write_files(snapshot: Snapshot, deployment: Deployment) -> None:
    """What Envoy looks for as soon as it reads its configuration."""
    Path(deployment.secrets_dir).mkdir()
    Path(deployment.config_dir).mkdir()
    secrets = {provider.name: SECRET for provider in snapshot.providers.values() if provider.secret is not None}
    for path, content in secret_files(snapshot, deployment, secrets).items():
        Path(path).write_text(content)


def assert_valid(config: Path) -> None:
    """Envoy's own verdict; an unknown field or a value out of bounds is an error."""
    command = (str(ENVOY), "--mode", "validate", "-c", str(config), "--log-level", "warning")
    verdict = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert verdict.returncode == 0, verdict.stderr
    assert "OK" in verdict.stdout


def _resources(text: str) -> list[dict[str, object]]:
    return [
        {name: value for name, value in resource.items() if name != "@type"}
        for resource in json.loads(text)["resources"]
    ]


def _manager(listener: dict[str, object]) -> dict[str, dict[str, object]]:
    """The HTTP connection manager of a listener, as it stands in it."""
    chains: list[dict[str, list[dict[str, dict[str, dict[str, object]]]]]] = listener["filter_chains"]  # type: ignore[assignment]
    return chains[0]["filters"][0]["typed_config"]
