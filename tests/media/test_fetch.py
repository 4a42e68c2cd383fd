"""Fetching pictures from a real server on this machine, a private address unless allowed."""

from __future__ import annotations

import asyncio
import base64
import shutil
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.config import MediaSettings
from foveate.errors import FetchError, FoveateError, PictureError
from foveate.media.fetch import MAX_REDIRECTS, MediaFetcher, is_public

BODY = b"\x89PNG and so on"
LIMIT = 1000
LOCAL = ["127.0.0.1"]


class Handler(BaseHTTPRequestHandler):
    """Answers by path, and remembers the headers of every request."""

    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self)
        path, _, argument = self.path.partition("?")
        argument = unquote(argument)
        match path:
            case "/picture":
                self.answer(200, BODY)
            case "/whoami":
                self.answer(200, self.server.name)
            case "/status":
                self.answer(int(argument), b"sorry")
            case "/redirect":
                self.answer(302, b"", Location=argument)
            case "/loop":
                left = int(argument)
                self.answer(307, b"", Location=f"/loop?{left - 1}" if left > 1 else "/picture")
            case "/large":
                self.answer(200, b"x" * (LIMIT + 1))
            case "/lies":
                self.answer(200, b"x", **{"Content-Length": str(10**9)})
            case "/endless":
                self.endless()
            case "/packed":
                self.answer(200, b"\x1f\x8b", **{"Content-Encoding": "gzip"})
            case "/cookie":
                self.answer(302, b"", **{"Location": "/picture", "Set-Cookie": "a=b"})
            case "/slow":
                self.server.released.wait(30)
            case "/drip":
                self.drip()

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def endless(self) -> None:
        """A body without Content-Length, until the client has enough."""
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 300)
        except OSError:
            self.server.given_up.set()

    def drip(self) -> None:
        """A byte now and then, so that no single read takes long."""
        self.send_response(200)
        self.end_headers()
        try:
            while not self.server.released.wait(0.02):
                self.wfile.write(b"x")
        except OSError:
            self.server.given_up.set()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: str = "127.0.0.1", port: int = 0, name: bytes = b"first") -> None:
        super().__init__((address, port), Handler)
        self.name = name
        self.requests: list[Handler] = []
        self.released = threading.Event()
        self.given_up = threading.Event()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


@contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as server:
        yield server


