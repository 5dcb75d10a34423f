"""Who may ask, and whose credentials go where: through a real Envoy, against providers that record every byte."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.raw_http import exchange_http2
from tests.e2e.threats import (
    ALPHA_SECRET,
    BETA_SECRET,
    BODY,
    CHAT,
    JSON,
    MESSAGES,
    World,
    bare,
    bearer,
    code_of,
    post,
    running,
)
from tests.gateway import KEY, NARROW_KEY
from tests.upstream import Recorded, Reply

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("credentials")) as world:
        yield world


@pytest.fixture
def world(started: World) -> World:
    started.forget()
    return started


PATHS = [
    "/",
    "/v1",
    "/v1/models",
    "/v1/models/demo",
    CHAT,
    MESSAGES,
    "/v1/files",
    "/v1/unknown",
    "/healthz",
    "/metrics",
]
PATHS += ["/readyz", "/favicon.ico", "/.env", "/v1/responses/resp_1", "/v1/chat", "/V1/MODELS", "/v1/models/", "/x?y=z"]


def test_every_path_needs_a_key_before_it_exists(world: World) -> None:
    gets = {path: bare(path) for path in PATHS}
    posts = {path: post(path, auth=[]) for path in PATHS}
    world.refuse(gets, 401, "missing_api_key")
    world.refuse(posts, 401, "missing_api_key")


def test_a_garbage_token_opens_no_path(world: World) -> None:
    garbage = [bearer("garbage"), ("x-api-key", "garbage"), ("authorization", "garbage")]
    for header in garbage:
        world.refuse({path: bare(path, header) for path in PATHS}, 401, "invalid_api_key")


def test_every_method_needs_a_key(world: World) -> None:
    methods = ("OPTIONS", "TRACE", "DELETE", "PUT", "PATCH", "PROPFIND")
    cases = {f"{method} {path}": bare(path, method=method) for method in methods for path in PATHS}
    world.refuse(cases, 401, "missing_api_key")
    world.refuse({path: bare(path, method="HEAD") for path in PATHS}, 401, "missing_api_key", method="HEAD")


def test_a_good_key_sees_what_is_there_and_what_is_not(world: World) -> None:
    with world.rows(1):
        assert world.send(bare("/v1/models", bearer())).status == 200
    world.refuse({path: bare(path, bearer()) for path in ("/", "/v1", "/healthz", "/V1/MODELS")}, 404, "unknown_path")


def test_the_scheme_is_read_in_any_case(world: World) -> None:
    schemes = ("Bearer ", "bearer ", "BEARER ", "bEaReR   ")
    world.deliver({scheme: post(auth=[("authorization", scheme + KEY)]) for scheme in schemes})
    world.deliver({"x-api-key": post(auth=[("X-API-Key", KEY)])})


def test_a_key_in_a_query_or_a_cookie_or_another_header_is_none(world: World) -> None:
    headers = [("cookie", f"authorization=Bearer {KEY}; x-api-key={KEY}"), ("api-key", KEY), ("x-goog-api-key", KEY)]
    headers += [("proxy-authorization", f"Bearer {KEY}"), ("x_api_key", KEY), ("x-extproc-key", KEY), ("token", KEY)]
    cases = {name: post(auth=[(name, value)]) for name, value in headers}
    cases |= {
        query: post(f"{CHAT}?{query}={KEY}", auth=[]) for query in ("api_key", "key", "x-api-key", "access_token")
    }
    world.refuse(cases, 401, "missing_api_key")


def test_two_credentials_are_refused_and_the_same_twice_passes(world: World) -> None:
    other = [bearer("garbage"), bearer(NARROW_KEY), ("authorization", f"Basic {KEY}")]
    cases = {f"{header} beside x-api-key": post(auth=[header, ("x-api-key", KEY)]) for header in other[:2]}
    cases["key beside garbage"] = post(auth=[bearer(), ("x-api-key", "garbage")])
    cases |= {f"{header} and a second": post(auth=[bearer(), header]) for header in (bearer(), *other)}
    cases |= {f"{header} and a second, first": post(auth=[header, bearer()]) for header in other[:2]}
    cases["x-api-key twice"] = post(auth=[("x-api-key", KEY), ("x-api-key", KEY)])
    world.refuse(cases, 401, "conflicting_credentials")
    world.deliver({"same key twice": post(auth=[bearer(), ("x-api-key", KEY)])})


def test_two_authorization_headers_are_refused_over_http2_too(world: World) -> None:
    pseudo = [(":method", "POST"), (":path", CHAT), (":scheme", "http"), (":authority", "gateway.test"), JSON]
    for second in (KEY, "garbage", NARROW_KEY):
        with world.rows(1):
            answer = exchange_http2(world.gateway.port, [*pseudo, bearer(), bearer(second)], BODY)
        assert (answer.status, code_of(answer)) == (401, "conflicting_credentials")
        world.assert_untouched()
    with world.rows(1):
        assert exchange_http2(world.gateway.port, [*pseudo, bearer()], BODY).status == 200
    assert len(world.alpha.requests) == 1


CLIENT_HEADERS = [
    ("api-key", KEY),
    ("x-goog-api-key", KEY),
    ("proxy-authorization", f"Bearer {KEY}"),
    ("cookie", f"session={KEY}"),
    ("x-extproc-provider", "beta"),
    ("x-extproc-idle-ms", "300000"),
    ("x-envoy-max-retries", "9"),
    ("x-envoy-original-host", "client.example"),
    ("x-alpha", f"from the client {KEY}"),
]
NEVER_UPSTREAM = ("api-key", "x-goog-api-key", "proxy-authorization", "cookie")


def assert_clean(seen: Recorded, credential: str | None) -> None:
    """Of credentials the provider got its own, and nothing else that is not its business."""
    assert KEY.encode() not in seen.raw_head
    names = [name.lower() for name, _ in seen.headers]
    assert not [name for name in names if name.startswith(("x-envoy-", "x-extproc-")) or name in NEVER_UPSTREAM]
    credentials = [*seen.values("authorization"), *seen.values("x-api-key")]
    assert credentials == ([] if credential is None else [credential])


@pytest.mark.parametrize("auth", [[bearer()], [("x-api-key", KEY)], [bearer(), ("x-api-key", KEY)]])
@pytest.mark.parametrize("model", [b"demo", b"renamed"])
def test_the_clients_credentials_never_go_upstream(world: World, auth: list[tuple[str, str]], model: bytes) -> None:
    (seen,) = world.deliver({"": post(CHAT, BODY.replace(b"demo", model), *CLIENT_HEADERS, auth=auth)})
    assert_clean(seen, f"Bearer {ALPHA_SECRET}")
    assert seen.values("x-alpha") == ["for alpha alone"]


def test_anthropics_provider_gets_its_own_key_alone(world: World) -> None:
    (seen,) = world.deliver({"": post(MESSAGES, BODY, *CLIENT_HEADERS, ("anthropic-version", "2023-06-01"))})
    assert_clean(seen, ALPHA_SECRET)
    assert seen.header("anthropic-version") == "2023-06-01"
    assert seen.header("x-alpha") is None


@pytest.mark.parametrize(
    ("model", "credential"),
    [("failing-over", f"Bearer {BETA_SECRET}"), ("adapted", f"Bearer {BETA_SECRET}"), ("failing-over-open", None)],
)
def test_the_second_provider_sees_nothing_of_the_first(world: World, model: str, credential: str | None) -> None:
    world.alpha.behave(Reply(status=500))
    with world.rows(1):
        answer = world.send(post(CHAT, BODY.replace(b"demo", model.encode()), *CLIENT_HEADERS))
    assert answer.status == 200
    world.assert_row(model, answer.header("x-request-id"), status=200, attempts=2, outcome="ok")
    (first,), (second,) = world.alpha.requests, world.beta.requests
    assert_clean(first, f"Bearer {ALPHA_SECRET}")
    assert_clean(second, credential)
    assert second.header("x-alpha") is None
    assert ALPHA_SECRET.encode() not in second.raw_head
    assert second.header("host") == f"127.0.0.1:{world.beta.port}"
    assert second.json["model"] == ("second-name" if model == "adapted" else model)


def test_a_key_reaches_its_own_models_alone(world: World) -> None:
    mine = [bearer(NARROW_KEY)]
    others = ("renamed", "failing-over", "any/thing")
    cases = {name: post(CHAT, BODY.replace(b"demo", name.encode()), auth=mine) for name in others}
    world.refuse(cases, 403, "model_not_allowed")
    world.refuse({"unknown": post(CHAT, BODY.replace(b"demo", b"unknown"), auth=mine)}, 404, "model_not_found")
    world.deliver({"own": post(CHAT, BODY.replace(b"demo", b"narrow"), auth=mine)})


def test_endpoints_that_name_no_model_need_a_key_for_all(world: World) -> None:
    paths = ("/v1/files", "/v1/batches", "/v1/responses/resp_1", "/v1/fine_tuning/jobs", "/v1/chat/completions/c_1")
    mine = {path: bare(path, bearer(NARROW_KEY)) for path in paths}
    world.refuse(mine, 403, "model_not_allowed")
    world.refuse(
        {"batch": post("/v1/batches", b'{"input_file_id":"f"}', auth=[bearer(NARROW_KEY)])}, 403, "model_not_allowed"
    )
    for seen in world.deliver({path: bare(path, bearer()) for path in paths}):
        assert_clean(seen, f"Bearer {ALPHA_SECRET}")
