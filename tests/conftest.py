"""What all tests share: the PostgreSQL fixtures and the option that rewrites golden files."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.postgres"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files, and remove those of no case")
