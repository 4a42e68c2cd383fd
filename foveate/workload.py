"""What ``foveate bench serve`` sends: questions and pictures new to any cache, the same ones for the same seed."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from PIL import Image, ImageDraw

# Words that are one token each in most vocabularies.
_WORDS = ["what", "where", "how", "many", "which", "is", "are", "the", "of", "in", "and", "on", "left", "right"]


@dataclass(frozen=True, slots=True)
class Workload:
    """What every request looks like.

    Attributes:
        output_tokens: tokens of each answer.
        prompt_words: words of each question.
        picture: width and height in pixels, or None for text alone.
        same_picture: whether all requests show one picture, which a cache may know.
        seed: makes the same requests again.
        read_back: whether the answer shall be the question's words.
    """

    output_tokens: int
    prompt_words: int
    picture: tuple[int, int] | None
    same_picture: bool
    seed: int
    read_back: bool = False

    def bodies(self, model: str) -> Iterator[bytes]:
        """Yield request bodies, each with another question and, unless it is the same, another picture."""
        rng = random.Random(self.seed)
        picture = self._draw(rng)
        while True:
            # The number comes first: prompts that begin alike would hit the prefix cache.
            words = rng.choices(_WORDS, k=self.prompt_words)
            question = f"{rng.randrange(10**6)} {' '.join(words)}"
            if self.read_back:
                question += "\n\nRepeat the text above again and again, word for word, and say nothing else."
            content: list[dict[str, Any]] = [{"type": "text", "text": question}]
            if picture is not None:
                content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
            yield msgspec.json.encode(
                {
                    "model": model,
                    "messages": [{"role": "user", "content": content}],
                    "max_tokens": self.output_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            )
            picture = picture if self.same_picture else self._draw(rng)

    def _draw(self, rng: random.Random) -> str | None:
        if self.picture is None:
            return None
        return "data:image/jpeg;base64," + base64.b64encode(draw_picture(*self.picture, rng)).decode()


def draw_picture(width: int, height: int, rng: random.Random) -> bytes:
    """Draw shapes on a gradient under a little noise, and return a JPEG file."""

    def colour() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    ramp = Image.linear_gradient("L").resize((width, height))
    picture = Image.composite(Image.new("RGB", ramp.size, colour()), Image.new("RGB", ramp.size, colour()), ramp)
    draw = ImageDraw.Draw(picture)
    for _ in range(8):
        x, y = rng.randrange(width), rng.randrange(height)
        box = (x, y, x + rng.randrange(1, width // 3 + 2), y + rng.randrange(1, height // 3 + 2))
        rng.choice((draw.ellipse, draw.rectangle))(box, fill=colour())
    noise = Image.frombytes("L", (32, 32), rng.randbytes(32 * 32)).resize(ramp.size).convert("RGB")
    out = io.BytesIO()
    Image.blend(picture, noise, 0.1).save(out, "JPEG", quality=90)
    return out.getvalue()