class Names:
    """A resolver that gives each name's answers in turn, and the last one for ever."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): rounds for name, rounds in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        rounds = self.answers.get(host, [[host]])
        return rounds.pop(0) if len(rounds) > 1 else rounds[0]


@asynccontextmanager
async def fetcher(
    resolver: Names | None = None, context: ssl.SSLContext | None = None, **settings: Any
) -> AsyncIterator[MediaFetcher]:
    resolving = {} if resolver is None else {"resolver": resolver}
    made = MediaFetcher(MediaSettings(max_image_bytes=LIMIT, **settings), ssl_context=context, **resolving)
    try:
        yield made
    finally:
        await made.close()


async def refusal(url: str, error: type[FoveateError] = FetchError, **kwargs: Any) -> str:
    """Fetch what must not be fetched; return the reason."""
    async with fetcher(**kwargs) as fetching:
        with pytest.raises(error) as raised:
            await fetching.fetch(url)
    assert type(raised.value) is error
    return raised.value.message


# --- http -----------------------------------------------------------------------------------------


async def test_a_picture(server: Server) -> None:
    async with fetcher(allow_private_media=True) as fetching:
        assert await fetching.fetch(server.url("/picture#fragment")) == BODY
        assert await fetching.fetch(server.url("/picture", host="localhost", scheme="HTTP")) == BODY


async def test_many_at_once(server: Server) -> None:
    async with fetcher(allow_private_media=True) as fetching:
        bodies = await asyncio.gather(*(fetching.fetch(server.url("/picture")) for _ in range(50)))
    assert bodies == [BODY] * 50


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "0", "[::ffff:7f00:1]"])
async def test_private_addresses_are_refused(server: Server, host: str) -> None:
    message = await refusal(server.url("/picture", host=host))
    assert "not public" in message or "cannot be resolved" in message
    assert server.requests == []


async def test_one_private_address_among_public_ones_is_enough(server: Server) -> None:
    names = Names(mixed_test=[["93.184.216.34", "127.0.0.1"]])
    assert "not public" in await refusal(server.url("/picture", host="mixed.test"), resolver=names)
    assert server.requests == []


async def test_allowed_hosts(server: Server) -> None:
    names = Names(pictures_test=[LOCAL], other_test=[LOCAL])
    allowed = ["Pictures.test."]
    async with fetcher(names, allowed_media_hosts=allowed) as fetching:
        assert await fetching.fetch(server.url("/picture", host="PICTURES.test")) == BODY
    assert server.requests[0].headers["Host"] == f"pictures.test:{server.port}"
    url = server.url("/picture", host="other.test")
    assert "not public" in await refusal(url, resolver=names, allowed_media_hosts=allowed)


async def test_a_redirect_to_a_private_address_is_refused(server: Server) -> None:
    names = Names(pictures_test=[LOCAL])
    url = server.url(f"/redirect?{server.url('/picture')}", host="pictures.test")
    message = await refusal(url, resolver=names, allowed_media_hosts=["pictures.test"])
    assert "127.0.0.1 has an address that is not public" in message
    assert [request.path.partition("?")[0] for request in server.requests] == ["/redirect"]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://127.0.0.1/x"])
async def test_a_redirect_to_another_scheme_is_refused(server: Server, target: str) -> None:
    message = await refusal(server.url(f"/redirect?{target}"), allow_private_media=True)
    assert "neither an http: nor an https: URL" in message


async def test_redirects_are_counted(server: Server) -> None:
    async with fetcher(allow_private_media=True) as fetching:
        assert await fetching.fetch(server.url(f"/loop?{MAX_REDIRECTS}")) == BODY
    message = await refusal(server.url(f"/loop?{MAX_REDIRECTS + 1}"), allow_private_media=True)
    assert "more than 5 redirects" in message


async def test_a_name_is_resolved_once_a_hop(server: Server) -> None:
    """Rebinding: the second answer would lead to another server, but nobody asks for it."""
    with running(Server("127.0.0.2", server.port, b"second")):
        names = Names(rebind_test=[LOCAL, ["127.0.0.2"]])
        async with fetcher(names, allowed_media_hosts=["rebind.test"]) as fetching:
            assert await fetching.fetch(server.url("/whoami", host="rebind.test")) == b"first"
            assert names.asked == ["rebind.test"]
            assert await fetching.fetch(server.url("/whoami", host="rebind.test")) == b"second"


async def test_every_hop_is_checked_anew(server: Server) -> None:
    """The same name again, now with a private address: its first answer buys it nothing."""
    names = Names(start_test=[LOCAL], rebind_test=[["127.0.0.1"]])
    target = server.url("/picture", host="rebind.test")
    url = server.url(f"/redirect?{target}", host="start.test")
    assert "rebind.test" in await refusal(url, resolver=names, allowed_media_hosts=["start.test"])
    assert names.asked == ["start.test", "rebind.test"]


async def test_the_next_address_is_tried(server: Server) -> None:
    names = Names(two_test=[["127.0.0.3", "127.0.0.1"]])  # nobody listens on the first one
    async with fetcher(names, allow_private_media=True) as fetching:
        assert await fetching.fetch(server.url("/picture", host="two.test")) == BODY


@pytest.mark.parametrize("status", [204, 206, 401, 404, 500])
async def test_other_statuses_are_named(server: Server, status: int) -> None:
    message = await refusal(server.url(f"/status?{status}"), allow_private_media=True)
    assert f"status {status}" in message


@pytest.mark.parametrize("path", ["/large", "/lies", "/endless"])
async def test_too_many_bytes(server: Server, path: str) -> None:
    message = await refusal(server.url(path), PictureError, allow_private_media=True)
    assert "more than the 1000 bytes" in message


async def test_an_endless_body_is_hung_up_on(server: Server) -> None:
    await refusal(server.url("/endless"), PictureError, allow_private_media=True)
    assert await asyncio.to_thread(server.given_up.wait, 30)


@pytest.mark.parametrize("path", ["/slow", "/drip"])
async def test_slow_servers(server: Server, path: str) -> None:
    message = await refusal(server.url(path), allow_private_media=True, media_total_seconds=0.2)
    assert "longer than 0.2 seconds" in message


async def test_compressed_bodies_are_refused(server: Server) -> None:
    assert "gzip" in await refusal(server.url("/packed"), allow_private_media=True)
    assert server.requests[0].headers["Accept-Encoding"] == "identity"


async def test_cookies_are_not_kept(server: Server) -> None:
    async with fetcher(allow_private_media=True) as fetching:
        assert await fetching.fetch(server.url("/cookie")) == BODY
    assert [request.headers["Cookie"] for request in server.requests] == [None, None]


async def test_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    async with fetcher(allow_private_media=True) as fetching:
        assert await fetching.fetch(server.url("/picture")) == BODY


async def test_nobody_listens() -> None:
    with running(Server()) as server:
        url = server.url("/picture")
    assert "fetching failed" in await refusal(url, allow_private_media=True)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "only data:, http: and https:"),
        ("picture.png", "only data:, http: and https:"),
        ("ftp://example.org/a.png", "only data:, http: and https:"),
        ("javascript:alert(1)", "only data:, http: and https:"),
        ("http", "neither an http: nor an https:"),
        ("http://", "names no host"),
        ("http:///a.png", "names no host"),
        ("http://user:secret@127.0.0.1/", "user name or password"),
        ("http://127.0.0.1:99999/", "no port 99999"),
        ("http://127.0.0.1:0/", "no port 0"),
        ("http://127.0.0.1:x/", "not valid"),
        ("http://exam\ud800ple.org/", "not valid"),
        ("http://127.0.0.1/\ud800", "not valid"),
        ("http://exa\x00mple.org/", "not valid"),
        (f"http://{'a' * 70}.org/", "cannot be resolved|not valid"),
        ("http://127.0.0.1/" + "a" * 70_000, "not valid"),
    ],
)
async def test_urls_that_are_none(url: str, complaint: str) -> None:
    async with fetcher() as fetching:
        with pytest.raises(FetchError, match=complaint) as raised:
            await fetching.fetch(url)
    assert len(raised.value.message) < 400
    assert raised.value.message.isprintable()


@given(
    st.sampled_from(["http:", "https:", "data:", "data:image/png;base64,", "file:", "file:///", "http://a"]),
    st.text(st.sampled_from("abc/:@[]%?#;,=.\\ \x00\nä中\ud800")) | st.text(st.characters(), max_size=20),
)
@settings(max_examples=400, deadline=None)
def test_any_url_is_answered_or_refused(prefix: str, rest: str) -> None:
    async def nowhere(host: str, port: int) -> list[str]:
        raise OSError("no such host")

    async def fetch() -> bytes:
        settings = MediaSettings(allow_private_media=True, allowed_media_path="/nowhere")
        fetching = MediaFetcher(settings, resolver=nowhere, ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        try:
            return await fetching.fetch(prefix + rest)
        finally:
            await fetching.close()

    try:
        result: bytes | str = asyncio.run(fetch())
    except (FetchError, PictureError) as error:
        result = error.message
    if isinstance(result, bytes):
        assert prefix.startswith("data:")
        assert len(result) <= 4 * len(rest)
    else:
        assert result.isprintable()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:8.8.8.8", False),
        ("64:ff9b::808:808", False),
        ("64:ff9b:1::808:808", False),
        ("2002:808:808::1", False),
        ("fc00::1", False),
        ("fe80::1%1", False),
        ("fec0::1", False),
        ("ff0e::1", False),
    ],
)
def test_what_is_public(address: str, public: bool) -> None:
    assert is_public(address) is public


# --- https ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for pictures.test alone, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    extensions = [
        "-addext",
        "subjectAltName=DNS:pictures.test",
        "-keyout",
        str(file),
        "-out",
        str(file) + ".crt",
    ]
    subprocess.run(
        ["openssl", "req", *options, "-subj", "/CN=pictures.test", *extensions],
        check=True,
        capture_output=True,
    )
    file.write_text(file.read_text() + Path(str(file) + ".crt").read_text())
    return file


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server):
        yield server


async def test_the_certificate_is_the_name_s_although_an_address_is_connected_to(
    tls_server: Server, certificate: Path
) -> None:
    names = Names(pictures_test=[LOCAL], other_test=[LOCAL])
    trust = ssl.create_default_context(cafile=str(certificate))
    async with fetcher(names, trust, allow_private_media=True) as fetching:
        assert await fetching.fetch(tls_server.url("/picture", "pictures.test", "https")) == BODY
    other = tls_server.url("/picture", "other.test", "https")
    assert "certificate" in await refusal(other, resolver=names, context=trust, allow_private_media=True)


async def test_an_unknown_certificate_is_refused(tls_server: Server) -> None:
    names = Names(pictures_test=[LOCAL])
    url = tls_server.url("/picture", "pictures.test", "https")
    assert "certificate" in await refusal(url, resolver=names, allow_private_media=True)


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{base64.b64encode(BODY).decode()}",
        f"DATA:Image/PNG;name=a.png;BASE64,{base64.b64encode(BODY).decode()}",
        f"data:;base64,{base64.b64encode(BODY).decode().replace('=', '%3D').replace('+', '%2B')}",
        "data:image/png,%89PNG%20and%20so on",
        "data:,%89PNG and so on",
    ],
)
async def test_data_urls(url: str) -> None:
    async with fetcher() as fetching:
        assert await fetching.fetch(url) == BODY


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("data:image/png;base64", "comma"),
        ("data:text/html;base64,AAAA", "'text/html' is not a picture"),
        ("data:application/octet-stream,abc", "'application/octet-stream' is not a picture"),
        ("data:image/png;base64,AAA", "base64"),
        ("data:image/png;base64,AA AA", "base64"),
        ("data:image/png;base64,AAAA====AAAA", "base64"),
        ("data:image/png;base64,A-_A", "base64"),
        ("data:image/png;base64,ÄÄÄÄ", "base64"),
        ("data:image/png;base64,%ff%00", "base64"),
        ("data:image/png;base64," + "A" * 1340, "more than the 1000 bytes"),
        ("data:image/png;base64," + "A" * 10_000_000, "more than the 1000 bytes"),
        ("data:image/png," + "A" * 1001, "more than the 1000 bytes"),
        ("data:image/png," + "%41" * 1001, "more than the 1000 bytes"),
        ("data:" + "x" * 10_000 + ",", "not a picture"),
    ],
)
async def test_malformed_data_urls(url: str, complaint: str) -> None:
    message = await refusal(url, PictureError)
    assert complaint in message
    assert len(message) < 300
    assert "AAAA" not in message


async def test_the_largest_data_urls() -> None:
    async with fetcher() as fetching:
        for payload in (
            ";base64," + base64.b64encode(b"x" * LIMIT).decode(),
            "," + "%78" * LIMIT,
            "," + "x" * LIMIT,
        ):
            assert await fetching.fetch("data:image/png" + payload) == b"x" * LIMIT


# --- file -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``allowed`` with a picture, beside a secret."""
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "a picture.png").write_bytes(BODY)
    (tmp_path / "secret.png").write_bytes(b"secret")
    return tmp_path


