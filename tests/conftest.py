"""What all tests share: PostgreSQL fixtures, the option that rewrites golden files, hypothesis without deadlines."""

from __future__ import annotations

import pytest
from hypothesis import settings

# A busy machine is no fault of the code: what must be fast says so in its own test.
settings.register_profile("extproc", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=20)  # `make check`
settings.load_profile("extproc")

pytest_plugins = ["tests.postgres"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files, and remove those of no case")
