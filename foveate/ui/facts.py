"""What is known of an answer beside its words: counts, times, and how its pictures were seen."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

STAGES = ("fetch", "picture_decode", "slice", "queue", "encode", "write", "wait", "read", "prefill")
"""What comes before the first token, in order, as Foveate's ``timings`` name it."""
MOST_PICTURES = 256


@dataclass(frozen=True, slots=True)
class Seen:
    """How a picture was seen: see ``pictures`` in Foveate's answers."""

    width: int
    height: int
    slices: int
    grid: tuple[int, int] | None
    tokens: int
    cached: bool


@dataclass(slots=True)
class Facts:
    """Filled by the events of one stream. What a server does not say stays None or empty.

    Attributes:
        started: when the request was sent, on the clock of :func:`time.perf_counter`.
        first_at: when the first words came.
        last_at: when the last words came.
        finish_reason: ``stop``, or ``length`` for an answer that was cut off.
        prompt_tokens: of the whole prompt.
        image_tokens: of these, those of pictures.
        cached_tokens: of these, those that were computed before.
        completion_tokens: of the answer.
        timings: seconds of each stage.
        seen: the request's pictures, in the order of the conversation.
    """

    started: float = field(default_factory=time.perf_counter)
    first_at: float | None = None
    last_at: float | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    timings: dict[str, float] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)

    def read(self, event: dict[str, Any]) -> str:
        """Learn what an event says, and return its words. What is not as expected is passed over."""
        words = ""
        for choice in _objects(event.get("choices")):
            content = _object(choice.get("delta")).get("content")
            words += content if isinstance(content, str) else ""
            reason = choice.get("finish_reason")
            self.finish_reason = reason if isinstance(reason, str) else self.finish_reason
        if words:
            self.last_at = time.perf_counter()
            self.first_at = self.first_at or self.last_at
        self._read_usage(_object(event.get("usage")))
        self.timings |= {name: float(one) for name, one in _object(event.get("timings")).items() if _is_number(one)}
        self.seen += [one for given in _objects(event.get("pictures"))[:MOST_PICTURES] if (one := _seen(given))]
        return words

    def _read_usage(self, usage: dict[str, Any]) -> None:
        details = _object(usage.get("prompt_tokens_details"))
        for source, key, name in (
            (usage, "prompt_tokens", "prompt_tokens"),
            (usage, "completion_tokens", "completion_tokens"),
            (details, "image_tokens", "image_tokens"),
            (details, "cached_tokens", "cached_tokens"),
        ):
            if _is_count(source.get(key)):
                setattr(self, name, source[key])

    @property
    def first_token_seconds(self) -> float | None:
        """Seconds from the request to the first words, as seen from here."""
        return None if self.first_at is None else self.first_at - self.started

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second after the first one: by the server's clock, else by ours."""
        if self.completion_tokens is None or self.completion_tokens < 2:
            return None
        seconds = self.timings.get("decode")
        if seconds is None and self.first_at is not None and self.last_at is not None:
            seconds = self.last_at - self.first_at
        return (self.completion_tokens - 1) / seconds if seconds else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _seen(given: dict[str, Any]) -> Seen | None:
    numbers = [given.get(name) for name in ("width", "height", "slices", "tokens")]
    if not all(_is_count(number) for number in numbers):
        return None
    width, height, slices, tokens = (int(number or 0) for number in numbers)
    grid = given.get("grid")
    columns_rows = None
    if isinstance(grid, list) and len(grid) == 2 and all(_is_count(side) and 1 <= side <= 64 for side in grid):
        columns_rows = (int(grid[0]), int(grid[1]))
    return Seen(width, height, slices, columns_rows, tokens, given.get("cached") is True)
