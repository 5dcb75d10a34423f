"""The estimate learns what providers report, forgets what is not used, and never takes a picture for text."""

from __future__ import annotations

import base64
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.decide.estimate import Estimate, LearnedRatios, non_text_bytes


def test_without_a_past_a_token_is_four_bytes() -> None:
    assert LearnedRatios().estimate("key", "gpt-4o", 4_001) == Estimate(1_001, samples=0, relative_error=1.0)


def test_estimate_converges_on_what_the_provider_reports() -> None:
    learned, chance = LearnedRatios(), random.Random(7)
    for _ in range(200):
        size_bytes = chance.randrange(500, 50_000)
        learned.observe("key", "m", size_bytes, round(size_bytes * 0.45 * chance.uniform(0.95, 1.05)))
    estimate = learned.estimate("key", "m", 10_000)
    assert estimate.samples == 200
    assert abs(estimate.tokens - 4_500) / 4_500 < 0.05
    assert estimate.relative_error < 0.06


def test_error_shows_that_a_key_has_changed_what_it_sends() -> None:
    learned = LearnedRatios()
    for _ in range(50):
        learned.observe("key", "m", 1_000, 200)
    settled = learned.estimate("key", "m", 1_000).relative_error
    learned.observe("key", "m", 1_000, 800)
    assert learned.estimate("key", "m", 1_000).relative_error > settled + 0.1
    for _ in range(50):
        learned.observe("key", "m", 1_000, 800)
    estimate = learned.estimate("key", "m", 1_000)
    assert abs(estimate.tokens - 800) <= 2
    assert estimate.relative_error < 0.01


def test_a_new_key_starts_from_the_models_average_and_keys_do_not_mix() -> None:
    learned = LearnedRatios()
    for _ in range(30):
        learned.observe("code", "m", 1_000, 400)
    assert learned.estimate("new", "m", 1_000).tokens == 400
    learned.observe("new", "m", 1_000, 100)
    assert learned.estimate("new", "m", 1_000).tokens == 100
    assert learned.estimate("code", "m", 1_000).tokens == 400
    assert learned.estimate("code", "another", 1_000).samples == 0


def test_the_longest_unused_is_forgotten_first() -> None:
    learned = LearnedRatios(capacity=5)  # each observation takes two places, one of them the model's
    learned.observe("kept", "m", 1_000, 500)
    for number in range(20):
        learned.estimate("kept", "m", 1_000)
        learned.observe(f"key-{number}", "m", 1_000, 100)
    assert len(learned) == 5
    assert learned.estimate("kept", "m", 1_000).tokens == 500
    assert learned.estimate("key-19", "m", 1_000).samples == 1
    assert learned.estimate("key-0", "m", 1_000) == learned.estimate("never seen", "m", 1_000)


@pytest.mark.parametrize(("size_bytes", "tokens"), [(0, 5), (5, 0), (-1, 5), (5, -1)])
def test_nothing_is_learned_from_nothing(size_bytes: int, tokens: int) -> None:
    learned = LearnedRatios()
    learned.observe("key", "m", size_bytes, tokens)
    assert len(learned) == 0


@given(st.lists(st.tuples(st.integers(-5, 10**9), st.integers(-5, 10**9)), max_size=30), st.integers(-5, 10**9))
def test_estimates_stay_within_four_tokens_a_byte(observed: list[tuple[int, int]], size_bytes: int) -> None:
    learned = LearnedRatios()
    for request_bytes, tokens in observed:
        learned.observe("key", "m", request_bytes, tokens)
    assert 0 <= learned.estimate("key", "m", size_bytes).tokens <= max(0, 4 * size_bytes) + 1


def test_output_is_learned_apart_for_streams_and_whole_answers() -> None:
    learned = LearnedRatios()
    prior = learned.estimate_output("m", "chat", stream=True, response_bytes=18_000)
    assert prior == Estimate(100, samples=0, relative_error=1.0)
    assert learned.estimate_output("m", "chat", stream=False, response_bytes=600).tokens == 100
    for _ in range(10):
        learned.observe_output("m", "chat", stream=True, response_bytes=25_000, output_tokens=100)
    assert learned.estimate_output("m", "chat", stream=True, response_bytes=12_500).tokens == 50
    assert learned.estimate_output("m", "chat", stream=False, response_bytes=600).samples == 0
    assert learned.estimate_output("m", "messages", stream=True, response_bytes=600).samples == 0


PICTURE = base64.b64encode(bytes(range(256)) * 12).decode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"image_url": {"url": f"data:image/png;base64,{PICTURE}"}}], len(PICTURE)),
        ([{"image_url": {"url": f"data:image/png;base64,{PICTURE}"}}] * 3, 3 * len(PICTURE)),
        ([{"source": {"type": "base64", "data": PICTURE}}], len(PICTURE)),
        ([{"file": {"file_data": f"data:application/pdf;base64,{PICTURE}"}}], len(PICTURE)),
        ([{"input_audio": {"format": "wav", "data": PICTURE}}], len(PICTURE)),
        ("the field is called data", 0),
        ([{"data": "short"}], 0),
        ("a plain text about ;base64, and more", 0),
    ],
)
def test_base64_is_not_text(content: object, expected: int) -> None:
    for indent in (None, 2):
        body = json.dumps({"messages": [{"role": "user", "content": content}]}, indent=indent).encode()
        assert non_text_bytes(body) == expected


@given(st.lists(st.sampled_from([b";base64,", b'data"', b'"', b":", b" ", b"A" * 600, b"{", b"\xff"])))
def test_no_byte_is_taken_off_twice(parts: list[bytes]) -> None:
    body = b"".join(parts)
    assert 0 <= non_text_bytes(body) <= len(body)


def test_more_pictures_than_any_provider_takes_count_as_text() -> None:
    assert non_text_bytes(b";base64,AAAA " * 5_000) == 2_000 * 4
