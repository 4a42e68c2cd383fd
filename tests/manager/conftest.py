"""Fixtures of the tests of the service manager."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from managed import Home


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    """A home that the tests of one file share. In the end everything is stopped, and nothing may be left over."""
    segments = set(Path("/dev/shm").iterdir())
    # Not pytest's own folder: its name is too long for sockets.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        made = Home(Path(folder))
        yield made
        made.run("stop", "--all", "--timeout=5")
        assert made.processes() == []
        assert list(made.runtime.iterdir()) == []
        assert [path for path in made.path.rglob("*") if path.is_socket()] == []
        assert set(Path("/dev/shm").iterdir()) <= segments
