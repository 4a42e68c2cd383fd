"""Signs: one to three printed strings, large enough for the overview."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from training.world import canvas, words
from training.world.phrases import question
from training.world.records import Mark, Turn
from training.world.vocabulary import COLOURS_ZH, joined, quoted

_LINES_ZH = ("第一行", "第二行", "第三行")
_LINES_EN = ("first", "second", "third")
SMALLEST_CAP = 17.0


@dataclass(frozen=True)
class Line:
    """One printed string and the named colour it is printed in."""

    text: str
    colour: str


@dataclass(frozen=True)
class Sign:
    """Lines from top to bottom."""

    lines: tuple[Line, ...]


def make_sign(
    rng: random.Random, size: tuple[int, int], smallest_cap: float = SMALLEST_CAP
) -> tuple[Sign, Image.Image, list[Mark]]:
    """A sign on a picture of ``size``, capitals at least ``smallest_cap`` pixels high in the overview."""
    ground = canvas.background(rng, size)
    picture, colours = ground.picture, ground.colours
    width, height = size
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    if rng.random() < 0.3:
        inset = rng.uniform(0.03, 0.08) * min(size)
        left, top, right, bottom = inset, inset, width - inset, height - inset
        board = canvas.tone(rng, rng.choice(canvas.readable_colours(ground)))
        ImageDraw.Draw(picture).rectangle((left, top, right, bottom), fill=board)
        colours = (board,)
    readable = canvas.ink_colours(canvas.Background(picture, colours, None))
    named = [rng.choice(readable or ["white"])] * 3
    if rng.random() < 0.25:
        named = [rng.choice(readable or ["white"]) for _ in range(3)]
    pen, scale = ImageDraw.Draw(picture), canvas.overview_scale(*size)
    count = rng.choices((1, 2, 3), (45, 30, 25))[0]
    row = (bottom - top) / count
    lines, marks = [], []
    for index in range(count):
        room = right - left - 0.06 * width, row * 0.8
        text, font, points = _fitting(rng, room, max(smallest_cap / scale, 10.0))
        wide, high = canvas.text_size(text, font, points)
        x = left + 0.03 * width + rng.random() * max(0.0, room[0] - wide)
        y = top + row * index + 0.1 * row + rng.random() * max(0.0, room[1] - high)
        tone = canvas.tone(rng, named[index])
        marks += canvas.draw_text(pen, x, y, text, font, points, tone)
        lines.append(Line(text, named[index]))
    return Sign(tuple(lines)), picture, marks


def _fitting(rng: random.Random, room: tuple[float, float], cap: float) -> tuple[str, str, int]:
    """A string, font and font size that fit a room (width, height), capitals at least ``cap`` high."""
    longest = 14
    while True:
        font, text = rng.choice(canvas.FONTS), words.printed(rng, longest)
        smallest = canvas.font_size(font, cap)
        wide, high = canvas.text_size(text, font, smallest)
        grow = min(room[0] / wide, room[1] / high, 5.0)
        if grow >= 1 or longest == 6:
            largest = max(smallest, int(smallest * grow * 0.97))
            return text, font, int(smallest * (largest / smallest) ** rng.random())
        longest -= 1


def reading(texts: list[str], language: str) -> str:
    """The answer to "read the text"."""
    said = joined([quoted(text, language) for text in texts], language)
    return f"The text reads {said}." if language == "en" else f"文字是{said}。"


class SignQuestions:
    """Makes turns about a sign in one language."""

    def __init__(self, rng: random.Random, sign: Sign, language: str) -> None:
        self.rng, self.sign, self.language = rng, sign, language

    def turn(self, key: str, answer: str, category: str = "text", **slots: str) -> Turn:
        return Turn(question(self.rng, key, self.language, **slots), answer, category, self.language)

    def read(self) -> list[Turn]:
        texts = [line.text for line in self.sign.lines]
        key = "read" if len(texts) == 1 else "read_all"
        return [self.turn(key, reading(texts, self.language))]

    def line(self) -> list[Turn] | None:
        count = len(self.sign.lines)
        if count == 1:
            return None
        chosen = self.rng.sample(range(count), min(count, self.rng.choice((1, 1, 2))))
        turns = []
        for number, index in enumerate(chosen):
            key, category = ("then_line", "follow_up") if number else ("line", "text")
            turns.append(self._line(index, key, category))
        return turns

    def _line(self, index: int, key: str, category: str) -> Turn:
        end = {0: 0, len(self.sign.lines) - 1: 1}.get(index)
        said = quoted(self.sign.lines[index].text, self.language)
        by_end = end is not None and (index > 2 or self.rng.random() < 0.65)
        if self.language == "en":
            which = self.rng.choice((("top",), ("bottom", "last"))[end or 0]) if by_end else _LINES_EN[index]
            return self.turn(
                key, f"The {which if which != 'last' else 'bottom'} line reads {said}.", category, which=which
            )
        which = ("最上面一行", "最下面一行")[end or 0] if by_end else _LINES_ZH[index]
        return self.turn(key, f"{which}是{said}。", category, which=which)

    def number(self) -> list[Turn] | None:
        numbers = [line.text for line in self.sign.lines if words.is_number(line.text)]
        if len(numbers) != 1 or sum(any(c.isdecimal() for c in line.text) for line in self.sign.lines) > 1:
            return None
        answer = f"The number is {numbers[0]}." if self.language == "en" else f"数字是{numbers[0]}。"
        return [self.turn("number", answer)]

    def any_text(self) -> list[Turn]:
        answer = "Yes, there is text." if self.language == "en" else "有，图中有文字。"
        return [self.turn("any_text", answer, "yes_no")]

    def colour(self) -> list[Turn] | None:
        colours = {line.colour for line in self.sign.lines}
        if len(colours) > 1:
            return None
        colour = colours.pop()
        answer = f"The text is {colour}." if self.language == "en" else f"文字是{COLOURS_ZH[colour]}的。"
        return [self.turn("text_colour", answer, "colour")]

    def count(self) -> list[Turn]:
        lines = len(self.sign.lines)
        if self.language == "zh":
            answer = f"有{lines}行文字。"
        else:
            answer = "There is 1 line of text." if lines == 1 else f"There are {lines} lines of text."
        return [self.turn("lines", answer, "count")]

    def describe(self) -> list[Turn]:
        texts = [quoted(line.text, self.language) for line in self.sign.lines]
        if self.language == "en":
            answer = f"A sign that reads {joined(texts, 'en')}."
        else:
            answer = f"一块牌子，上面写着{joined(texts, 'zh')}。"
        return [self.turn("describe", answer, "text")]

    def no_shapes(self) -> list[Turn]:
        answer = "There are no shapes in this picture." if self.language == "en" else "图中没有图形。"
        return [self.turn("count_all", answer, "absent")]
