"""Paths and methods: each request has one path, judged and sent upstream alike, or is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.threats import BODY, CHAT, MESSAGES, World, bare, bearer, post, running
from tests.gateway import NARROW_KEY

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("paths")) as world:
        yield world


@pytest.fixture
def world(started: World) -> World:
    started.forget()
    return started


SAME_PATH = [
    "/v1/chat/completions",
    "//v1/chat/completions",
    "///v1//chat///completions",
    "/v1/./chat/completions",
    "/./v1/chat/completions",
    "/v1/../v1/chat/completions",
    "/../v1/chat/completions",
    "/v1/files/../chat/completions",
    "/v1/%2e%2e/v1/chat/completions",
    "/v1/%2E/chat/completions",
    "/v1/files/.%2e/chat/completions",
    "/v1/%63hat/completions",
    "/v1\\chat\\completions",
    "http://other.example/v1/chat/completions",
    "http://other.example//v1/./chat/completions",
]


def test_spellings_of_one_path_meet_the_same_policy_and_go_upstream_as_that_path(world: World) -> None:
    for seen in world.deliver({path: post(path) for path in SAME_PATH}):
        assert seen.target == CHAT
    narrow = {path: post(path, BODY.replace(b"demo", b"renamed"), auth=[bearer(NARROW_KEY)]) for path in SAME_PATH}
    world.refuse(narrow, 403, "model_not_allowed")


TWO_READINGS = [
    "/v1%2Fchat/completions",
    "/v1/chat%2fcompletions",
    "/v1%5Cchat/completions",
    "/v1/files/..%2fchat/completions",
    "/v1/chat/completions%00",
    "/v1/chat/completions#fragment",
    "/v1/files/x?y#z",
    "/v1/files/é",
    "/v1/files?purpose=é",
    "/v1/chat/completions?a b",
    "/v1/chat/completions?\x01",
    "v1/chat/completions",
    "*",
    "",
    "\\v1\\chat\\completions",
]


def test_a_path_with_two_readings_is_refused(world: World) -> None:
    cases = {f"POST {path}": post(path) for path in TWO_READINGS}
    cases |= {f"GET {path}": post(path, b"", method="GET") for path in TWO_READINGS}
    world.refuse(cases, 400, "invalid_request")


NOT_FOUND = [
    "/v1/chat/completions;x",
    "/v1/chat;x=y/completions",
    "/V1/chat/completions",
    "/v1/Chat/Completions",
    "/v1/chat/completions/",
    "/v1/chat/completions//",
    "/v1/chat/completions%20",
    "/v1/chat/completions%3f",
    "/v1/chat/completions%3Fx",
    "/v1/chat/completions%23",
    "/v1/chat/completions%0d%0ax:y",
    "/v1/chat/completions.",
    "/v1/chat%252fcompletions",
    "/v2/chat/completions",
    "/v1/v1/chat/completions",
    "/chat/completions",
    "/v1/files/a;b",
    "/v1/files/a%3Bb",
    "/v1/files/%252e%252e/chat/completions",
    "/v1/files/%zz",
    "/v1/files/",
    "/v1/engines/demo/completions",
    "/openai/v1/chat/completions",
    "/" + "a" * 30_000,
]


def test_a_path_beside_the_table_is_not_found(world: World) -> None:
    cases = {f"POST {path[:80]}": post(path) for path in NOT_FOUND}
    cases |= {f"GET {path[:80]}": post(path, b"", method="GET") for path in NOT_FOUND}
    world.refuse(cases, 404, "unknown_path")


def test_a_path_too_long_for_a_header_is_refused(world: World) -> None:
    world.refuse({"": post("/" + "a" * 70_000)}, 431, "invalid_request")


def test_a_query_goes_upstream_as_it_came(world: World) -> None:
    queries = ["?a=b?c", "?../../x", "?api-version=2025-01-01&x=%2F%2e", "?", "?a=//b/../c", "?%00=;"]
    for query, seen in zip(queries, world.deliver({query: post(CHAT + query) for query in queries}), strict=True):
        assert seen.target == CHAT + query
    (stored,) = world.deliver({"": bare("/v1/files?limit=2&after=file-1", bearer())})
    assert stored.target == "/v1/files?limit=2&after=file-1"


def test_a_named_endpoint_takes_no_other_method(world: World) -> None:
    methods = ("OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "PROPFIND")
    cases = {f"{method} {path}": post(path, method=method) for method in methods for path in (CHAT, MESSAGES)}
    world.refuse(cases, 405, "method_not_allowed")


def test_what_is_no_method_is_refused(world: World) -> None:
    methods = ("post", "Post", "FOO", "", "GET POST")
    world.refuse({method: post(method=method) for method in methods}, 400, "invalid_request")


def test_connect_opens_no_tunnel(world: World) -> None:
    connections = world.alpha.connections
    authority = f"127.0.0.1:{world.alpha.port}"
    with_host = {"key": [("host", authority), bearer()], "none": [("host", authority)]}
    raw = {name: b"CONNECT %b HTTP/1.1\r\n" % authority.encode() for name in with_host}
    for name, headers in with_host.items():
        raw[name] += "".join(f"{key}: {value}\r\n" for key, value in headers).encode() + b"\r\n"
    world.refuse({"none": raw["none"]}, 401, "missing_api_key")
    world.refuse({"key": raw["key"]}, 404, "unknown_path")
    assert world.alpha.connections == connections


def test_head_reads_what_get_reads_and_nothing_else(world: World) -> None:
    world.refuse({"models": bare("/v1/models", bearer(), method="HEAD")}, 405, "method_not_allowed", method="HEAD")
    (seen,) = world.deliver({"files": bare("/v1/files", bearer(), method="HEAD")}, method="HEAD")
    assert (seen.method, seen.target) == ("HEAD", "/v1/files")