@pytest.mark.parametrize("prefix", ["file://", "file://localhost", "FILE:"])
async def test_files_of_the_allowed_folder(folder: Path, prefix: str) -> None:
    async with fetcher(allowed_media_path=str(folder / "allowed")) as fetching:
        assert await fetching.fetch(f"{prefix}{folder}/allowed/a%20picture.png") == BODY
        assert await fetching.fetch(f"{prefix}{folder}/allowed/x/../a%20picture.png") == BODY


async def test_files_are_not_fetched_without_a_folder(folder: Path) -> None:
    assert "not fetched" in await refusal(f"file://{folder}/allowed/a%20picture.png")


def link(folder: Path) -> str:
    (folder / "allowed" / "link.png").symlink_to(folder / "secret.png")
    return f"file://{folder}/allowed/link.png"


def linked_folder(folder: Path) -> str:
    (folder / "allowed" / "out").symlink_to(folder)
    return f"file://{folder}/allowed/out/secret.png"


def link_loop(folder: Path) -> str:
    (folder / "allowed" / "loop").symlink_to(folder / "allowed" / "loop")
    return f"file://{folder}/allowed/loop"


def large(folder: Path) -> str:
    (folder / "allowed" / "large.png").write_bytes(b"x" * (LIMIT + 1))
    return f"file://{folder}/allowed/large.png"


