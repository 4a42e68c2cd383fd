"""An answer as it arrives: OpenAI's server-sent events."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx

from foveate.errors import FoveateError, from_wire

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """Replace control characters: a model's or a server's words must not move the cursor or rename the window."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


class Answer:
    """One answer, which grows while it is iterated over. Times are in seconds since the request was sent.

    Attributes:
        text: what has come so far.
        model: the name that the server gives itself.
        finish_reason: why it ended; None while it has not.
        usage: OpenAI's token counts, if the server tells.
        timings: seconds of each stage, if a Foveate server was asked for them.
        first_token_seconds: until the first text came; None while there is none.
        seconds: until the end, or until now.
    """

    def __init__(self, response: httpx.Response, started: float, *, has_timings: bool) -> None:
        self.text = ""
        self.model: str | None = None
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.timings: dict[str, float] | None = None
        self.first_token_seconds: float | None = None
        self.seconds = 0.0
        self._response = response
        self._started = started
        # Other servers have something of their own under that name.
        self._has_timings = has_timings
        self._last_seconds = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """How fast tokens came after the first one, by the server's clock if it tells; None with fewer than two."""
        count = (self.usage or {}).get("completion_tokens") or 0
        seconds = (self.timings or {}).get("decode") or self._last_seconds - (self.first_token_seconds or 0.0)
        return (count - 1) / seconds if count > 1 and seconds > 0 else None

    def __iter__(self) -> Iterator[str]:
        """Yield the text piece by piece.

        Raises:
            FoveateError: the server tells of an error, or what it sends makes no sense, or breaks off.
            httpx.TransportError: the connection broke.
        """
        done = False
        for line in self._response.iter_lines():
            field, _, data = line.partition(":")
            if field != "data":
                continue
            if done := data.strip() == "[DONE]":
                break
            yield from self._take(_decode(data))
        self.seconds = time.perf_counter() - self._started
        # Not every server says [DONE].
        if not done and self.finish_reason is None:
            raise FoveateError("the answer broke off: the server closed the connection")

    def _take(self, event: dict[str, Any]) -> Iterator[str]:
        if event.get("error"):
            raise refusal(event, status=500)
        self.model = event.get("model") or self.model
        self.usage = event.get("usage") or self.usage
        if self._has_timings:
            self.timings = event.get("timings") or self.timings
        self.seconds = time.perf_counter() - self._started
        for choice in event.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            text = (choice.get("delta") or {}).get("content")
            if text:
                self._last_seconds = self.seconds
                if self.first_token_seconds is None:
                    self.first_token_seconds = self.seconds
                self.text += text
                yield text


def refusal(body: object, status: int) -> FoveateError:
    """Make an error of what the server says, in its words, made harmless.

    Args:
        body: OpenAI's error object, or whatever came in its place.
        status: of the answer.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and error.get("message"):
        code = error.get("code")
        return from_wire(code if isinstance(code, str) else None, harmless(str(error["message"])), status=status)
    text = harmless(error if isinstance(error, str) else str(body).strip()[:300])
    return from_wire(None, f"the server answered with status {status}: {text or 'nothing more'}", status=status)


def _decode(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise FoveateError(f"the server sent what is no answer: {data.strip()[:100]!r}") from error
    if not isinstance(event, dict):
        raise FoveateError(f"the server sent what is no answer: {data.strip()[:100]!r}")
    return event
