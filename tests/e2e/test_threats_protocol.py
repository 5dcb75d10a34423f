"""HTTP itself as a weapon: smuggling, framing, versions, upgrades and trailers, as an attacker writes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.raw_http import Connection, NoAnswerError, Pairs, chunked, exchange_http2, request_bytes
from tests.e2e.threats import BODY, CHAT, JSON, World, bare, bearer, length, post, running
from tests.gateway import KEY

pytestmark = pytest.mark.e2e

HOST = ("host", "gateway.test")
SMUGGLED = (
    b"POST /v1/files/smuggled HTTP/1.1\r\nhost: gateway.test\r\nauthorization: Bearer " + KEY.encode() + b"\r\n\r\n"
)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("protocol")) as world:
        yield world


@pytest.fixture
def world(started: World) -> World:
    started.forget()
    return started


def raw(*headers: tuple[str, str], body: bytes = BODY, version: str = "HTTP/1.1") -> bytes:
    """A chat request with just these headers besides host, key and type."""
    return request_bytes("POST", CHAT, [HOST, bearer(), JSON, *headers], body, version=version)


def test_a_body_with_two_lengths_is_refused(world: World) -> None:
    te = ("transfer-encoding", "chunked")
    cases = {
        "CL then TE": raw(length(BODY), te, body=chunked(BODY) + SMUGGLED),
        "TE then CL": raw(te, ("content-length", "5"), body=chunked(BODY) + SMUGGLED),
        "CL 0 and TE": raw(("content-length", "0"), te, body=chunked(BODY)),
        "two lengths": raw(length(BODY), ("content-length", "5"), body=BODY),
        "one length twice": raw(length(BODY), length(BODY)),
        "a list of lengths": raw(("content-length", f"{len(BODY)}, {len(BODY)}")),
        "a signed length": raw(("content-length", f"+{len(BODY)}")),
        "a negative length": raw(("content-length", "-1")),
        "a hex length": raw(("content-length", "0x3c")),
        "a length in words": raw(("content-length", "sixty")),
        "a length beyond 64 bits": raw(("content-length", "9" * 30)),
    }
    world.refuse(cases, 400, "invalid_request")


def test_a_transfer_coding_that_is_not_chunked_is_refused(world: World) -> None:
    codings = ("gzip", "gzip, chunked", "chunked, chunked", "xchunked", "chunked, identity", "identity")
    cases = {coding: raw(("transfer-encoding", coding), body=chunked(BODY)) for coding in codings}
    cases["twice"] = raw(("transfer-encoding", "chunked"), ("transfer-encoding", "identity"), body=chunked(BODY))
    world.refuse(cases, 400, "invalid_request")
    (seen,) = world.deliver({"chunked": raw(("transfer-encoding", "chunked"), body=chunked(BODY, 7))})
    assert seen.body == BODY


def test_broken_chunks_end_the_request(world: World) -> None:
    broken = {
        "size no number": b"zz\r\n{}\r\n0\r\n\r\n",
        "size signed": b"-2\r\n{}\r\n0\r\n\r\n",
        "bare line feeds": b"2\n{}\n0\n\n",
        "size huge": b"ffffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    }
    cases = {name: raw(("transfer-encoding", "chunked"), body=body) for name, body in broken.items()}
    world.refuse(cases, 400, "invalid_request")


def test_sloppy_chunks_go_upstream_as_they_were_judged(world: World) -> None:
    size = b"%x" % len(BODY)
    sloppy = {
        "an extension": size + b";a=b\r\n" + BODY + b"\r\n0\r\n\r\n",
        "zeros before the size": b"000" + size + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
        "data beyond the size": size + b"\r\n" + BODY + b'{"x":1}\r\n0\r\n\r\n',
    }
    cases = {name: raw(("transfer-encoding", "chunked"), body=body) for name, body in sloppy.items()}
    for seen in world.deliver(cases):
        assert seen.body == BODY
        assert seen.raw_body == size + b"\r\n" + BODY + b"\r\n0\r\n\r\n"


def test_broken_header_lines_are_refused(world: World) -> None:
    whole = raw(length(BODY))
    cases = {
        "space before the colon": whole.replace(b"authorization:", b"authorization :"),
        "no colon": whole.replace(b"\r\n\r\n", b"\r\nnocolon\r\n\r\n", 1),
        "empty name": whole.replace(b"\r\n\r\n", b"\r\n: x\r\n\r\n", 1),
        "NUL in a value": raw(length(BODY), ("x-a", "a\0b")),
        "NUL in a name": raw(length(BODY), ("x\0a", "b")),
        "space in a name": raw(length(BODY), ("x a", "b")),
        "DEL in a value": raw(length(BODY), ("x-a", "a\x7fb")),
        "no host": request_bytes("POST", CHAT, [bearer(), JSON, length(BODY)], BODY),
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100,
        "leading space": b" " + whole,
    }
    world.refuse(cases, 400, "invalid_request")
    world.refuse({"too large": raw(length(BODY), ("x-a", "a" * 70_000))}, 431, "invalid_request")
    world.refuse({"too many": raw(length(BODY), *((f"x-{at}", "a") for at in range(120)))}, 431, "invalid_request")


def test_a_folded_header_is_one_header(world: World) -> None:
    cases = {
        "fold": raw(("x-a", "1\r\n authorization: Bearer x"), length(BODY)),
        "tab": raw(("x-a", "1\r\n\tx-api-key: x"), length(BODY)),
        "bare carriage return": raw(("x-a", "1\rx-api-key: x"), length(BODY)),
    }
    for seen in world.deliver(cases):
        assert seen.header("x-api-key") is None
        assert len(seen.values("authorization")) == 1
        assert b"\r" not in seen.raw_head.replace(b"\r\n", b"")
        assert seen.body == BODY


def test_old_versions_are_refused(world: World) -> None:
    cases = {version: raw(length(BODY), version=version) for version in ("HTTP/1.0", "HTTP/0.9", "HTTP/1.2")}
    cases["none"] = b"GET /v1/models\r\n\r\n"
    world.refuse(cases, 426, "invalid_request")


def test_an_upgrade_is_refused_or_ignored(world: World) -> None:
    websocket = [("connection", "Upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", "dGVzdA==")]
    websocket.append(("sec-websocket-version", "13"))
    cases = {path: bare(path, bearer(), *websocket) for path in ("/v1/responses", "/v1/realtime", "/v1/files", "/")}
    world.refuse(cases, 400, "invalid_request")
    h2c = [
        ("connection", "Upgrade, HTTP2-Settings"),
        ("upgrade", "h2c"),
        ("http2-settings", "AAMAAABkAARAAAAAAAIAAAAA"),
    ]
    (seen,) = world.deliver({"h2c": raw(length(BODY), *h2c)})
    assert seen.body == BODY
    assert not [name for name, _ in seen.headers if name.lower() in ("upgrade", "http2-settings", "connection")]


def test_trailers_never_become_headers(world: World) -> None:
    trailer = b"0\r\nauthorization: Bearer x\r\nx-api-key: x\r\nx-extproc-idle-ms: 1\r\nx-t: 1\r\n\r\n"
    announced = [("te", "trailers"), ("trailer", "authorization, x-api-key"), ("connection", "te")]
    body = chunked(BODY).removesuffix(b"0\r\n\r\n") + trailer
    (seen,) = world.deliver({"": raw(("transfer-encoding", "chunked"), *announced, body=body)})
    assert seen.body == BODY
    assert seen.raw_body.endswith(b"0\r\n\r\n")
    assert [*seen.values("te"), *seen.values("x-t"), *seen.values("x-api-key")] == []


def http2(*more: tuple[str, str], path: str = CHAT, method: str = "POST", auth: bool = True) -> Pairs:
    pseudo = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "gateway.test")]
    return [*pseudo, JSON, *((bearer(),) if auth else ()), *more]


def test_http2_with_prior_knowledge_meets_the_same_policy(world: World) -> None:
    port = world.gateway.port
    with world.rows(4):
        answer = exchange_http2(port, http2(("cookie", "a=b"), ("x-envoy-max-retries", "3")), BODY)
        assert answer.status == 200
        assert exchange_http2(port, http2(auth=False), BODY).status == 401
        assert exchange_http2(port, http2(path="/v1/files/a;b"), BODY).status == 404
        assert exchange_http2(port, http2(path="//v1/./chat/completions", method="PUT"), BODY).status == 405
    (seen,) = world.alpha.requests
    assert (seen.target, seen.body) == (CHAT, BODY)
    assert not [name for name, _ in seen.headers if name.startswith(("x-envoy-", "cookie"))]


def test_trailers_over_http2_go_nowhere(world: World) -> None:
    trailers = [("x-api-key", "x"), ("authorization", "Bearer x"), ("x-t", "1")]
    with world.rows(1):
        answer = exchange_http2(world.gateway.port, http2(("te", "trailers")), BODY, trailers=trailers)
    assert answer.status == 200
    (seen,) = world.alpha.requests
    assert seen.body == BODY
    assert seen.raw_body.endswith(b"0\r\n\r\n")
    assert [*seen.values("x-t"), *seen.values("x-api-key"), *seen.values("te")] == []


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(http2(("transfer-encoding", "chunked")), id="transfer-encoding"),
        pytest.param(http2(("connection", "close")), id="connection"),
        pytest.param(http2(("content-length", "5")), id="false length"),
        pytest.param(http2(("X-Extproc-Idle-Ms", "1")), id="upper case"),
        pytest.param(http2(("x-a", "a\nx-api-key: b")), id="line feed in a value"),
        pytest.param(http2(("x-a", "a\r\nx-api-key: b")), id="line break in a value"),
        pytest.param(http2(("x-a", "a\0")), id="NUL in a value"),
        pytest.param(http2(("x a", "b")), id="space in a name"),
        pytest.param(http2(path="/v1/chat/completions?a b"), id="space in the path"),
        pytest.param(http2(path="/v1/chat/completions HTTP/1.1\r\nx: y"), id="request line in the path"),
        pytest.param(http2(path=""), id="no path"),
        pytest.param(http2(method="GET /v1/files HTTP/1.1\r\nx:"), id="request line in the method"),
        pytest.param(http2((":path", "/v1/files")), id="second path"),
    ],
)
def test_a_malformed_http2_request_is_reset(world: World, headers: Pairs) -> None:
    with world.rows(1), pytest.raises(NoAnswerError):
        exchange_http2(world.gateway.port, headers, BODY)
    world.assert_untouched()


def test_connect_over_http2_opens_no_tunnel(world: World) -> None:
    authority = (":authority", f"127.0.0.1:{world.alpha.port}")
    connections = world.alpha.connections
    with world.rows(2):
        assert exchange_http2(world.gateway.port, [(":method", "CONNECT"), authority, bearer()]).status == 404
        assert exchange_http2(world.gateway.port, [(":method", "CONNECT"), authority]).status == 401
    assert world.alpha.connections == connections


def test_pipelined_requests_are_judged_one_by_one(world: World) -> None:
    with world.rows(3), Connection(world.gateway.port) as connection:
        connection.send(post() + post(auth=[]) + post())
        statuses = [connection.answer().status for _ in range(3)]
    assert statuses == [200, 401, 200]
    assert [seen.body for seen in world.alpha.requests] == [BODY, BODY]


def test_a_refusal_does_not_leave_its_body_to_be_read_as_a_request(world: World) -> None:
    with world.rows(2), Connection(world.gateway.port) as connection:
        connection.send(post(CHAT, SMUGGLED, auth=[]))
        assert connection.answer().status == 401
        connection.send(post())
        assert connection.answer().status == 200
    assert [seen.target for seen in world.alpha.requests] == [CHAT]
