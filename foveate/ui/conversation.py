"""A conversation, and the request that it becomes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from foveate.media.image import FORMATS
from foveate.ui.facts import Facts
from foveate.ui.server import ServerError

Detail = Literal["auto", "low", "high"]
_MIME = {name: f"image/{name.lower()}" for name in FORMATS}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the user's.

    Attributes:
        path: its file, in the upload folder or among the samples.
        name: the file's name, as the user knows it.
        detail: how closely the model is to look.
        max_slice_nums: most slices; None leaves that to the model. Only Foveate is told.
    """

    path: Path
    name: str
    detail: Detail = "auto"
    max_slice_nums: int | None = None


@dataclass(slots=True)
class Turn:
    """A question and what became of it.

    Attributes:
        question: the user's words.
        pictures: what goes with them.
        answer: the model's words so far.
        facts: what is known of the answer so far.
        ended: whether there comes no more of it.
        error: why there is no answer, or no more of it.
        stopped: whether the user had enough.
        thumbnails: the pictures, small, as data: URLs; empty for one that cannot be read.
    """

    question: str
    pictures: list[Picture] = field(default_factory=list)
    answer: str = ""
    facts: Facts | None = None
    ended: bool = False
    error: str = ""
    stopped: bool = False
    thumbnails: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are to be chosen; None leaves it to the server."""

    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def fields(self) -> dict[str, float | int]:
        """Return what a request says of it."""
        names = ("temperature", "top_p", "frequency_penalty", "max_tokens", "seed")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def request_body(
    turns: Iterable[Turn], *, model: str, system: str, sampling: Sampling, is_foveate: bool
) -> dict[str, Any]:
    """Write the request for the answer to the last turn; reads the pictures' files.

    An earlier turn without any answer is left out: what was refused once would be refused again.

    Raises:
        ServerError: a picture's file is gone.
    """
    *earlier, last = turns
    messages: list[dict[str, Any]] = []
    if system.strip():
        messages.append({"role": "system", "content": system})
    for turn in earlier:
        if turn.answer:
            messages.append({"role": "user", "content": _content(turn, is_foveate)})
            messages.append({"role": "assistant", "content": turn.answer})
    messages.append({"role": "user", "content": _content(last, is_foveate)})
    more: Mapping[str, Any] = {"timings": True} if is_foveate else {}
    return {
        "model": model,
        "messages": messages,
        "stream_options": {"include_usage": True},
        **sampling.fields(),
        **more,
    }


def answered(turns: Iterable[Turn]) -> list[Turn]:
    """Return the turns that the request for the last one has, in order: the answered ones and itself."""
    *earlier, last = turns
    return [*(turn for turn in earlier if turn.answer), last]


def _content(turn: Turn, is_foveate: bool) -> str | list[dict[str, Any]]:
    if not turn.pictures:
        return turn.question
    parts: list[dict[str, Any]] = [_part(picture, is_foveate) for picture in turn.pictures]
    return [*parts, {"type": "text", "text": turn.question}] if turn.question else parts


def _part(picture: Picture, is_foveate: bool) -> dict[str, Any]:
    try:
        data = picture.path.read_bytes()
    except OSError as error:
        raise ServerError(f"{picture.name} is no longer there; please add it again.") from error
    image: dict[str, Any] = {"url": f"data:{_mime(data)};base64,{base64.b64encode(data).decode()}"}
    if picture.detail != "auto":
        image["detail"] = picture.detail
    if is_foveate and picture.max_slice_nums is not None and picture.detail != "low":
        image["max_slice_nums"] = picture.max_slice_nums
    return {"type": "image_url", "image_url": image}


def _mime(data: bytes) -> str:
    """Say what a file is, by its first bytes. What is nothing goes as a picture too: the server says what is wrong."""
    try:
        return _MIME.get(Image.open(io.BytesIO(data), formats=FORMATS).format or "", "image/jpeg")
    except Exception:  # noqa: BLE001 (a parser of hostile data may raise anything)
        return "image/jpeg"
