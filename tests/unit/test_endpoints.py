"""The table of endpoints: what is in it, what is not, and that no path has a second name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.dialects import endpoints
from extproc.dialects.endpoints import PASS_THROUGH, Endpoint, Miss, Naming, dialect_of, find
from extproc.errors import Dialect

NAMED = [
    ("/v1/chat/completions", "chat"),
    ("/v1/completions", "completions"),
    ("/v1/responses", "responses"),
    ("/v1/responses/input_tokens", "input_tokens"),
    ("/v1/embeddings", "embeddings"),
    ("/v1/messages", "messages"),
    ("/v1/messages/count_tokens", "count_tokens"),
    ("/v1/moderations", "moderations"),
    ("/v1/rerank", "rerank"),
    ("/v1/images/generations", "images"),
    ("/v1/images/edits", "images"),
    ("/v1/audio/speech", "speech"),
    ("/v1/audio/transcriptions", "transcriptions"),
]


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_post_that_names_a_model_has_its_own_row(path: str, name: str) -> None:
    endpoint = find("POST", path)
    assert isinstance(endpoint, Endpoint)
    assert (endpoint.name, endpoint.naming is Naming.ABSENT) == (name, False)


@pytest.mark.parametrize(("path", "_"), NAMED)
@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "CONNECT", "post", ""])
def test_a_named_endpoint_takes_no_other_method(path: str, _: str, method: str) -> None:
    assert find(method, path) is Miss.METHOD


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files",
        "/v1/files/file-1/content",
        "/v1/batches/batch_1/cancel",
        "/v1/responses/resp_1",
        "/v1/fine_tuning/jobs/ftjob-1",
        "/v1/fine_tuning/checkpoints/ft%3Agpt-4o%3Aorg/permissions",
        "/v1/fine_tuning/checkpoints/ft:gpt-4o:org:x:1/permissions",
        "/v1/chat/completions/chatcmpl-1/messages",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_stored_objects_pass_through(method: str, path: str) -> None:
    assert find(method, path) == PASS_THROUGH


def test_message_batches_pass_through_in_their_own_dialect() -> None:
    endpoint = find("GET", "/v1/messages/batches/b_1/results")
    assert isinstance(endpoint, Endpoint)
    assert (endpoint.name, endpoint.dialect) == ("pass_through", Dialect.ANTHROPIC)


@pytest.mark.parametrize("tail", ["/", ";x", "%20", "%3f", "%00", "%25", " ", "\t", "?"])
@pytest.mark.parametrize(("path", "_"), NAMED)
def test_a_named_endpoint_has_no_second_name(path: str, _: str, tail: str) -> None:
    assert find("POST", path + tail) is Miss.PATH
    assert find("POST", path.upper() + tail) is Miss.PATH


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/a;b",
        "/v1/files/..;/chat/completions",
        "/v1/files/a%3Bb",
        "/v1/files/%252e%252e/chat/completions",
        "/v1/files/%25252e",
        "/v1/files/../chat/completions",
        "/v1/files/./x",
        "/v1/files//x",
        "/v1/files/",
        "/v1/files/a%2fb/..",
        "/v1/files/%2e%2e/chat",
        "/v1/files/a%5cb",
        "/v1/files/a\\b",
        "/v1/files/%zz",
        "/v1/files/%",
        "/v1/files/%ff",
        "/v1/files/é",
        "/v1/files/a%0d%0ab",
        "/v1/files/a%00",
        "/v1/files/a#b",
    ],
)
def test_a_path_that_a_provider_could_read_as_another_does_not_pass(path: str) -> None:
    assert find("POST", path) is Miss.PATH
    assert find("GET", path) is Miss.PATH


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v2/files", "/files", "/v1/unknown", "/v1/filesystem", "*"])
def test_what_is_not_in_the_table_does_not_exist(path: str) -> None:
    assert find("POST", path) is Miss.PATH
    assert find("GET", path) is Miss.PATH


def test_models_are_read_only() -> None:
    assert find("GET", "/v1/models") is endpoints.MODELS
    assert find("GET", "/v1/models/a/b") is endpoints.MODELS
    assert find("DELETE", "/v1/models/ft:x") is Miss.METHOD
    assert find("POST", "/v1/models") is Miss.METHOD


@given(st.text(max_size=40), st.sampled_from(["GET", "POST", "HEAD", "DELETE"]))
def test_any_path_is_found_or_missed(path: str, method: str) -> None:
    assert isinstance(find(method, path), Endpoint | Miss)
    assert isinstance(find(method, "/v1/files/" + path), Endpoint | Miss)


@pytest.mark.parametrize(
    ("path", "anthropic_headers", "dialect"),
    [
        ("/v1/messages", False, Dialect.ANTHROPIC),
        ("/v1/messages/unknown", False, Dialect.ANTHROPIC),
        ("/v1/chat/completions", True, Dialect.OPENAI),
        ("/v1/models", True, Dialect.ANTHROPIC),
        ("/v1/models", False, Dialect.OPENAI),
        ("/", False, Dialect.OPENAI),
    ],
)
def test_an_answer_is_in_the_dialect_that_the_client_speaks(
    path: str, anthropic_headers: bool, dialect: Dialect
) -> None:
    assert dialect_of(path, speaks_anthropic=anthropic_headers) is dialect
