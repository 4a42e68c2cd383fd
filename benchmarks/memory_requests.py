"""Requests of all kinds and sizes, some of them wrong, for :mod:`memory`; the same ones for the same seed."""

from __future__ import annotations

import base64
import json
import random
import threading
from typing import Any, Literal

from foveate.workload import draw_picture

Kind = Literal["short", "long", "small", "large", "narrow", "several", "known", "aborted", "invalid"]

SHARES: dict[Kind, int] = {
    "short": 26, "long": 10, "small": 22, "large": 5, "narrow": 5, "several": 7, "known": 15, "aborted": 6,
    "invalid": 4,
}  # fmt: skip
"""Of a hundred requests: text, pictures of one slice, of ten, of extreme shape, two to four of them, known ones,
streams that nobody listens to until the end, and requests that are refused."""
KNOWN = 8
WORDS = ("what", "where", "how", "many", "which", "is", "are", "the", "of", "in", "and", "on", "red", "large", "near")
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 0}, {"temperature": 0.7}, {"temperature": 1, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40}, {"temperature": 0, "repetition_penalty": 1.1},
    {"temperature": 1, "top_p": 0.95, "presence_penalty": 0.5},
]  # fmt: skip


class Requests:
    """Makes requests. Safe to use from several threads.

    Args:
        model: the name that they use.
        seed: of everything that is drawn.
    """

    def __init__(self, model: str, seed: int) -> None:
        self._model = model
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._known = [picture(self._random, 300, 300) for _ in range(KNOWN)]

    def next(self) -> tuple[Kind, bytes, int | None]:
        """Return a request's kind, its body, and after how many events its client hangs up, if it does."""
        with self._lock:
            # One generator for each request, so that they may be drawn at the same time.
            rng = random.Random(self._random.random())
        [kind] = rng.choices(list(SHARES), list(SHARES.values()))
        events = rng.randrange(6) if kind == "aborted" else None
        body = self._body(kind, rng)
        return kind, json.dumps(body).encode(), events

    def _body(self, kind: Kind, rng: random.Random) -> dict[str, Any]:
        words = rng.randrange(300, 900) if kind == "long" else rng.randrange(3, 40)
        content: list[dict[str, Any]] = self._pictures(kind, rng)
        content.append({"type": "text", "text": f"{rng.randrange(10**6)} {' '.join(rng.choices(WORDS, k=words))}"})
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": rng.randrange(1, 64),
            "stream": kind == "aborted" or rng.random() < 0.5,
            "ignore_eos": rng.random() < 0.5,
            **rng.choice(SAMPLING),
        }
        if kind == "invalid":
            body |= rng.choice(({"surprise": 1}, {"max_tokens": -1}, {"temperature": "hot"}, {}))
        return body

    def _pictures(self, kind: Kind, rng: random.Random) -> list[dict[str, Any]]:
        match kind:
            case "small":
                return [picture(rng, rng.randrange(30, 449), rng.randrange(30, 449))]
            case "large":
                return [picture(rng, rng.randrange(1000, 1900), rng.randrange(900, 1500))]
            case "narrow":
                sides = [rng.randrange(1200, 2400), rng.randrange(20, 80)]
                rng.shuffle(sides)
                return [picture(rng, *sides)]
            case "several":
                return [
                    picture(rng, rng.randrange(50, 700), rng.randrange(50, 500)) for _ in range(rng.randrange(2, 5))
                ]
            case "known":
                return [rng.choice(self._known)]
            case "aborted":
                return [picture(rng, 600, 500)] if rng.random() < 0.5 else []
            case "invalid":
                # Cut off, and so wrong even where nothing else is.
                return [picture(rng, 200, 200, cut=True)]
            case _:
                return []


def picture(rng: random.Random, width: int, height: int, *, cut: bool = False) -> dict[str, Any]:
    """Draw a picture and return it as a part of a message; half of its file is missing if it is cut."""
    data = draw_picture(width, height, rng)
    data = data[: len(data) // 2] if cut else data
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(data).decode()}}
