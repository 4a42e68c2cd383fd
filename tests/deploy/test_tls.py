"""The server's certificate, and the options with which curl trusts it."""

from __future__ import annotations

import http.server
import shlex
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_server_file import make_certificate

from foveate.config import HttpSettings
from foveate.deploy.tls import Certificate, read_certificate
from foveate.deploy.welcome import curl_line


def certificate_for(folder: Path, names: str) -> Certificate:
    """Make a certificate and read it as the server does."""
    make_certificate(folder, names)
    files = HttpSettings(tls_cert=str(folder / "cert.pem"), tls_key=str(folder / "key.pem"))
    certificate = read_certificate(files)
    assert certificate is not None
    return certificate


class Nothing(http.server.BaseHTTPRequestHandler):
    """Answers every request with its host."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.headers["host"].encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def port(certificate: Certificate) -> Iterator[int]:
    """The port of a server with the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    with http.server.HTTPServer(("127.0.0.1", 0), Nothing) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(params=["IP:127.0.0.1", "DNS:models.example", "DNS:*.example,DNS:models.example,IP:10.0.0.1"])
def certificate(tmp_path: Path, request: pytest.FixtureRequest) -> Certificate:
    """One for an address or for names."""
    return certificate_for(tmp_path, request.param)


def test_curl_is_told_what_it_needs(certificate: Certificate, port: int) -> None:
    assert not certificate.is_trusted
    line = curl_line(f"https://127.0.0.1:{port}", "model", has_key=False, certificate=certificate)
    result = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True, timeout=30)
    assert result.stdout.strip() == (
        f"127.0.0.1:{port}" if certificate.names == ("127.0.0.1",) else f"models.example:{port}"
    )


def test_a_certificate_that_the_machine_trusts_needs_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_certificate(tmp_path, "IP:::1")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    certificate = certificate_for(tmp_path, "IP:::1")
    assert certificate.is_trusted
    assert certificate.names == ("0:0:0:0:0:0:0:1",)
    words = shlex.split(curl_line("https://[::1]:1", "model", has_key=False, certificate=certificate))
    assert words[:5] == ["curl", "-s", "-w", "\\n", "https://[::1]:1/v1/chat/completions"]


def test_without_a_certificate_it_is_http() -> None:
    assert read_certificate(HttpSettings()) is None
