"""Who is asking: one credential, in either header, and never one of two."""

from __future__ import annotations

import hashlib
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.config.snapshot import Key, Snapshot
from extproc.config.source import load
from extproc.decide.identity import identify
from extproc.errors import Code, Refusal
from extproc.exchange import Headers

KEY, OTHER, NON_ASCII = "sk-one", "sk-two", "clé-ÿ-🔑"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    file = tmp_path_factory.mktemp("identity") / "gateway.yaml"
    keys = "".join(
        f"    - {{id: key-{number}, sha256: {hashlib.sha256(key.encode()).hexdigest()}}}\n"
        for number, key in enumerate((KEY, OTHER, NON_ASCII))
    )
    file.write_text(
        "providers: {demo: {kind: demo}}\nmodels: {demo: {targets: [{provider: demo}]}}\n"
        f'teams:\n  all:\n    models: ["*"]\n    keys:\n{keys}'
    )
    loaded = load(file, environ={}, require_secrets=True)
    assert isinstance(loaded, Snapshot), loaded
    return loaded


def identified(snapshot: Snapshot, *pairs: tuple[str, str]) -> str | Code:
    """The key's id, or the refusal's code. Values are sent as UTF-8."""
    first: dict[str, bytes] = {}
    repeats: list[tuple[str, bytes]] = []
    for name, value in pairs:
        if name in first:
            repeats.append((name, value.encode()))
        else:
            first[name] = value.encode()
    found = identify(Headers(MappingProxyType(first), repeats), snapshot)
    return found.code if isinstance(found, Refusal) else found.principal.key_id


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "bEaReR   "])
def test_a_bearer_token_is_a_key_with_its_scheme_in_any_case(snapshot: Snapshot, scheme: str) -> None:
    assert identified(snapshot, ("authorization", scheme + KEY)) == "key-0"


def test_x_api_key_is_a_key(snapshot: Snapshot) -> None:
    assert identified(snapshot, ("x-api-key", OTHER)) == "key-1"


def test_the_same_key_twice_passes(snapshot: Snapshot) -> None:
    assert identified(snapshot, ("authorization", f"Bearer {KEY}"), ("x-api-key", KEY)) == "key-0"


def test_an_empty_header_carries_no_key(snapshot: Snapshot) -> None:
    assert identified(snapshot, ("authorization", f"Bearer {KEY}"), ("x-api-key", "")) == "key-0"
    assert identified(snapshot, ("authorization", ""), ("x-api-key", KEY)) == "key-0"
    assert identified(snapshot, ("authorization", ""), ("x-api-key", "")) is Code.MISSING_KEY


def test_the_digest_is_of_the_bytes_that_were_sent(snapshot: Snapshot) -> None:
    assert identified(snapshot, ("authorization", f"Bearer {NON_ASCII}")) == "key-2"
    assert identified(snapshot, ("x-api-key", NON_ASCII)) == "key-2"


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param([("authorization", f"Bearer {KEY}"), ("x-api-key", OTHER)], id="two keys"),
        pytest.param([("authorization", f"Bearer {KEY}"), ("x-api-key", "garbage")], id="one of them wrong"),
        pytest.param([("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")], id="two bearers"),
        pytest.param([("authorization", f"Bearer {KEY},Bearer {OTHER}")], id="two bearers, joined by Envoy"),
        pytest.param([("authorization", f"Bearer {KEY}, basic {OTHER}")], id="a bearer and another scheme, joined"),
        pytest.param([("x-api-key", KEY), ("x-api-key", KEY)], id="two x-api-keys"),
    ],
)
def test_more_than_one_credential_is_refused(snapshot: Snapshot, pairs: list[tuple[str, str]]) -> None:
    assert identified(snapshot, *pairs) is Code.CONFLICTING_CREDENTIALS


@pytest.mark.parametrize(
    "value",
    [
        *(
            f"Basic {KEY}",
            KEY,
            "Bearer",
            f"Bearer\t{KEY}",
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
            "Bearer \x00",
            "Bearer é",
        ),
        *(f"Bearer {KEY.upper()}", f'Bearer "{KEY}"', f"Bearer {KEY} {KEY}", f"Bearer\u00a0{KEY}", f"Token {KEY}"),
    ],
)
def test_any_other_authorization_is_invalid(snapshot: Snapshot, value: str) -> None:
    assert identified(snapshot, ("authorization", value)) is Code.INVALID_KEY


def test_a_wrong_scheme_is_not_saved_by_a_good_key_beside_it(snapshot: Snapshot) -> None:
    assert identified(snapshot, ("authorization", "Basic Zm9v"), ("x-api-key", KEY)) is Code.INVALID_KEY


@pytest.mark.parametrize("name", ["api-key", "x-goog-api-key", "proxy-authorization", "cookie", "x_api_key"])
def test_a_key_elsewhere_is_none(snapshot: Snapshot, name: str) -> None:
    assert identified(snapshot, (name, KEY)) is Code.MISSING_KEY


@given(st.binary(max_size=60), st.booleans())
def test_no_bytes_raise_and_none_but_a_key_identify(snapshot: Snapshot, value: bytes, bearer: bool) -> None:
    header = {"authorization": b"Bearer " + value} if bearer else {"x-api-key": value}
    assert not isinstance(identify(Headers(header), snapshot), Key)
