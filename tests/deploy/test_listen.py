from __future__ import annotations

import socket

import pytest

from foveate.config import HttpSettings
from foveate.deploy.listen import listen, url_of
from foveate.errors import ConfigError
from foveate.hosts import is_loopback


def test_port_0_gives_a_free_port_that_accepts() -> None:
    with listen(HttpSettings(port=0)) as listener:
        host, port = listener.getsockname()
        assert url_of(listener) == f"http://127.0.0.1:{port}"
        with socket.create_connection((host, port)):
            pass


def test_a_second_server_on_the_port_is_refused() -> None:
    with listen(HttpSettings(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {port} on 127.0.0.1 is in use"):
            listen(HttpSettings(port=port))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com", ""])
def test_not_loopback_needs_a_key(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="--api-key"):
        listen(HttpSettings(host=host, port=0))


def test_with_a_key_every_address_may_be_listened_on() -> None:
    with listen(HttpSettings(host="0.0.0.0", port=0, api_key=["key"])) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ConfigError, match=r"--host: 192\.0\.2\.1 is not an address of this machine"):
        listen(HttpSettings(host="192.0.2.1", port=0, api_key=["key"]))
