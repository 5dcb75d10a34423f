"""Headers that a client has no business to send, and headers that no client should get."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.raw_http import request_bytes
from tests.e2e.threats import BODY, CHAT, JSON, World, bearer, length, post, running
from tests.upstream import Reply

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("headers")) as world:
        yield world


@pytest.fixture
def world(started: World) -> World:
    started.forget()
    return started


INTERNAL = [
    ("x-extproc-idle-ms", "300000"),
    ("x-extproc-provider", "beta"),
    ("x-extproc-model", "other"),
    ("x-extproc-mended", "now"),
    ("X-Extproc-Team", "admins"),
    ("x-envoy-max-retries", "7"),
    ("x-envoy-retry-on", "retriable-4xx"),
    ("x-envoy-attempt-count", "9"),
    ("x-envoy-upstream-rq-timeout-ms", "1"),
    ("x-envoy-upstream-rq-per-try-timeout-ms", "1"),
    ("x-envoy-original-path", "/v1/other"),
    ("x-envoy-original-host", "evil.example"),
    ("x-envoy-decorator-operation", "other"),
    ("x-envoy-force-trace", "true"),
    ("x-envoy-internal", "true"),
    ("x-envoy-external-address", "10.0.0.1"),
    ("x-forwarded-for", "10.0.0.1"),
    ("x-forwarded-host", "evil.example"),
    ("x-forwarded-proto", "https"),
    ("x-forwarded-client-cert", "By=spiffe://cluster/admin"),
    ("forwarded", "for=10.0.0.1;host=evil.example"),
    ("via", "1.1 evil.example"),
    ("te", "trailers"),
]


def test_internal_headers_of_a_client_change_nothing_and_go_nowhere(world: World) -> None:
    (plain,) = world.deliver({"plain": post()})
    (spoofed,) = world.deliver({"spoofed": post(CHAT, BODY, *INTERNAL)})
    assert spoofed.raw_head == plain.raw_head
    for name, value in INTERNAL:
        (one,) = world.deliver({name: post(CHAT, BODY, (name, value), (name, value))})
        assert one.raw_head == plain.raw_head, name


def test_harmless_headers_pass(world: World) -> None:
    headers = [("openai-beta", "assistants=v2"), ("user-agent", "x/1"), ("x-stainless-lang", "python")]
    headers += [("idempotency-key", "k-1"), ("x-real-ip", "192.0.2.1"), ("accept", "application/json")]
    (seen,) = world.deliver({"": post(CHAT, BODY, *headers)})
    assert [pair for pair in seen.headers if pair[0] in dict(headers)] == headers


def test_the_mark_of_a_decision_opens_no_route(world: World) -> None:
    marks = [("x-extproc-idle-ms", str(ms)) for ms in (10000, 60000, 300000)]
    world.refuse({value: post(CHAT, BODY, (name, value), auth=[]) for name, value in marks}, 401, "missing_api_key")


def test_a_client_can_not_make_the_gateway_try_more_often(world: World) -> None:
    world.alpha.behave(Reply(status=500))
    forged = [
        ("x-envoy-max-retries", "5"),
        ("x-envoy-retry-on", "5xx,retriable-4xx"),
        ("x-envoy-hedge-on-per-try-timeout", "1"),
    ]
    with world.rows(1):
        answer = world.send(post(CHAT, BODY, *forged))
    assert answer.status == 503
    assert len(world.alpha.requests) == 1
    world.assert_row("", answer.header("x-request-id"), attempts=1, code="all_targets_failed")


def test_headers_with_underscores_are_dropped(world: World) -> None:
    names = ("x_api_key", "x_extproc_idle_ms", "content_length", "transfer_encoding", "x_other")
    (seen,) = world.deliver({"": post(CHAT, BODY, *((name, "5") for name in names))})
    assert not [name for name, _ in seen.headers if "_" in name or name.replace("_", "-") in ("x-other",)]


def test_a_client_does_not_choose_its_request_id(world: World) -> None:
    mine = ("x-request-id", "mine-mine-mine")
    with world.rows(3):
        answers = [world.send(post(CHAT, BODY, mine)) for _ in range(2)]
        answers.append(world.send(post(CHAT, BODY, mine, auth=[])))
    ids = {answer.header("x-request-id") for answer in answers}
    assert len(ids) == 3
    assert mine[1] not in ids
    assert not [seen for seen in world.alpha.requests if seen.header("x-request-id")]
    for answer, status in zip(answers, (200, 200, 401), strict=True):
        world.assert_row("", answer.header("x-request-id"), status=status)


def test_the_host_header_is_the_providers_own(world: World) -> None:
    cases = {
        host: request_bytes("POST", CHAT, [("host", host), bearer(), JSON, length(BODY)], BODY)
        for host in ("evil.example", "127.0.0.1:1", "a.example:443", "localhost")
    }
    for seen in world.deliver(cases):
        assert seen.values("host") == [f"127.0.0.1:{world.alpha.port}"]
    (twice,) = world.deliver({"two": post(CHAT, BODY, ("host", "evil.example"))})
    assert twice.values("host") == [f"127.0.0.1:{world.alpha.port}"]


def test_internal_headers_of_a_provider_do_not_reach_the_client(world: World) -> None:
    theirs = [("x-envoy-upstream-service-time", "7"), ("x-envoy-overloaded", "true"), ("x-extproc-team", "theirs")]
    theirs += [("x-extproc-provider", "theirs"), ("x-extproc-mended", "now"), ("x-request-id", "theirs")]
    theirs += [
        ("access-control-allow-origin", "*"),
        ("access-control-expose-headers", "x-request-id"),
        ("alt-svc", "h3"),
    ]
    world.alpha.behave(Reply(headers=(*theirs, ("x-ratelimit-remaining-requests", "5"))))
    with world.rows(1):
        answer = world.send(post(CHAT, BODY, ("origin", "https://evil.example")))
    assert answer.status == 200
    names = {name.lower() for name, _ in answer.headers}
    assert not [name for name in names if name.startswith(("x-envoy-", "access-control-"))]
    assert "alt-svc" not in names
    assert {name for name in names if name.startswith("x-extproc-")} == {"x-extproc-provider", "x-extproc-model"}
    assert answer.values("x-extproc-provider") == ["alpha"]
    assert answer.values("x-request-id") != ["theirs"]
    assert answer.header("x-ratelimit-remaining-requests") == "5"
    world.assert_row("", answer.header("x-request-id"), status=200)


def test_there_is_no_cors(world: World) -> None:
    preflight = [("origin", "https://evil.example"), ("access-control-request-method", "POST")]
    answers = world.refuse({"": post(CHAT, b"", *preflight, method="OPTIONS", auth=[])}, 401, "missing_api_key")
    answers += world.refuse({"": post(CHAT, b"", *preflight, method="OPTIONS")}, 405, "method_not_allowed")
    for answer in answers:
        assert not [name for name, _ in answer.headers if name.lower().startswith(("access-control-", "x-envoy-"))]
