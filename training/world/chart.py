"""Bar charts whose bars carry a name below and a value above."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from training.world import canvas, words
from training.world.phrases import question
from training.world.records import Mark, Turn
from training.world.vocabulary import COLOURS_ZH, quoted


@dataclass(frozen=True)
class Bar:
    """One bar; the colour is a named one."""

    name: str
    value: int
    colour: str


@dataclass(frozen=True)
class Chart:
    """Bars from left to right, and the title if there is one."""

    bars: tuple[Bar, ...]
    title: str | None


def _names(rng: random.Random, count: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        draw = rng.random()
        if draw < 0.35:
            name = rng.choice(words.LABELS)
        elif draw < 0.65:
            name = words.word(rng)[:5].upper()
        elif draw < 0.85:
            name = words.code(rng, 2, 4)
        else:
            name = words.letters(rng, rng.randint(2, 4))
        if name not in names:
            names.append(name)
    return names


def _size(rng: random.Random) -> tuple[int, int]:
    while True:
        width, height = canvas.canvas_size(rng, 240)
        if 0.7 <= width / height <= 1.8:
            return width, height


def make_chart(rng: random.Random, size: tuple[int, int] | None = None) -> tuple[Chart, Image.Image, list[Mark]]:
    """A chart with 2 to 5 bars; where names do not fit, they are shortened to what does."""
    width, height = size or _size(rng)
    ground = canvas.background(rng, (width, height), dark=rng.random() < 0.3)
    picture, pen = ground.picture, ImageDraw.Draw(ground.picture)
    readable = canvas.readable_colours(ground)
    ink = (20, 20, 20) if min(canvas.distance(c, (0, 0, 0)) for c in ground.colours) > 300 else (245, 245, 245)
    count = rng.choices((2, 3, 4, 5), (2, 4, 4, 2))[0]
    values = rng.sample(range(3, 100), count)
    same = rng.choice(readable)
    colours = [same] * count if rng.random() < 0.25 else rng.sample(readable, min(count, len(readable)))
    colours += [same] * (count - len(colours))
    font = rng.choice(canvas.FONTS)
    points = canvas.font_size(font, max(rng.uniform(16, 18) / canvas.overview_scale(width, height), 10))
    line = canvas.text_size("H", font, points)[1]
    title = rng.choice((rng.choice(words.TITLES), words.word(rng).upper())) if rng.random() < 0.6 else None
    marks: list[Mark] = []
    top = 0.06 * height
    if title:
        wide = canvas.text_size(title, font, points)[0]
        marks += canvas.draw_text(pen, (width - wide) / 2, 0.03 * height, title, font, points, ink)
        top += 1.4 * line
    base = height - 1.6 * line - 0.03 * height
    slot = 0.94 * width / count
    bars: list[Bar] = []
    thick, spread = slot * rng.uniform(0.45, 0.75), (base - top - 1.5 * line) / max(values)
    for index, name in enumerate(_names(rng, count)):
        while canvas.text_size(name, font, points)[0] > slot * 0.92 and len(name) > 1:
            name = name[:-1]
        if any(name == bar.name for bar in bars):
            name = str(index + 1)
        middle, value = 0.03 * width + slot * (index + 0.5), values[index]
        roof = base - value * spread
        tone = canvas.tone(rng, colours[index])
        pen.rectangle((middle - thick / 2, roof, middle + thick / 2, base), fill=tone)
        for text, y in ((str(value), roof - 1.35 * line), (name, base + 0.35 * line)):
            wide = canvas.text_size(text, font, points)[0]
            marks += canvas.draw_text(pen, middle - wide / 2, y, text, font, points, ink)
        box = (middle - thick / 2, roof, middle + thick / 2, base)
        marks.append(canvas.shape_mark(box, "rectangle", colours[index]))
        bars.append(Bar(name, value, colours[index]))
    pen.line((0.02 * width, base, 0.98 * width, base), fill=ink, width=max(1, round(height / 250)))
    return Chart(tuple(bars), title), picture, marks


class ChartQuestions:
    """Makes turns about a chart in one language."""

    def __init__(self, rng: random.Random, chart: Chart, language: str) -> None:
        self.rng, self.chart, self.language = rng, chart, language

    def turn(self, key: str, answer: str, category: str = "chart", **slots: str) -> Turn:
        return Turn(question(self.rng, key, self.language, **slots), answer, category, self.language)

    def _value(self, bar: Bar, key: str, category: str) -> Turn:
        answer = f"{bar.name} is {bar.value}." if self.language == "en" else f"{bar.name}是{bar.value}。"
        return self.turn(key, answer, category, name=bar.name)

    def value(self) -> list[Turn]:
        bars = self.rng.sample(self.chart.bars, 2)
        turns = [self._value(bars[0], "bar_value", "chart")]
        if self.rng.random() < 0.25:
            turns.append(self._value(bars[1], "then_bar", "follow_up"))
        return turns

    def _extreme(self, highest: bool, key: str, category: str) -> Turn:
        bar = sorted(self.chart.bars, key=lambda bar: bar.value)[-1 if highest else 0]
        if self.language == "en":
            answer = f"{bar.name} is the {'highest' if highest else 'lowest'}."
        else:
            answer = f"{bar.name}最{'高' if highest else '低'}。"
        return self.turn(key, answer, category)

    def extreme(self) -> list[Turn]:
        highest = self.rng.random() < 0.5
        bars = sorted(self.chart.bars, key=lambda bar: bar.value)
        bar = bars[-1 if highest else 0]
        turns = [self._extreme(highest, "bar_highest" if highest else "bar_lowest", "chart")]
        draw = self.rng.random()
        if draw < 0.25:
            turns.append(self._value(bar, "then_value", "follow_up"))
        elif draw < 0.4 and highest:
            turns.append(self._extreme(False, "then_lowest", "follow_up"))
        return turns

    def count(self) -> list[Turn]:
        bars = len(self.chart.bars)
        return [self.turn("bar_count", f"There are {bars} bars." if self.language == "en" else f"有{bars}个柱子。")]

    def colour(self) -> list[Turn]:
        bar = self.rng.choice(self.chart.bars)
        answer = f"It is {bar.colour}." if self.language == "en" else f"它是{COLOURS_ZH[bar.colour]}的。"
        return [self.turn("bar_colour", answer, name=bar.name)]

    def title(self) -> list[Turn]:
        if self.chart.title is None:
            answer = "The chart has no title." if self.language == "en" else "图表没有标题。"
        else:
            said = quoted(self.chart.title, self.language)
            answer = f"The title is {said}." if self.language == "en" else f"标题是{said}。"
        return [self.turn("title", answer)]

    def describe(self) -> list[Turn]:
        if self.language == "en":
            parts = ", ".join(f"{bar.name} {bar.value}" for bar in self.chart.bars)
            answer = f"A bar chart with {len(self.chart.bars)} bars: {parts}."
        else:
            parts = "，".join(f"{bar.name} {bar.value}" for bar in self.chart.bars)
            answer = f"一张有{len(self.chart.bars)}个柱子的柱状图：{parts}。"
        return [self.turn("describe", answer)]
