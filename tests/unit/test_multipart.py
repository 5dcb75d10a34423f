"""The multipart scanner against three lenient parsers: where it names a model, none of them may read another."""

from __future__ import annotations

import asyncio
import email.parser
import email.policy
from collections.abc import Callable
from email.message import Message

import aiohttp
import pytest
import python_multipart
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from extproc.dialects.body import splice
from extproc.dialects.multipart import MultipartModel, boundary_of, read_model
from extproc.errors import Code, Refusal

FORM = "multipart/form-data; boundary=xyz"
AUDIO = bytes(range(256)) * 3 + b"\r\n--xy\r\n\r\n--\n"


def part(value: bytes = b"whisper-1", name: bytes = b'"model"', more: bytes = b"") -> bytes:
    return b"--xyz\r\nContent-Disposition: form-data; name=" + name + b"\r\n" + more + b"\r\n" + value + b"\r\n"


FILE = part(AUDIO, b'"file"; filename="a.wav"', b"Content-Type: audio/wav\r\n")
FILE_OF_BROKEN_BASE64 = part(b"de=6Do", b'"file"; filename="a.wav"', b"Content-Transfer-Encoding: base64\r\n")
END = b"--xyz--\r\n"


def model_of(body: bytes, content_type: str = FORM) -> str | None:
    form = read_model(body, content_type)
    assert isinstance(form, MultipartModel), form
    return form.model


def models_by_email(body: bytes, content_type: str) -> list[bytes]:
    """The standard library's MIME parser: takes any line ends, folded headers, comments and transfer codings."""
    raw = f"Content-Type: {content_type}\r\nMIME-Version: 1.0\r\n\r\n".encode() + body
    message = email.parser.BytesParser(policy=email.policy.compat32).parsebytes(raw)
    models: list[bytes] = []
    for each in message.walk():
        name = each.get_param("name", header="content-disposition")
        text = name[2] if isinstance(name, tuple) else str(name)
        if isinstance(each, Message) and text.strip().casefold() == "model":
            payload = each.get_payload(decode=True)
            assert isinstance(payload, bytes)
            models.append(payload)
    return models


def models_by_aiohttp(body: bytes, content_type: str) -> list[bytes]:
    """aiohttp's reader: reads a part by its own Content-Length where it has one."""

    async def read() -> list[bytes]:
        protocol = aiohttp.base_protocol.BaseProtocol(asyncio.get_running_loop())
        stream = aiohttp.StreamReader(protocol, limit=2**22, loop=asyncio.get_running_loop())
        stream.feed_data(body)
        stream.feed_eof()
        headers = CIMultiDictProxy(CIMultiDict({"Content-Type": content_type}))
        models: list[bytes] = []
        reader = aiohttp.MultipartReader(headers, stream)
        while (found := await reader.next()) is not None:
            assert isinstance(found, aiohttp.BodyPartReader)
            is_model = (found.name or "").strip().casefold() == "model"
            value = await found.read(decode=is_model)  # another part's broken base64 says nothing about the model
            if is_model:
                models.append(bytes(value))
        return models

    return asyncio.run(read())


def models_by_python_multipart(body: bytes, content_type: str) -> list[bytes]:
    """The parser of Starlette and FastAPI, and so of most Python servers of models."""
    models: list[bytes] = []

    def on_field(field: python_multipart.multipart.Field) -> None:
        if (field.field_name or b"").strip().lower() == b"model":
            models.append(field.value or b"")

    def on_file(file: python_multipart.multipart.File) -> None:
        if (file.field_name or b"").strip().lower() == b"model":
            models.append(b"a file")

    parser = python_multipart.create_form_parser({"Content-Type": content_type.encode()}, on_field, on_file)
    parser.write(body)
    parser.finalize()
    return models


PARSERS: list[Callable[[bytes, str], list[bytes]]] = [
    models_by_email,
    models_by_aiohttp,
    models_by_python_multipart,
]


def usually(benign: list[bytes], tricks: list[bytes]) -> st.SearchStrategy[bytes]:
    """Mostly benign, or no body would get past its first trick."""
    return st.integers(0, 15).flatmap(lambda roll: st.sampled_from(benign if roll else tricks))


