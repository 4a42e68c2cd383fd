"""Receipts: a shop's name, items with prices, and the total."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from training.world import canvas, words
from training.world.canvas import RGB
from training.world.phrases import question
from training.world.records import Box, Mark, Turn


@dataclass(frozen=True)
class Receipt:
    """Items are (name, price in cents), from top to bottom."""

    shop: str
    items: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        return sum(price for _, price in self.items)


def amount(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def make_receipt(rng: random.Random, most_items: int = 5) -> Receipt:
    count = rng.randint(2, most_items)
    names = rng.sample(words.GOODS, count)
    prices: list[int] = []
    while len(prices) < count:
        cents = rng.randint(1, 19) * 100 + rng.choice((0, 50, 99, 95, 20, 40, rng.randint(0, 99)))
        if cents not in prices:
            prices.append(cents)
    shop = rng.choice((words.word(rng).upper()[:7], words.letters(rng, 4)))
    if rng.random() < 0.6:
        shop += " " + rng.choice(words.SHOP_SUFFIXES)
    return Receipt(shop, tuple(zip(names, prices, strict=True)))


def print_receipt(
    pen: ImageDraw.ImageDraw, receipt: Receipt, box: Box, font: str, points: int, ink: RGB, step: float
) -> list[Mark]:
    """Print a receipt into a box, one line each ``step`` pixels; prices are aligned on the right."""
    left, top, right, _ = box
    marks = canvas.draw_text(
        pen,
        (left + right - canvas.text_size(receipt.shop, font, points)[0]) / 2,
        top,
        receipt.shop,
        font,
        points,
        ink,
    )
    rows = [*receipt.items, ("TOTAL", receipt.total)]
    y = top + 1.4 * step
    for name, cents in rows:
        if name == "TOTAL":
            y += 0.4 * step
            line = round(y - 0.35 * step)
            pen.line((round(left), line, round(right), line), fill=ink, width=max(1, points // 12))
        price = amount(cents)
        marks += canvas.draw_text(pen, left, y, name, font, points, ink)
        wide = canvas.text_size(price, font, points)[0]
        marks += canvas.draw_text(pen, right - wide, y, price, font, points, ink)
        y += step
    return marks


def height_in_steps(receipt: Receipt) -> float:
    """Height of a printed receipt, in line steps."""
    return len(receipt.items) + 2.8


def widest(receipt: Receipt, font: str, points: int) -> float:
    """Least width of a printed receipt, in pixels."""
    rows = [f"{name}  {amount(cents)}" for name, cents in (*receipt.items, ("TOTAL", receipt.total))]
    return max(canvas.text_size(text, font, points)[0] for text in (*rows, receipt.shop))


def receipt_picture(rng: random.Random, size: tuple[int, int] | None = None) -> tuple[Receipt, Image.Image, list[Mark]]:
    """A paper that fills a picture, readable in its overview."""
    width, height = size or _size(rng)
    table = (rng.randint(60, 200), rng.randint(60, 200), rng.randint(60, 200))
    paper = rng.choice(((255, 255, 255), (250, 248, 240), (240, 240, 240)))
    plain = rng.random() < 0.4
    picture = Image.new("RGB", (width, height), paper if plain else table)
    inset = rng.uniform(0.01, 0.05) * min(width, height)
    box = (inset, inset, width - inset, height - inset)
    pen = ImageDraw.Draw(picture)
    pen.rectangle(box, fill=paper)
    pad = 0.04 * width
    left, top, right, bottom = box[0] + pad, box[1] + pad, box[2] - pad, box[3] - pad
    cap = max(16.5 / canvas.overview_scale(width, height), 10.0)
    while True:
        receipt, font = make_receipt(rng), rng.choice(canvas.FONTS)
        points = canvas.font_size(font, cap)
        step = (bottom - top) / height_in_steps(receipt)
        if widest(receipt, font, points) <= right - left and step >= 1.5 * cap:
            break
    room = min((right - left) / widest(receipt, font, points), step / (1.5 * cap), 1.5)
    points = int(points * rng.uniform(1.0, room))
    step = min(step, rng.uniform(1.7, 3.0) * cap * 1.2)
    step = max(step, points * 1.15)
    step = min(step, (bottom - top) / height_in_steps(receipt))
    used = step * height_in_steps(receipt)
    top += rng.random() * max(0.0, bottom - top - used)
    grow = rng.uniform(0.0, 1.0) * max(0.0, (right - left) - widest(receipt, font, points)) / 2
    ink = (rng.randint(0, 60),) * 3
    marks = print_receipt(pen, receipt, (left + grow, top, right - grow, bottom), font, points, ink, step)
    return receipt, picture, marks


def _size(rng: random.Random) -> tuple[int, int]:
    while True:
        width, height = canvas.canvas_size(rng, 240)
        if width / height <= 1.1:
            return width, height


class ReceiptQuestions:
    """Makes turns about a receipt in one language."""

    def __init__(self, rng: random.Random, receipt: Receipt, language: str, category: str = "receipt") -> None:
        self.rng, self.receipt, self.language, self.category = rng, receipt, language, category

    def turn(self, key: str, answer: str, category: str | None = None, **slots: str) -> Turn:
        text = question(self.rng, key, self.language, **slots)
        return Turn(text, answer, category or self.category, self.language)

    def total(self) -> list[Turn]:
        value = amount(self.receipt.total)
        return [self.turn("total", f"The total is {value}." if self.language == "en" else f"总计是{value}。")]

    def _price(self, name: str, cents: int, key: str, category: str | None = None) -> Turn:
        answer = f"It costs {amount(cents)}." if self.language == "en" else f"价格是{amount(cents)}。"
        asked = name if self.language == "zh" or self.rng.random() < 0.5 else name.lower()
        return self.turn(key, answer, category, name=asked, one=asked)

    def price(self) -> list[Turn]:
        first, second = self.rng.sample(self.receipt.items, 2)
        turns = [self._price(*first, "price")]
        if self.rng.random() < 0.3:
            turns.append(self._price(*second, "then_same", "follow_up"))
        return turns

    def shop(self) -> list[Turn]:
        name = self.receipt.shop
        answer = f'The shop is "{name}".' if self.language == "en" else f"商店是“{name}”。"
        return [self.turn("shop", answer)]

    def count(self) -> list[Turn]:
        items = len(self.receipt.items)
        return [self.turn("items", f"There are {items} items." if self.language == "en" else f"有{items}件商品。")]

    def extreme(self) -> list[Turn]:
        dearest = self.rng.random() < 0.5
        name, cents = sorted(self.receipt.items, key=lambda item: item[1])[-1 if dearest else 0]
        if self.language == "en":
            answer = f"{name} is the {'most expensive' if dearest else 'cheapest'}."
        else:
            answer = f"{name}最{'贵' if dearest else '便宜'}。"
        turns = [self.turn("dearest" if dearest else "cheapest", answer)]
        if self.rng.random() < 0.35:
            turns.append(self._price(name, cents, "then_price", "follow_up"))
        return turns

    def describe(self) -> list[Turn]:
        name, items, total = self.receipt.shop, len(self.receipt.items), amount(self.receipt.total)
        if self.language == "en":
            answer = f'A receipt from "{name}" with {items} items and a total of {total}.'
        else:
            answer = f"一张“{name}”的小票，有{items}件商品，总计{total}。"
        return [self.turn("describe", answer)]
