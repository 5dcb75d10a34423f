"""Bodies that hide something: too large, compressed, of another type, or forms with two readings."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator

import pytest

from tests.e2e.raw_http import Answer, Connection, chunked, exchange, exchange_http2, request_bytes
from tests.e2e.threats import BODY, CHAT, JSON, LIMIT_BYTES, MESSAGES, World, bearer, code_of, length, post, running
from tests.gateway import NARROW_KEY, Gateway, config
from tests.upstream import RecordingUpstream

pytestmark = pytest.mark.e2e

HOST = ("host", "gateway.test")
SPEECH = "/v1/audio/transcriptions"
CHUNKED = ("transfer-encoding", "chunked")
EXPECT = ("expect", "100-continue")
DEFAULT_LIMIT_BYTES = 33_554_432


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("bodies")) as world:
        yield world


@pytest.fixture
def world(started: World) -> World:
    started.forget()
    return started


def of_type(content_type: str | None, body: bytes = BODY, path: str = CHAT, *more: tuple[str, str]) -> bytes:
    typed = [] if content_type is None else [("content-type", content_type)]
    return request_bytes("POST", path, [HOST, bearer(), *typed, length(body), *more], body)


def head_of(size: int, *more: tuple[str, str], path: str = CHAT) -> bytes:
    """The headers alone of a request that says its body has `size` bytes."""
    return request_bytes("POST", path, [HOST, bearer(), JSON, ("content-length", str(size)), *more])


def sized(size: int, model: bytes = b"demo") -> bytes:
    """A chat request of exactly `size` bytes."""
    body = BODY.replace(b"demo", model)
    return body.replace(b"hi", b"h" * (size - len(body) + 2))


# Content types


TYPES = [None, "", "text/plain", "text/json", "application/jsonp", "application/json-seq", "application/x-ndjson"]
TYPES += ["application/vnd.api+json", "application/json; charset=utf-16", "application/json; charset=latin1", "*/*"]
TYPES += ["application/json, text/plain", "text/plain, application/json", "application/x-www-form-urlencoded", "json"]
TYPES += ["application/octet-stream", "multipart/form-data; boundary=x", "application/json; boundary=x", "audio/wav"]
TYPES += ["application/json; charset=utf-8; charset=utf-7", "application /json", "application/json\tx", "image/png"]


def test_json_endpoints_take_json_alone(world: World) -> None:
    cases = {str(content_type): of_type(content_type) for content_type in TYPES}
    cases["two headers"] = post(CHAT, BODY, ("content-type", "text/plain"))
    cases["two headers, the other first"] = of_type("text/plain", BODY, CHAT, JSON)
    world.refuse(cases, 415, "unsupported_content_type")
    by_path = {
        path: of_type("text/plain", BODY, path) for path in (MESSAGES, "/v1/embeddings", "/v1/responses", "/v1/files")
    }
    world.refuse(by_path, 415, "unsupported_content_type")
    world.deliver({"benign": of_type("application/json; charset=UTF-8")})


def test_upload_endpoints_take_forms_alone(world: World) -> None:
    types = ["application/json", "audio/wav", "multipart/form-data", "multipart/form-data; boundary=", None]
    types += [
        "multipart/mixed; boundary=x",
        "multipart/form-data; boundary=x; boundary=y",
        "multipart/form-data; boundary=x,y",
    ]
    cases = {str(content_type): of_type(content_type, form(), SPEECH) for content_type in types}
    world.refuse(cases, 415, "unsupported_content_type")


# Compression


def codings() -> dict[str, bytes]:
    packed, raw = gzip.compress(BODY), zlib.compress(BODY)
    named = {"gzip": packed, "deflate": raw, "x-gzip": packed, "GZIP": packed, "gzip, gzip": gzip.compress(packed)}
    named |= {"br": b"\x8b\x1d\x80" + BODY + b"\x03", "zstd": b"\x28\xb5\x2f\xfd" + BODY, "compress": packed}
    return named | {"identity, gzip": packed, "unknown": BODY, "aws-chunked": BODY, "dcb": BODY}


def test_compressed_bodies_are_refused_before_they_arrive(world: World) -> None:
    cases = {name: of_type(JSON[1], body, CHAT, ("content-encoding", name)) for name, body in codings().items()}
    cases["two headers"] = of_type(JSON[1], BODY, CHAT, ("content-encoding", "identity"), ("content-encoding", "gzip"))
    cases["mislabelled: plain"] = of_type(JSON[1], BODY, CHAT, ("content-encoding", "gzip"))
    cases["a bomb"] = of_type(JSON[1], gzip.compress(b"0" * 10_000_000), CHAT, ("content-encoding", "gzip"))
    world.refuse(cases, 415, "unsupported_content_encoding")
    uploads = {path: of_type(FORM, form(), path, ("content-encoding", "gzip")) for path in (SPEECH, "/v1/files")}
    world.refuse(uploads, 415, "unsupported_content_encoding")


def test_a_compressed_body_that_says_nothing_is_no_json(world: World) -> None:
    bodies = {name: body for name, body in codings().items() if body != BODY}
    world.refuse({name: of_type(JSON[1], body) for name, body in bodies.items()}, 400, "invalid_json")
    identity = ("content-encoding", "identity")
    world.refuse({"identity": of_type(JSON[1], gzip.compress(BODY), CHAT, identity)}, 400, "invalid_json")
    (seen,) = world.deliver({"benign": of_type(JSON[1], BODY, CHAT, identity)})
    assert seen.body == BODY


def test_an_answer_is_not_asked_for_compressed(world: World) -> None:
    (seen,) = world.deliver({"": post(CHAT, BODY, ("accept-encoding", "gzip, br, zstd"))})
    assert seen.header("accept-encoding") is None


# The limit


@pytest.mark.parametrize("model", [b"demo", b"renamed"])
def test_a_body_as_large_as_the_limit_passes(world: World, model: bytes) -> None:
    for size in (LIMIT_BYTES - 1, LIMIT_BYTES):
        body = sized(size, model)
        in_chunks = request_bytes("POST", CHAT, [HOST, bearer(), JSON, CHUNKED], chunked(body))
        seen = world.deliver({"whole": post(CHAT, body), "chunked": in_chunks})
        assert [one.body for one in seen] == [body.replace(b'"renamed"', b'"other-name"')] * 2


def test_a_body_above_the_limit_is_refused_whether_it_says_so_or_not(world: World) -> None:
    cases: dict[str, bytes] = {}
    for size in (LIMIT_BYTES + 1, LIMIT_BYTES + 100, 3 * LIMIT_BYTES, 40 * LIMIT_BYTES):
        for path in (CHAT, MESSAGES):
            chunks = chunked(sized(size), 9_999)
            cases[f"{path} {size} whole"] = post(path, sized(size))
            cases[f"{path} {size} chunked"] = request_bytes("POST", path, [HOST, bearer(), JSON, CHUNKED], chunks)
    cases["form"] = of_type(FORM, form(audio=b"\0" * LIMIT_BYTES), SPEECH)
    cases["pass-through"] = of_type(FORM, form(audio=b"\0" * LIMIT_BYTES), "/v1/files")
    world.refuse(cases, 413, "body_too_large")


@pytest.mark.parametrize("more", [[], [EXPECT]])
@pytest.mark.parametrize("size", [LIMIT_BYTES + 1, 10**9, 2**63 - 1])
def test_a_larger_declared_length_is_refused_before_the_body_arrives(
    world: World, size: int, more: list[tuple[str, str]]
) -> None:
    with world.rows(1), Connection(world.gateway.port) as connection:
        connection.send(head_of(size, *more))
        answer = connection.answer()
        assert (answer.status, code_of(answer)) == (413, "body_too_large")
        assert answer.elapsed_s < 2
        assert connection.is_closed()
    world.assert_untouched()
    world.assert_row("", answer.header("x-request-id"), status=413, code="body_too_large", team="search")


def test_what_headers_rule_out_is_refused_before_the_body_arrives(world: World) -> None:
    cases = {
        "no key": (401, request_bytes("POST", CHAT, [HOST, JSON, ("content-length", "1000")])),
        "wrong key": (401, request_bytes("POST", CHAT, [HOST, bearer("x"), JSON, ("content-length", "1000"), EXPECT])),
        "no such path": (404, head_of(1000, path="/v1/unknown")),
        "compressed": (415, head_of(1000, ("content-encoding", "gzip"))),
        "not json": (415, head_of(1000).replace(JSON[1].encode(), b"text/plain")),
    }
    with world.rows(len(cases)):
        for name, (status, head) in cases.items():
            assert exchange(world.gateway.port, head).status == status, name
    world.assert_untouched()


def test_a_body_that_was_waited_for_passes(world: World) -> None:
    with world.rows(1), Connection(world.gateway.port) as connection:
        connection.send(head_of(len(BODY), EXPECT))
        assert connection.read().startswith(b"HTTP/1.1 100 ")
        world.assert_untouched()
        connection.send(BODY)
        assert connection.answer().status == 200
    (seen,) = world.alpha.requests
    assert (seen.body, seen.header("expect")) == (BODY, None)


def test_a_body_that_ends_early_goes_nowhere(world: World) -> None:
    with world.rows(2):
        for head in (head_of(1000), request_bytes("POST", CHAT, [HOST, bearer(), JSON, CHUNKED], b"64\r\n")):
            with Connection(world.gateway.port) as connection:
                connection.send(head + BODY)
                connection.end()
                assert connection.is_closed()
    world.assert_untouched()


def test_the_limit_holds_over_http2(world: World) -> None:
    headers = [
        (":method", "POST"),
        (":path", CHAT),
        (":scheme", "http"),
        (":authority", "gateway.test"),
        bearer(),
        JSON,
    ]
    port = world.gateway.port
    with world.rows(3):
        assert exchange_http2(port, headers, sized(LIMIT_BYTES - 1)).status == 200
        declared = [*headers, ("content-length", str(LIMIT_BYTES + 1))]
        assert exchange_http2(port, declared, BODY, ends=False).status == 413
        assert exchange_http2(port, headers, b"").status == 400
    assert [len(seen.body) for seen in world.alpha.requests] == [LIMIT_BYTES - 1]


def test_the_default_limit_is_32_mib(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("limit")
    with RecordingUpstream() as upstream:
        providers = {"alpha": {"kind": "openai", "endpoint": f"{upstream.url}/v1"}}
        models = {name: {"targets": [{"provider": "alpha"}]} for name in ("demo", "narrow")}
        with Gateway(folder, config(providers=providers, models=models)) as gateway:
            statuses = [answer.status for answer in _around_the_default_limit(gateway)]
            assert statuses == [200, 200, 413, 413, 413]
            gateway.wait_for_rows(5)
            codes = [row["code"] for row in gateway.rows()]
            assert codes == [None, None, "body_too_large", "body_too_large", "body_too_large"]
        assert [len(seen.body) for seen in upstream.requests] == [DEFAULT_LIMIT_BYTES] * 2
        assert all(seen.body == sized(DEFAULT_LIMIT_BYTES) for seen in upstream.requests)


def _around_the_default_limit(gateway: Gateway) -> Iterator[Answer]:
    most, beyond = sized(DEFAULT_LIMIT_BYTES), sized(DEFAULT_LIMIT_BYTES + 1)
    stream = [HOST, bearer(), JSON, CHUNKED]
    yield exchange(gateway.port, post(CHAT, most))
    yield exchange(gateway.port, request_bytes("POST", CHAT, stream, chunked(most, 1 << 20)))
    yield exchange(gateway.port, post(CHAT, beyond))
    yield exchange(gateway.port, request_bytes("POST", CHAT, stream, chunked(beyond, 1 << 20)))
    yield exchange(gateway.port, head_of(len(beyond)))


# Forms


FORM = "multipart/form-data; boundary=----boundary7MA4YWxk"
AUDIO = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(range(256)) * 8 + b"\r\n--\r\n------boundary\r\n\r\n\n\n"


def part(name: bytes, value: bytes, more: bytes = b"") -> bytes:
    return (
        b"------boundary7MA4YWxk\r\nContent-Disposition: form-data; name="
        + name
        + b"\r\n"
        + more
        + b"\r\n"
        + value
        + b"\r\n"
    )


END = b"------boundary7MA4YWxk--\r\n"
FILE_NAME = b'"file"; filename="speech.wav"'


def form(model: bytes = b"demo", audio: bytes = AUDIO) -> bytes:
    """An upload as SDKs write it."""
    parts = (
        part(b'"model"', model),
        part(b'"response_format"', b"json"),
        part(FILE_NAME, audio, b"Content-Type: audio/wav\r\n"),
    )
    return b"".join((*parts, END))


def test_a_real_upload_goes_upstream_byte_for_byte(world: World) -> None:
    (seen,) = world.deliver({"": of_type(FORM, form(), SPEECH)})
    assert (seen.target, seen.body, seen.header("content-type")) == (SPEECH, form(), FORM)


def test_where_the_model_is_renamed_the_rest_of_an_upload_stays(world: World) -> None:
    (seen,) = world.deliver({"decide": of_type(FORM, form(b"renamed"), SPEECH)})
    assert seen.body == form(b"other-name")
    assert seen.header("content-length") == str(len(seen.body))
    world.alpha.stop()
    try:
        (adapted,) = _failed_over(world, of_type(FORM, form(b"adapted"), SPEECH))
    finally:
        world.alpha.start()
    assert adapted == form(b"second-name")


def _failed_over(world: World, raw: bytes) -> list[bytes]:
    with world.rows(1):
        assert world.send(raw).status == 200
    return [seen.body for seen in world.beta.requests]


def test_quoted_and_odd_boundaries_of_real_clients_pass(world: World) -> None:
    boundaries = {'"----=_Part_0_1.2"': b"----=_Part_0_1.2", "x": b"x", '"a b\'()+_,-./:=?"': b"a b'()+_,-./:=?"}
    boundaries |= {"d74496d66958873e": b"d74496d66958873e", "x; charset=utf-8": b"x"}
    cases = {
        text: of_type(
            f"multipart/form-data; boundary={text}", form().replace(b"----boundary7MA4YWxk", boundary), SPEECH
        )
        for text, boundary in boundaries.items()
    }
    seen = world.deliver(cases)
    assert [one.body for one in seen] == [form().replace(b"----boundary7MA4YWxk", each) for each in boundaries.values()]


def two_readings() -> dict[str, bytes]:
    """Forms in which some server finds a model that another does not."""
    again = part(b'"model"', b"renamed")
    body = form()
    hidden = (
        b'x\n------boundary7MA4YWxk\nContent-Disposition: form-data; name="model"\n\nrenamed\n------boundary7MA4YWxk--'
    )
    return {
        "two models": again + body,
        "the same model twice": part(b'"model"', b"demo") + body,
        "another case": part(b'"Model"', b"renamed") + body,
        "only another case": body.replace(b'"model"', b'"MODEL"'),
        "model as a file": body.replace(b'"model"', b'"model"; filename="m"'),
        "model as an extended file": body.replace(b'"model"', b"\"model\"; filename*=utf-8''m"),
        "model as a list": part(b'"model[]"', b"renamed") + body,
        "extended name": part(b"\"x\"; name*=utf-8''model", b"renamed") + body,
        "continued name": part(b'"x"; name*0="mo"; name*1="del"', b"renamed") + body,
        "two names": part(b'"x"; name="model"', b"renamed") + body,
        "escaped quote": part(b'"file"; filename="a\\"; name=model; x="', b"renamed") + body,
        "bare line feeds": body.replace(b"\r\n", b"\n"),
        "hidden behind bare line feeds": form(audio=hidden),
        "hidden behind bare carriage returns": form(audio=hidden.replace(b"\n", b"\r")),
        "behind the end": body + again + END,
        "before the beginning": b"x\r\n" + body,
        "second disposition": part(b'"x"', b"renamed", b'Content-Disposition: form-data; name="model"\r\n') + body,
        "second disposition, bare": part(b'"x"', b"renamed", b'X: y\nContent-Disposition: form-data; name="model"\r\n')
        + body,
        "folded header": body.replace(b'; name="model"', b';\r\n name="model"'),
        "base64 model": body.replace(b'"model"\r\n', b'"model"\r\nContent-Transfer-Encoding: base64\r\n'),
        "UTF-16 model": body.replace(b'"model"\r\n', b'"model"\r\nContent-Type: text/plain; charset=utf-16\r\n'),
        "default charset": part(b'"_charset_"', b"utf-16") + body,
        "false part length": body.replace(b'"model"\r\n', b'"model"\r\nContent-Length: 400\r\n'),
        "line break in the model": form(b"demo\r\nx"),
        "no end": body.removesuffix(END),
        "no part": b"model=demo",
        "empty": b"",
        "another boundary": body.replace(b"7MA4YWxk", b"8MA4YWxk"),
        "json": BODY,
    }


def test_a_form_with_two_readings_is_refused(world: World) -> None:
    cases = {name: of_type(FORM, body, SPEECH) for name, body in two_readings().items()}
    world.refuse(cases, 400, "invalid_multipart")
    passed_through = {name: of_type(FORM, body, "/v1/files") for name, body in two_readings().items() if body}
    world.refuse(passed_through, 400, "invalid_multipart")


def test_the_model_of_an_upload_is_judged_like_any_other(world: World) -> None:
    world.refuse({"none": of_type(FORM, part(FILE_NAME, AUDIO) + END, SPEECH)}, 400, "missing_field")
    names = (b"unknown", b"Demo", b" demo", b"demo ", b"")
    world.refuse({str(name): of_type(FORM, form(name), SPEECH) for name in names}, 404, "model_not_found")
    narrow = {name: _with_narrow_key(form(name)) for name in (b"renamed", b"narrow")}
    world.refuse({"another": narrow[b"renamed"]}, 403, "model_not_allowed")
    world.deliver({"its own": narrow[b"narrow"]})


def _with_narrow_key(body: bytes) -> bytes:
    headers = [HOST, bearer(NARROW_KEY), ("content-type", FORM), length(body)]
    return request_bytes("POST", SPEECH, headers, body)