CONTENT_TYPES = st.integers(0, 3).flatmap(
    lambda roll: (
        st.just(FORM)
        if roll
        else st.sampled_from(
            [
                'multipart/form-data; boundary="xyz"',
                "Multipart/Form-Data;boundary=xyz",
                'multipart/form-data; boundary="xyz "',
                'multipart/form-data; boundary="x\\yz"',
                "multipart/form-data; boundary=xyz,q",
                "multipart/form-data; boundary='xyz'",
                "multipart/form-data; boundary=q; boundary=xyz",
                "multipart/form-data; boundary*=utf-8''xyz",
                "multipart/form-data; boundary=xyz; charset=utf-8",
                "multipart/form-data; boundary=xyz; charset=utf-16",
                "multipart/mixed; boundary=xyz",
            ]
        )
    )
)
LINE_ENDS = usually([b"\r\n"], [b"\n", b"\r", b"\r\r\n", b"\r\n\r\n", b""])
NAMES = usually(
    [b'"file"; filename="a.wav"', b'"prompt"', b"language", b'"timestamp_granularities[]"'],
    [
        *(b'"model"', b"model", b'"Model"', b'"model"; filename="m"', b"model*=utf-8''model", b"<model>", b"'model'"),
        *(b'"mod\\el"', b'"file"; filename="a\\"; name=model; x="', b"\"x\"; name*=utf-8''model", b'"%6dodel"'),
        *(b'"x"; name*0=mo; name*1=del', b'"x"; name="model"', b'"=?utf-8?q?model?="', b'"model "', b'"_charset_"'),
        *(b'"model[]"', b'"x"\n ; name="model"', b'"prompt"; filename="\xff"', b'"x"; filename="\\"; name="model"'),
    ],
)
MORE = usually(
    [b"", b"", b"Content-Type: text/plain\r\n", b"Content-Length: 9\r\n"],
    [
        *(b"Content-Type: text/plain; charset=utf-16\r\n", b"Content-Length: 4\r\n", b"Content-Length: 400\r\n"),
        *(b"Content-Transfer-Encoding: base64\r\n", b"Content-Transfer-Encoding: quoted-printable\r\n", b" folded\r\n"),
        *(b'X: y\nContent-Disposition: form-data; name="model"\r\n', b"\n", b"no colon\r\n", b"X: \r\n\r\n"),
        *(
            b'Content-Disposition: form-data; name="model"\r\n',
            b'X: y\rContent-Disposition: form-data; name="model"\r\n',
        ),
    ],
)
VALUES = usually(
    [b"demo-demo", b"whisper-1", b"\r\n\r\nline", b"a\r\n--xy-", b"x-------y"],
    [
        *(b"ZGVtbw==", b"", b"de=6Do", b"demo\n", b"a\n--xyz\n\nb", b"a\r--xyz\r\rb", b"a\n--xyz--\n", b"a\r\n--xyz--"),
        *(b'a\n--xyz\nContent-Disposition: form-data; name="model"\n\nevil\n--xyz--\n', b"a\r\n--xyz \r\n\r\nb"),
    ],
)
ENDS = usually(
    [END, b"--xyz--"], [b"--xyz", b"", END + part(b"evil") + END, b"--xyz -- \r\n", b"--xyz--\n\n", b"--xyz--x\r\n"]
)


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """Forms with a model, and in most of them a trick or two that a reader may fall for."""
    pieces = [draw(usually([b""], [b"\r\n", b"preamble\r\n"]))]
    parts = draw(st.integers(0, 2))
    model_at = draw(st.integers(0, parts))
    for number in range(parts + 1):
        name = b'"model"' if number == model_at else draw(NAMES)
        value = b"whisper-1" if number == model_at else draw(VALUES)
        pieces += (b"--xyz", draw(LINE_ENDS), b"Content-Disposition: form-data; name=", name, draw(LINE_ENDS))
        pieces += (draw(MORE), draw(LINE_ENDS), value, draw(LINE_ENDS))
    return b"".join((*pieces, draw(ENDS)))


@pytest.mark.parametrize("parser", PARSERS)
@settings(max_examples=400, deadline=None)
@given(body=forms(), content_type=CONTENT_TYPES)
@example(body=FILE + part() + END, content_type=FORM)
@example(body=part(b"\n--xyz\n", b'"file"') + part() + END, content_type=FORM)
@example(body=part(more=b"Content-Length: 9\r\n") + END, content_type=FORM)
@example(body=part() + FILE_OF_BROKEN_BASE64 + END, content_type=FORM)
def test_no_lenient_parser_reads_another_model(
    parser: Callable[[bytes, str], list[bytes]], body: bytes, content_type: str
) -> None:
    form = read_model(body, content_type)
    if isinstance(form, Refusal):
        assert form.code is Code.INVALID_MULTIPART
        return
    expected = [] if form.model is None else [form.model.encode()]
    try:
        assert parser(body, content_type) == expected
    except python_multipart.exceptions.DecodeError:
        return  # broken base64 in another part: this parser refuses the whole form, and reads no model at all
    if form.model is not None:
        assert parser(splice(body, form.replace("another-model")), content_type) == [b"another-model"]


