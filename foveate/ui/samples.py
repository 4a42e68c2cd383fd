"""Pictures to click, with a question each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import foveate

_FOLDER = Path(foveate.__file__).parent / "demo" / "pictures"


@dataclass(frozen=True, slots=True)
class Sample:
    """A question about pictures, in English and Chinese."""

    pictures: tuple[Path, ...]
    english: str
    chinese: str

    def question(self, language: str) -> str:
        """Return the question in a language."""
        return self.chinese if language == "zh" else self.english


def _sample(english: str, chinese: str, *names: str) -> Sample:
    return Sample(tuple(_FOLDER / f"{name}.png" for name in names), english, chinese)


SAMPLES = (
    _sample("Describe the picture.", "描述这张图片。", "shapes"),
    _sample("Which picture shows a circle?", "哪张图里有圆形？", "before", "after"),
    _sample("Read the number.", "读出数字。", "small-print"),
    _sample("How much is the total?", "总计是多少？", "receipt"),
    _sample("How much is MAR?", "MAR是多少？", "chart"),
    _sample("Read the text.", "读出文字。", "sign"),
)
