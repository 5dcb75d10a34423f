"""decide, step by step: where a request goes and what is changed on it, with a meter that counts nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.decide.pipeline import Admitted, Decider
from extproc.decision import Decision
from extproc.errors import Code, Dialect
from extproc.exchange import Respond, Route
from tests.deciding import (
    ALL,
    ANTHROPIC,
    CHAT,
    CLAUDE,
    NARROW,
    ORPHAN,
    SNAPSHOT,
    FixedMeter,
    assert_refusal,
    event,
    outcome,
    routed,
)

# Routing


async def test_a_request_whose_model_stays_is_forwarded_untouched() -> None:
    route, decision = await routed(CHAT)
    assert (route.chain, route.body) == (("east",), None)
    assert decision == Decision(
        dialect=Dialect.OPENAI,
        endpoint="chat",
        request_id="id-1",
        path="/v1/chat/completions",
        team="all",
        project="p",
        user="u",
        agent="a",
        key_id="all-1",
        alias="plain",
        model_in_body="plain",
        providers=("east",),
        models=("plain",),
        input_tokens=42,
        input_exact=True,
        text_bytes=len(json.dumps(CHAT)),
        revision=SNAPSHOT.revision,
    )


async def test_the_meter_is_asked_for_the_model_that_will_be_called() -> None:
    meter = FixedMeter()
    decider = Decider(SNAPSHOT, meter, Random(0))
    admitted = decider.admit(event())
    assert isinstance(admitted, Admitted)
    await decider.decide(admitted, b'{"model":"alias","messages":[]}')
    assert meter.asked == [("chat", "all-1", "real")]


async def test_an_alias_is_renamed_in_the_body_and_nothing_else_is_touched() -> None:
    body = b'{ "seed":12345678901234567890123,\t"model" : "alias", "n":-0, "messages":[1.0]\n}'
    route, decision = await routed(body)
    assert route.body == body.replace(b'"alias"', b'"real"')
    assert (route.chain, decision.alias, decision.model_in_body, decision.models) == (
        ("east",),
        "alias",
        "real",
        ("real",),
    )
    assert ("content-length", str(len(route.body))) in route.set_headers


async def test_only_attempts_whose_model_differs_from_the_body_go_through_adapt() -> None:
    route, decision = await routed({**CHAT, "model": "chain"})
    assert route.chain == ("east", "west/adapt", "west")
    assert (decision.providers, decision.models) == (("east", "west", "west"), ("one", "two", "one"))
    assert ("x-envoy-max-retries", "2") in route.set_headers


async def test_weights_draw_the_first_attempt_and_the_loser_is_the_next() -> None:
    chains = Counter([(await routed({**CHAT, "model": "weighted"}, seed))[0].chain for seed in range(400)])
    assert set(chains) == {("east", "west"), ("west", "east")}
    assert 0.65 < chains["east", "west"] / 400 < 0.85


async def test_a_glob_serves_the_name_that_was_asked_for_with_its_own_timeouts() -> None:
    route, decision = await routed({**CHAT, "model": "glob-7"})
    assert (route.chain, decision.models) == (("west",), ("glob-7",))
    headers = dict(route.set_headers)
    assert headers["x-envoy-upstream-rq-per-try-timeout-ms"] == "3000"
    assert headers["x-extproc-idle-ms"] == "77000"


@pytest.mark.parametrize(("change", "cluster"), [({}, "east"), (ANTHROPIC, "claude")])
async def test_only_providers_that_speak_the_clients_dialect_are_tried(change: dict[str, Any], cluster: str) -> None:
    route, decision = await routed({**CHAT, "model": "both"}, **change)
    assert route.chain == (cluster,)
    assert decision.dialect is (Dialect.ANTHROPIC if change else Dialect.OPENAI)


# Usage in streams

STREAM_OPTIONS: list[tuple[bytes, bytes | None, bool]] = [
    (b"", b',"stream_options":{"include_usage":true}', True),
    (b',"stream_options":null', b',"stream_options":{"include_usage":true}', True),
    (b',"stream_options":{}', b',"stream_options":{"include_usage":true}', True),
    (b',"stream_options": { "x" : 1 }', b',"stream_options": { "x" : 1 ,"include_usage":true}', True),
    (b',"stream_options":{"include_usage": false}', b',"stream_options":{"include_usage": true}', True),
    (b',"stream_options":{"include_usage":null,"x":1}', b',"stream_options":{"include_usage":true,"x":1}', True),
    (b',"stream_options":{"include_usage":true}', None, False),
]


@pytest.mark.parametrize(("options", "sent", "hidden"), STREAM_OPTIONS)
async def test_usage_is_asked_for_where_the_client_did_not_and_then_hidden(
    options: bytes, sent: bytes | None, hidden: bool
) -> None:
    frame = b'{"model":"plain","messages":[],"stream":true%b}'
    route, decision = await routed(frame % options)
    assert route.body == (None if sent is None else frame % sent)
    assert (decision.stream, decision.hide_usage) == (True, hidden)


@pytest.mark.parametrize(
    ("change", "headers"),
    [
        ({"stream": False}, {}),
        ({"stream": None}, {}),
        ({"model": "quiet", "stream": True}, {}),
        ({"stream": True, "input": "x"}, {"path": "/v1/responses"}),
        ({"model": "both", "stream": True}, ANTHROPIC),
    ],
)
async def test_usage_is_not_asked_for_where_it_comes_anyway_or_would_be_refused(
    change: dict[str, Any], headers: dict[str, Any]
) -> None:
    route, decision = await routed({**CHAT, **change}, **headers)
    assert route.body is None
    assert not decision.hide_usage


# Pass-through


async def test_what_names_no_model_goes_to_the_default_provider_with_its_query() -> None:
    path = "/v1/files?purpose=batch&limit=2"
    route, decision = await routed(b"", method="GET", path=path, ends=True)
    assert (route.chain, route.body, decision.path, decision.alias) == (("east",), None, path, "")


@pytest.mark.parametrize(
    ("key", "code"),
    [(NARROW, Code.MODEL_NOT_ALLOWED), (ORPHAN, Code.NO_DEFAULT_PROVIDER), (CLAUDE, Code.NO_DEFAULT_PROVIDER)],
)
async def test_what_names_no_model_needs_a_right_to_all_and_a_provider_that_speaks(key: str, code: Code) -> None:
    refused = await outcome(b"", method="GET", path="/v1/files", ends=True, key=key)
    assert_refusal(refused, code, key_id={NARROW: "narrow-1", ORPHAN: "orphan-1", CLAUDE: "claude-1"}[key])


async def test_a_model_in_a_pass_through_body_routes_nothing() -> None:
    route, decision = await routed({"model": "sonnet", "training_file": "f"}, path="/v1/fine_tuning/jobs")
    assert (route.chain, route.body, decision.alias) == (("east",), None, "")


# Models


@pytest.mark.parametrize(
    ("key", "names"),
    [(ALL, ["plain", "alias", "chain", "weighted", "quiet", "sonnet", "both"]), (NARROW, ["plain"])],
)
async def test_models_lists_what_the_key_may_use(key: str, names: list[str]) -> None:
    listed = await outcome(b"", method="GET", path="/v1/models", ends=True, key=key)
    assert isinstance(listed, Respond)
    document = json.loads(listed.body)
    assert [entry["id"] for entry in document["data"]] == names
    assert (listed.status, document["object"]) == (200, "list")


async def test_models_has_anthropics_shape_for_anthropics_clients() -> None:
    listed = await outcome(b"", method="GET", path="/v1/models", ends=True, key=ALL, anthropic_version="2023-06-01")
    assert isinstance(listed, Respond)
    document = json.loads(listed.body)
    assert (document["first_id"], document["last_id"], document["has_more"]) == ("plain", "both", False)
    assert document["data"][0]["type"] == "model"


@pytest.mark.parametrize("name", ["sonnet", "glob-secret", "glob-", "", "Plain", "plain/", "\xff"])
async def test_a_model_that_the_key_may_not_use_can_not_be_looked_up(name: str) -> None:
    refused = await outcome(b"", method="GET", path=f"/v1/models/{name or ' '}", ends=True, key=NARROW)
    assert_refusal(refused, Code.MODEL_NOT_FOUND, key_id="narrow-1")


# Whatever a client sends


@given(
    body=st.binary(max_size=200)
    | st.builds(lambda text: b'{"model":' + text + b',"messages":[]}', st.binary(max_size=60)),
    path=st.sampled_from(
        ("/v1/chat/completions", "/v1/messages", "/v1/files", "/v1/audio/translations", "/v1/models/x")
    ),
    content_type=st.sampled_from(("application/json", "multipart/form-data; boundary=b", "", "x/y")),
)
async def test_no_bytes_make_decide_fail_or_send_anything_to_a_provider_unjudged(
    body: bytes, path: str, content_type: str
) -> None:
    found = await outcome(body, path=path, content_type=content_type, key=NARROW)
    if isinstance(found, Route):
        decision = Decision.from_metadata(found.metadata)
        assert decision is not None
        assert decision.alias == "plain" or decision.alias.startswith("glob-")
    else:
        assert found.status in (400, 401, 403, 404, 405, 413, 415)


NAMES = st.text(max_size=20)


@given(
    st.builds(
        Decision,
        dialect=st.sampled_from(Dialect),
        endpoint=NAMES,
        request_id=NAMES,
        path=NAMES,
        team=NAMES,
        alias=NAMES,
        providers=st.lists(NAMES, max_size=3).map(tuple),
        models=st.lists(NAMES, max_size=3).map(tuple),
        stream=st.booleans(),
        hide_usage=st.booleans(),
        input_tokens=st.integers(0, 10**12),
        input_exact=st.booleans(),
        code=NAMES,
    )
)
def test_a_decision_is_read_as_it_was_written(decision: Decision) -> None:
    assert Decision.from_metadata(decision.to_metadata()) == decision


def test_no_decision_is_read_where_none_was_made() -> None:
    assert Decision.from_metadata({}) is None
    assert Decision.from_metadata({"path": "/v1/files"}) is None


async def test_decide_follows_the_snapshot_it_was_made_for() -> None:
    other = replace(SNAPSHOT, keys={})
    refused = Decider(other, FixedMeter(), Random(0)).admit(event())
    assert_refusal(refused, Code.INVALID_KEY)
    assert isinstance(Decider(SNAPSHOT, FixedMeter(), Random(0)).admit(event()), Admitted)
