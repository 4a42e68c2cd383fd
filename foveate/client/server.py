"""A server that speaks OpenAI's API, over HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from foveate.client.options import Where, key_from_environment
from foveate.client.stream import Answer, harmless, refusal
from foveate.errors import ConfigError, FoveateError, Unauthorized
from foveate.hosts import is_loopback

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0
"""How long a server may say nothing: its queue may be long."""


class Nobody(FoveateError):
    """Nothing answers at the address, or not any more."""


class Server:
    """A server at an address. Nothing is sent before a method is called; use it as a context.

    Attributes:
        url: the server's, without the API's path.

    Args:
        where: its address and key.

    Raises:
        ConfigError: the address is none, or the key is none that can be sent.
    """

    def __init__(self, where: Where) -> None:
        self.url, self._api = _addresses(where.url)
        host = urlsplit(self.url).hostname or ""
        self._key_hint = ""
        headers = self._authorization(where, host)
        # A proxy for the world outside does not know this machine's own servers.
        mounts: Mapping[str, None] | None = {f"all://{urlsplit(self.url).netloc}": None} if is_loopback(host) else None
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        self._client = httpx.Client(headers=headers, timeout=timeout, mounts=mounts)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def foveate_model(self) -> str | None:
        """Return the name of the model if this is a Foveate server, else None.

        Raises:
            Nobody: nothing answers.
        """
        with self._connection():
            response = self._client.get(f"{self.url}/version")
        with contextlib.suppress(ValueError):
            said = response.json()
            if response.is_success and isinstance(said, dict) and {"version", "model"} <= said.keys():
                return str(said["model"])
        return None

    def first_model(self) -> str:
        """Return the name of the first model that the server lists.

        Raises:
            Nobody: nothing answers.
            FoveateError: the server refuses, or names none.
        """
        with self._connection():
            response = self._client.get(f"{self._api}/models")
        self._check(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise FoveateError(f"{self.url} does not say which models it has; name one with --model") from error

    def metrics(self, seconds: float) -> str:
        """Return the text of ``/metrics``.

        Args:
            seconds: how long to wait for it.

        Raises:
            Nobody: nothing answers.
            FoveateError: the server refuses.
        """
        with self._connection():
            response = self._client.get(f"{self.url}/metrics", timeout=seconds)
        self._check(response)
        return response.text

    @contextlib.contextmanager
    def answer(self, body: Mapping[str, Any]) -> Iterator[Answer]:
        """Ask; leaving the context before the answer has ended hangs up, and the server gives it up.

        Raises:
            Nobody: nothing answers, or the connection breaks.
            FoveateError: the server refuses, in its words.
            ConfigError: what is asked is no text.
        """
        try:
            content = json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ConfigError("the question is not UTF-8 text") from error
        started = time.perf_counter()
        url = f"{self._api}/chat/completions"
        headers = {"Content-Type": "application/json"}
        with self._connection(), self._client.stream("POST", url, content=content, headers=headers) as response:
            if not response.is_success:
                response.read()
            self._check(response)
            yield Answer(response, started, has_timings=bool(body.get("timings")))

    def _authorization(self, where: Where, host: str) -> dict[str, str]:
        key, source = where.api_key, "--api-key"
        if key is None:
            key, source = key_from_environment()
        if source == "OPENAI_API_KEY" and key and self.url.startswith("http://") and not is_loopback(host):
            self._key_hint = " (OPENAI_API_KEY is not sent without HTTPS to another machine)"
            key = None
        if key is None:
            return {}
        if not key.isascii() or not key.isprintable() or not key.strip():
            raise ConfigError(f"{source}: the key is empty, or has characters that no key can have")
        return {"Authorization": f"Bearer {key}"}

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        status = response.status_code
        if response.is_redirect:
            target = harmless(response.headers.get("location", "?"))
            raise FoveateError(f"{self.url} sends its clients on to {target}: give --url that address")
        try:
            body = response.json()
        except ValueError:
            body = response.text
        error = refusal(body, status)
        if status == Unauthorized.status:
            raise Unauthorized(f"{error.message} Give it with --api-key or in FOVEATE_API_KEY{self._key_hint}.")
        raise error

    @contextlib.contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            # Without the number in front of the system's words.
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
            if "SSL" in reason:
                hint = "SSL_CERT_FILE names a file with certificates to trust"
                raise Nobody(f"{self.url}: the connection cannot be trusted: {reason} ({hint})") from error
            raise Nobody(f"nothing answers at {self.url} ({reason}); start one with: foveate serve") from error
        except httpx.TimeoutException as error:
            raise Nobody(f"{self.url} does not answer in time") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise Nobody(f"the connection to {self.url} broke: {harmless(str(error)) or 'no reason given'}") from error


def _addresses(url: str) -> tuple[str, str]:
    """Return a server's own address, and the one under which its API is.

    Raises:
        ConfigError: this is no address.
    """
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        _ = parts.port, httpx.URL(whole)
    except (ValueError, httpx.InvalidURL) as error:
        raise ConfigError(f"--url: got {url!r}, which is no address ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"--url: got {url!r}, expected an address such as http://127.0.0.1:9997")
    if parts.username is not None:
        raise ConfigError("--url: a name or password in the address is not sent; give the key with --api-key")
    path = parts.path.rstrip("/")
    origin = f"{parts.scheme}://{parts.netloc}"
    return origin + path.removesuffix("/v1"), origin + (path or "/v1")