@settings(max_examples=300)
@given(st.binary(max_size=300), st.sampled_from([FORM, "", 'multipart/form-data; boundary=""', "a/b; boundary=xyz"]))
def test_reading_never_raises(body: bytes, content_type: str) -> None:
    assert isinstance(read_model(b"--xyz\r\n" + body, content_type), MultipartModel | Refusal)


def test_a_real_upload_is_read_and_only_its_model_is_changed() -> None:
    body = part(name=b'"response_format"', value=b"json") + part() + FILE + END
    form = read_model(body, FORM)
    assert isinstance(form, MultipartModel)
    assert form.model == "whisper-1"
    assert splice(body, form.replace("other")) == body.replace(b"whisper-1", b"other")


def test_the_parts_own_length_follows_its_new_value() -> None:
    body = part(more=b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: 9\r\n") + FILE + END
    form = read_model(body, FORM)
    assert isinstance(form, MultipartModel)
    changed = splice(body, form.replace("another-model"))
    assert changed == body.replace(b"Length: 9", b"Length: 13").replace(b"whisper-1", b"another-model")


def test_a_form_without_a_model_names_none() -> None:
    assert model_of(FILE + END) is None
    assert model_of(b"--xyz--\r\n") is None


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(part() + part() + END, id="twice"),
        pytest.param(part() + part(name=b'"Model"') + END, id="twice, in another case"),
        pytest.param(part(name=b'"MODEL"') + END, id="in another case"),
        pytest.param(part(name=b'"model"; filename="m"') + END, id="as a file"),
        pytest.param(part(name=b'"model[]"') + END, id="as a list"),
        pytest.param(part(name=b"\"file\"; name*=utf-8''model") + END, id="extended parameter"),
        pytest.param(part(name=b'"file"; filename="a\\"; name=model; x="') + END, id="escaped quote"),
        pytest.param(part(more=b"Content-Transfer-Encoding: base64\r\n") + END, id="transfer coding"),
        pytest.param(part(more=b"Content-Type: text/plain; charset=utf-16\r\n") + END, id="charset"),
        pytest.param(part(more=b"Content-Type: application/json\r\n") + END, id="json part"),
        pytest.param(part(more=b"Content-Length: 3\r\n") + END, id="false length"),
        pytest.param(part(b"a\nb") + END, id="line break in the model"),
        pytest.param(part(b"\xff") + END, id="no UTF-8"),
        pytest.param(part(b"m" * 257) + END, id="long"),
        pytest.param(part() + part(b"x\n--xyz\n", b'"file"') + END, id="boundary behind a bare line feed"),
        pytest.param(part() + part(b"x\r--xyz\r", b'"file"') + END, id="boundary behind a bare carriage return"),
        pytest.param(part() + END + part(b"evil") + END, id="epilogue"),
        pytest.param(b"preamble\r\n" + part() + END, id="preamble"),
        pytest.param(part().replace(b"\r\n", b"\n") + END, id="bare line feeds"),
        pytest.param(part() + part(name=b'"_charset_"', value=b"utf-16") + END, id="_charset_"),
        pytest.param(part(), id="no end"),
        pytest.param(part() * 300 + END, id="too many parts"),
        pytest.param(b"", id="empty"),
    ],
)
def test_what_two_readers_could_read_in_two_ways_is_refused(body: bytes) -> None:
    form = read_model(body, FORM)
    assert isinstance(form, Refusal)
    assert form.code is Code.INVALID_MULTIPART


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (
            "multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW",
            b"----WebKitFormBoundary7MA4YWxkTrZu0gW",
        ),
        ("multipart/form-data;boundary=d74496d66958873e", b"d74496d66958873e"),
        ('MULTIPART/form-data; Boundary="----=_Part_0_1.2"', b"----=_Part_0_1.2"),
        ('multipart/form-data; boundary="a\'()+_,-./:=? b"', b"a'()+_,-./:=? b"),
        ("multipart/form-data; boundary=x; charset=utf-8", b"x"),
        ("multipart/form-data; charset=UTF-8; boundary=x", b"x"),
    ],
)
def test_boundaries_of_real_clients_are_taken(content_type: str, boundary: bytes) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        'multipart/form-data; boundary="x "',
        'multipart/form-data; boundary="a\\"b"',
        "multipart/form-data; boundary=a,b",
        "multipart/form-data; boundary=a b",
        "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; boundary*=utf-8''a",
        "multipart/form-data; boundary=" + "a" * 71,
        "multipart/form-data; boundary=é",
        "multipart/mixed; boundary=a",
        "application/json; boundary=a",
    ],
)
def test_boundaries_that_readers_could_cut_differently_are_refused(content_type: str) -> None:
    assert boundary_of(content_type) is None
