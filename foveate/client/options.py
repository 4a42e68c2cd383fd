"""What the clients' commands have in common on the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from foveate.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:9997"

Switch = Annotated[bool, Parameter(negative=(), show_default=False)]
"""A flag without a value."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Where:
    """Which server, and the key to it."""

    url: Annotated[
        str,
        Parameter(env_var="FOVEATE_URL", help="The server. With a path, such as /v1, this is where its API begins."),
    ] = DEFAULT_URL
    api_key: Annotated[
        str | None,
        Parameter(help="The server's key, if it wants one. [env var: FOVEATE_API_KEY, OPENAI_API_KEY]"),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a question is asked. What is not given is left to the server."""

    model: Annotated[str | None, Parameter(help="The model's name; without it, the server's first one.")] = None
    system: Annotated[str | None, Parameter(help="A system prompt.")] = None
    detail: Annotated[Literal["auto", "low", "high"] | None, Parameter(help="low sees pictures only as a whole.")] = (
        None
    )
    max_slice_nums: Annotated[
        int | None, Parameter(help="Most slices of each picture, 1 for none. Foveate's own; others may refuse it.")
    ] = None
    max_tokens: Annotated[int | None, Parameter(help="Most tokens of an answer.")] = None
    temperature: Annotated[float | None, Parameter(help="0 always takes the likeliest token.")] = None
    seed: Annotated[int | None, Parameter(help="The same seed draws the same answer.")] = None
    timings: Annotated[Switch, Parameter(help="After the answer, its tokens and where the time went.")] = False

    def body(self, model: str, messages: list[dict[str, Any]], *, tell_times: bool) -> dict[str, Any]:
        """Return the request: OpenAI's fields, and of Foveate's those that were asked for.

        Args:
            model: the name to ask for.
            messages: the conversation.
            tell_times: whether the server is to say how long each stage took; only a Foveate server can.
        """
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for name in ("max_tokens", "temperature", "seed"):
            value = getattr(self, name)
            if value is not None:
                body[name] = value
        if tell_times:
            body["timings"] = True
        return body

    def picture_part(self, url: str) -> dict[str, Any]:
        """Return a message's part that shows a picture."""
        wishes = {"detail": self.detail, "max_slice_nums": self.max_slice_nums}
        given = {name: value for name, value in wishes.items() if value is not None}
        return {"type": "image_url", "image_url": {"url": url, **given}}


def refuse_unknown_flags(arguments: Iterable[str | None]) -> None:
    """Refuse what looks like a flag where a question or a picture is expected.

    A lone ``-`` is to be an argument, and then so is everything else that begins with one.

    Raises:
        ConfigError: there is such an argument.
    """
    for argument in arguments:
        if argument is not None and re.match(r"--?[A-Za-z]", argument):
            raise ConfigError(f"{argument.partition('=')[0]}: there is no such flag. Try --help.")


def key_from_environment() -> tuple[str | None, str]:
    """Return the key for a server and the variable that it came from.

    ``FOVEATE_API_KEY`` may hold several for the server, of which the first is taken.
    """
    own = os.environ.get("FOVEATE_API_KEY", "").split(",")[0].strip()
    if own:
        return own, "FOVEATE_API_KEY"
    return os.environ.get("OPENAI_API_KEY", "").strip() or None, "OPENAI_API_KEY"
