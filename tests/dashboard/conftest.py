"""A server that has something to show."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest
from asked import PICTURES, ask, pictured
from serving import RunningServer, running_server


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that has answered about pictures, one of them twice, and has refused a few requests."""
    with running_server(tmp_path_factory.mktemp("busy")) as server:
        for file in (*PICTURES[:2], PICTURES[0]):
            shown = pictured("data:image/png;base64," + base64.b64encode(file.read_bytes()).decode())
            assert ask(server.url, shown).status_code == 200
        assert ask(server.url, "Hello", model="<b>bold</b><img src=x onerror=alert(1)>").status_code == 404
        secret = ask(server.url, pictured("ftp://host.example/secret-picture?key=0123"))
        assert secret.status_code == 400
        yield server
