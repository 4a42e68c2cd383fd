"""Fixtures of the tests with whole servers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Where the instance's directory goes; in the end nothing may be left in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)
        assert not list(Path(folder).iterdir())


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for requests that take a while."""
    with ThreadPoolExecutor(8) as made:
        yield made
