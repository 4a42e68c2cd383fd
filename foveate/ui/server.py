"""An OpenAI-compatible server as the chat sees it: HTTP, and nothing else.

What only Foveate understands (``timings``, ``max_slice_nums``) is sent to Foveate alone, which is known by its
``/version``: others refuse unknown fields, or ignore them.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx

from foveate.errors import FoveateError

_CONNECT_SECONDS = 5.0
_SILENT_SECONDS = 600.0
"""A long prompt on a slow machine may take minutes to its first token."""
_LOOK_SECONDS = 10.0
_MAX_ERROR_CHARACTERS = 1000
_NOT_HEADER = "The API key has characters that no header can carry."


class ServerError(FoveateError):
    """The server refused, failed or is not there; the message has its own words where it said any."""


class Server:
    """One server. Its methods belong to one event loop.

    Args:
        url: where it is, with or without ``/v1``.
        key: the API key to send where a visitor gives none.
        certificate: a PEM file with the one certificate that the server has, which is then trusted, whatever its names.
    """

    def __init__(self, url: str, *, key: str | None = None, certificate: Path | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        timeout = httpx.Timeout(_SILENT_SECONDS, connect=_CONNECT_SECONDS)
        self._client = httpx.AsyncClient(timeout=timeout, verify=_trust(certificate), trust_env=False)
        self._is_foveate: bool | None = None

    async def close(self) -> None:
        """End all connections."""
        await self._client.aclose()

    async def models(self, key: str = "") -> list[str]:
        """Return the names that requests may use.

        Raises:
            ServerError: it is not there, or refuses.
        """
        try:
            answer = await self._client.get(f"{self.url}/v1/models", headers=self._headers(key), timeout=_LOOK_SECONDS)
            if answer.status_code != 200:
                raise _refused(answer.status_code, answer.content)
            return [str(model["id"]) for model in answer.json()["data"]]
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url}/v1/models does not answer as an OpenAI-compatible server does.") from error

    @property
    def known_as_foveate(self) -> bool:
        """What :meth:`is_foveate` has found, if it was asked already."""
        return self._is_foveate is True

    async def is_foveate(self) -> bool:
        """Whether it understands more than OpenAI's fields; asked until it answers once."""
        if self._is_foveate is None:
            try:
                answer = await self._client.get(f"{self.url}/version", timeout=_LOOK_SECONDS)
                # Other servers have a /version too, which names no model.
                self._is_foveate = answer.status_code == 200 and {"version", "model"} <= set(answer.json())
            except httpx.HTTPError:
                return False
            except (ValueError, TypeError):
                self._is_foveate = False
        return self._is_foveate

    async def stream(self, body: dict[str, Any], key: str = "") -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a chat completion; closing this early closes the connection, so that the server aborts.

        Raises:
            ServerError: it is not there, refuses, or ends the stream with an error.
        """
        request = self._client.stream(
            "POST", f"{self.url}/v1/chat/completions", json={**body, "stream": True}, headers=self._headers(key)
        )
        try:
            async with request as answer:
                if answer.status_code != 200:
                    raise _refused(answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data == "[DONE]":
                        return
                    if data:
                        yield _event(data)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        raise ServerError("The server ended the stream before its answer had ended.")

    def _headers(self, key: str) -> dict[str, str]:
        key = key.strip() or self._key or ""
        if not key.isascii() or not key.isprintable():
            raise ServerError(_NOT_HEADER)
        return {"authorization": f"Bearer {key}"} if key else {}

    def _unreachable(self, error: httpx.HTTPError) -> ServerError:
        return ServerError(f"The server at {self.url} cannot be reached ({str(error) or type(error).__name__}).")


def _trust(certificate: Path | None) -> ssl.SSLContext | bool:
    if certificate is None:
        return True
    context = ssl.create_default_context(cafile=str(certificate))
    # It is the very certificate of a known server on this machine, reached under another name.
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _event(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ServerError("The server's stream is broken: an event is not JSON.") from error
    if not isinstance(event, dict):
        raise ServerError("The server's stream is broken: an event is no object.")
    if "error" in event:
        raise ServerError(_words(event) or "The server ended the answer with an error.")
    return event


def _refused(status: int, content: bytes) -> ServerError:
    try:
        words = _words(json.loads(content))
    except ValueError:
        words = content.decode(errors="replace").strip()[:_MAX_ERROR_CHARACTERS]
    return ServerError(f"{words or 'The server gave no reason.'} (HTTP {status})")


def _words(body: Any) -> str:
    """Find the message in an error's body: OpenAI's shape, and those of other servers."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or ""
    return str(error)[:_MAX_ERROR_CHARACTERS]
