"""Pictures by URL: ``data:``, ``http:``, ``https:``, and ``file:`` inside one folder. Safe by default.

A URL is a stranger's wish that this server open a connection. So each hop of it, redirects included, is
checked: its name is resolved once, every address of it must be a public one, and the connection goes to an
address that was checked. A name that resolves to something else a moment later gains nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import socket
import ssl
import stat
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Network, ip_address
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import httpx

from foveate.config import MediaSettings
from foveate.errors import FetchError, FoveateError, PictureError

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""From a host's name and a port to its addresses, best first. Raises OSError or UnicodeError."""

MAX_REDIRECTS = 5
MAX_CONCURRENT = 32
_FIRST_LOOK, _LAST_LOOK = 512, 2**16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# IPv6 addresses that carry an IPv4 address, on which another machine acts: mapped, 6to4, NAT64.
_EMBEDDING = tuple(map(IPv6Network, ("::ffff:0:0/96", "2002::/16", "64:ff9b::/96", "64:ff9b:1::/48")))


async def resolve(host: str, port: int) -> list[str]:
    """Ask the operating system for a host's addresses (a :data:`Resolver`)."""
    loop = asyncio.get_running_loop()
    answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in answers]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, as one machine's own address."""
    ip = ip_address(address)
    if ip.is_multicast or ip.is_reserved or not ip.is_global:
        return False
    if isinstance(ip, IPv4Address):
        return True
    return not ip.is_site_local and not any(ip in network for network in _EMBEDDING)


class MediaFetcher:
    """Fetches pictures for requests.

    Args:
        settings: what may be fetched, and how much of it.
        resolver: how names become addresses.
        ssl_context: which certificates are trusted; without one, httpx's default.
    """

    def __init__(
        self,
        settings: MediaSettings,
        *,
        resolver: Resolver = resolve,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._resolve = resolver
        self._trusted = frozenset(map(_plain_host, settings.allowed_media_hosts))
        self._root = Path(settings.allowed_media_path).resolve() if settings.allowed_media_path else None
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        # A bare transport rather than a client: no cookies, no proxies, no redirects behind our back.
        # Connections are not kept, because they would be shared by all the names of one address.
        self._transport = httpx.AsyncHTTPTransport(
            verify=ssl_context or True,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def fetch(self, url: str, *, begun: Callable[[bytes], None] | None = None) -> bytes:
        """Return the bytes behind a URL, at most ``max_image_bytes``. What they are is not checked.

        Args:
            url: where they are.
            begun: is called with the first bytes of a download, a few times with more of them each.

        Raises:
            FetchError: the URL is not one that may be fetched, or its host did not answer properly in time.
            PictureError: a ``data:`` URL is malformed or not of a picture, or there are too many bytes.
        """
        scheme = url[:8].partition(":")[0].lower()
        try:
            match scheme:
                case "data":
                    return _decode_data_url(url, self._settings.max_image_bytes)
                case "http" | "https":
                    async with self._slots:
                        return await self._fetch_http(url, begun)
                case "file":
                    return await asyncio.to_thread(self._read_file, url)
        except FoveateError as error:
            raise type(error)(f"{_shorten(url)}: {error.message}") from error
        raise FetchError(f"{_shorten(url)}: only data:, http: and https: URLs are fetched")

    async def _fetch_http(self, url: str, begun: Callable[[bytes], None] | None) -> bytes:
        seconds = self._settings.media_total_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._follow(httpx.URL(url), begun)
        except TimeoutError as error:
            raise FetchError(f"fetching took longer than {seconds:g} seconds") from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise FetchError(f"the URL is not valid ({error})") from error
        except httpx.ConnectTimeout as error:
            limit = self._settings.media_connect_seconds
            raise FetchError(f"connecting took longer than {limit:g} seconds") from error
        except httpx.HTTPError as error:
            raise FetchError(f"fetching failed ({error or type(error).__name__})") from error

    async def _follow(self, url: httpx.URL, begun: Callable[[bytes], None] | None) -> bytes:
        for _ in range(1 + MAX_REDIRECTS):
            response = await self._send(url)
            try:
                location = response.headers.get("location")
                if response.status_code not in _REDIRECTS or location is None:
                    return await self._read_body(response, begun)
                url = url.join(location)
            finally:
                await response.aclose()
        raise FetchError(f"more than {MAX_REDIRECTS} redirects")

    async def _send(self, url: httpx.URL) -> httpx.Response:
        """Send one request to the first checked address that takes the connection."""
        self._check_url(url)
        addresses = await self._checked_addresses(url)
        failure: Exception = FetchError(f"the host {url.host} has no address")
        for address in addresses:
            try:
                return await self._transport.handle_async_request(self._request(url, address))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure

    def _request(self, url: httpx.URL, address: str) -> httpx.Request:
        """Make a request for a URL that connects to an address of its host, and to nothing else."""
        connect, total = self._settings.media_connect_seconds, self._settings.media_total_seconds
        return httpx.Request(
            "GET",
            url.copy_with(host=address, fragment=None),
            headers={
                "Host": url.netloc.decode("ascii"),
                "User-Agent": "foveate",
                "Accept": "image/*",
                # The size cap must hold for what is read, so nothing may be compressed on the way.
                "Accept-Encoding": "identity",
            },
            extensions={
                "timeout": httpx.Timeout(total, connect=connect).as_dict(),
                # The certificate must be the name's, although the connection goes to the address.
                "sni_hostname": url.raw_host.decode("ascii"),
            },
        )

    def _check_url(self, url: httpx.URL) -> None:
        if url.scheme not in ("http", "https"):
            raise FetchError(f"{_shorten(str(url))} is neither an http: nor an https: URL")
        if not url.host:
            raise FetchError("the URL names no host")
        if url.port is not None and not 0 < url.port < 2**16:
            raise FetchError(f"there is no port {url.port}")
        if url.userinfo:
            raise FetchError("URLs with a user name or password are not fetched")

    async def _checked_addresses(self, url: httpx.URL) -> list[str]:
        """Resolve the URL's host, once, and check every address of it."""
        host, port = url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80)
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise FetchError(f"the host {url.host} cannot be resolved ({error})") from error
        if self._settings.allow_private_media or _plain_host(url.host) in self._trusted:
            return addresses
        if not all(map(is_public, addresses)):
            raise FetchError(
                f"the host {url.host} has an address that is not public; "
                "the server's operator can allow it with --allow-private-media or --allowed-media-hosts"
            )
        return addresses

    async def _read_body(self, response: httpx.Response, begun: Callable[[bytes], None] | None) -> bytes:
        if response.status_code != 200:
            raise FetchError(f"the server answered with status {response.status_code}, not 200")
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise FetchError(f"the server answered with Content-Encoding {encoding}, which was not asked for")
        limit = self._settings.max_image_bytes
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise _too_many_bytes(limit)
        body = bytearray()
        look = _FIRST_LOOK
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > limit:
                raise _too_many_bytes(limit)
            if begun is not None and look <= len(body):
                begun(bytes(body[:_LAST_LOOK]))
                look = 4 * len(body) if len(body) < _LAST_LOOK else limit + 1
        return bytes(body)

    def _read_file(self, url: str) -> bytes:
        if self._root is None:
            raise FetchError("file: URLs are not fetched; the server's operator can allow a folder")
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path)).resolve()
            if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
                raise FetchError("a file: URL looks like file:///folder/picture.jpg")
            # Decided before the file is touched: whether others exist is nobody's business.
            if not path.is_relative_to(self._root):
                raise FetchError("the file is outside the folder that may be read")
            return _read_regular_file(path, self._settings.max_image_bytes)
        except OSError as error:
            raise FetchError(f"the file cannot be read ({error.strerror})") from error
        except (ValueError, RuntimeError) as error:  # a NUL byte; a loop of links
            raise FetchError(f"the URL names no file ({error})") from error