@pytest.mark.parametrize(
    ("name", "error", "complaint"),
    [
        (lambda f: f"file://{f}/secret.png", FetchError, "outside"),
        (lambda f: f"file://{f}/nothing.png", FetchError, "outside"),
        (lambda f: f"file://{f}/allowed/../secret.png", FetchError, "outside"),
        (lambda f: f"file://{f}/allowed/%2e%2e/secret.png", FetchError, "outside"),
        (lambda f: f"file://{f}/allowed2/a.png", FetchError, "outside"),
        (link, FetchError, "outside"),
        (linked_folder, FetchError, "outside"),
        (link_loop, FetchError, "cannot be read|names no file"),
        (large, PictureError, "more than the 1000 bytes"),
        (lambda f: f"file://{f}/allowed/nothing.png", FetchError, "cannot be read"),
        (lambda f: f"file://{f}/allowed", FetchError, "cannot be read|not name a file"),
        (lambda f: f"file://{f}/allowed/%00.png", FetchError, "names no file"),
        (lambda f: f"file://elsewhere{f}/allowed/a%20picture.png", FetchError, "looks like"),
        (lambda f: "file:allowed/a.png", FetchError, "looks like"),
    ],
)
async def test_files_that_are_refused(
    folder: Path, name: Callable[[Path], str], error: type[FoveateError], complaint: str
) -> None:
    async with fetcher(allowed_media_path=str(folder / "allowed")) as fetching:
        with pytest.raises(error, match=complaint):
            await fetching.fetch(name(folder))
