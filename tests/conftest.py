"""Fixtures that several packages' tests share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from serving import RunningServer, running_server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, so that one command is right everywhere."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The tiny model of the golden data, served with the defaults and shared by all tests."""
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Return a function that waits until something is true, and fails if it never is."""

    def wait(condition: Callable[[], bool]) -> None:
        for _ in range(300):
            if condition():
                return
            time.sleep(0.1)
        pytest.fail("it never came true")

    return wait