def _read_regular_file(path: Path, limit: int) -> bytes:
    # Neither a link put there since the check is followed, nor is a pipe waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FetchError("the URL does not name a file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _too_many_bytes(limit)
    return data


def _decode_data_url(url: str, limit: int) -> bytes:
    """Decode ``data:[media type][;parameter ...][;base64],data`` (RFC 2397)."""
    header, comma, payload = url[len("data:") :].partition(",")
    if not comma:
        raise PictureError("a data: URL needs a comma before its data")
    media_type, *parameters = (part.strip().lower() for part in header.split(";"))
    if media_type and not media_type.startswith("image/"):
        raise PictureError(f"the media type {media_type[:40]!r} is not a picture's")
    is_base64 = bool(parameters) and parameters[-1] == "base64"
    # A lower bound of the decoded size, so that nothing large is decoded in vain.
    size = len(payload) - 2 * payload.count("%")
    if (size * 3 // 4 - 2 if is_base64 else size) > limit:
        raise _too_many_bytes(limit)
    try:
        raw = unquote_to_bytes(payload) if "%" in payload or not is_base64 else payload.encode("ascii")
        data = base64.b64decode(raw, validate=True) if is_base64 else raw
    except (binascii.Error, UnicodeEncodeError) as error:
        raise PictureError(f"the base64 data is not valid ({error})") from error
    if len(data) > limit:
        raise _too_many_bytes(limit)
    return data


def _too_many_bytes(limit: int) -> PictureError:
    return PictureError(f"the picture has more than the {limit} bytes allowed")


def _plain_host(host: str) -> str:
    return host.lower().rstrip(".")


def _shorten(url: str, length: int = 100) -> str:
    """Name a URL in an error: never its data, and never without end."""
    if url[:5].lower() == "data:":
        url = url.partition(",")[0] + ",…"
    shown = url if len(url) <= length else url[: length - 1] + "…"
    return "".join(character if character.isprintable() else "\ufffd" for character in shown)
