"""Large pictures with print so small that only slices can read it, beside a few shapes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from foveate.media.slicing import plan_slices
from training.world import canvas, words
from training.world.phrases import question
from training.world.receipt import Receipt, height_in_steps, make_receipt, print_receipt, widest
from training.world.records import Box, Mark, Turn
from training.world.scene import Scene, draw_shapes, in_reading_order, make_shapes, place_of
from training.world.scene_questions import SceneQuestions
from training.world.sign import reading
from training.world.wording import SIDES, place_in_question

# Grids (columns, rows): fewer than four slices do not enlarge enough. 2×2 and 3×2 are the usual ones.
_SIZES = (
    ((896, 896), 4),
    ((1024, 768), 2),
    ((1344, 896), 3),
    ((896, 1344), 3),
    ((1280, 960), 1),
    ((1344, 1344), 1.2),
)
OVERVIEW_CAP, SLICE_CAP = 4.6, 9.0


@dataclass(frozen=True)
class Print:
    """A tiny string: its place, and on which side of which shape (index) it stands, if it does."""

    text: str
    place: int
    beside: tuple[int, int] | None
    cap_height: float
    box: Box


@dataclass(frozen=True)
class Tiny:
    """A large picture's contents; all boxes and heights are in its pixels."""

    scene: Scene
    prints: tuple[Print, ...]
    receipt: Receipt | None
    category: str


def _size(rng: random.Random) -> tuple[int, int]:
    while True:
        width, height = rng.choices([size for size, _ in _SIZES], [weight for _, weight in _SIZES])[0]
        if rng.random() < 0.5:
            width, height = int(width * rng.uniform(0.96, 1.1)), int(height * rng.uniform(0.96, 1.1))
        if plan_slices(width, height).num_slices > 4 and cap_range(width, height) is not None:
            return width, height


def cap_range(width: int, height: int, overview_cap: float = OVERVIEW_CAP) -> tuple[float, float] | None:
    """Cap heights (source pixels) that a slice can read, below ``overview_cap`` in the overview; or None."""
    plan = plan_slices(width, height)
    if plan.refine_size is None:
        return None
    enlarged = min(plan.refine_size[0] / width, plan.refine_size[1] / height)
    shrunk = max(plan.source_size[0] / width, plan.source_size[1] / height)
    lowest, highest = SLICE_CAP / enlarged, overview_cap / shrunk
    # Glyphs are as high as whole pixels.
    return (lowest, highest) if math.floor(highest) >= math.ceil(lowest) else None


def cells(width: int, height: int, margin: float) -> list[Box]:
    """The parts of the picture that its slices show, without ``margin`` pixels at their borders."""
    columns, rows = plan_slices(width, height).grid or (1, 1)
    return [
        (
            width * column / columns + margin,
            height * row / rows + margin,
            width * (column + 1) / columns - margin,
            height * (row + 1) / rows - margin,
        )
        for row in range(rows)
        for column in range(columns)
    ]


class _Press:
    """Finds room for tiny strings and prints them."""

    def __init__(self, rng: random.Random, scene: Scene, limits: tuple[float, float]) -> None:
        self.rng, self.scene, self.limits = rng, scene, limits
        self.size = scene.width, scene.height
        self.picture = scene.ground.picture
        self.pen = ImageDraw.Draw(self.picture)
        dark = min(canvas.distance(colour, (255, 255, 255)) for colour in scene.ground.colours) > 250
        self.ink: tuple[int, int, int] = (255, 255, 255) if dark else rng.choice(((0, 0, 0), (30, 30, 40), (0, 0, 120)))
        self.taken: list[Box] = [
            (s.x - s.half[0] - 8, s.y - s.half[1] - 8, s.x + s.half[0] + 8, s.y + s.half[1] + 8) for s in scene.shapes
        ]
        self.cells = cells(*self.size, margin=10)
        self.marks: list[Mark] = []
        self.prints: list[Print] = []
        self.receipt: Receipt | None = None

    def font(self) -> tuple[str, int, float] | None:
        """A clear font, its size and its real cap height, within the range; None if no font has such a size."""
        low, high = self.limits
        fitting = [
            (font, points, cap)
            for font in canvas.CLEAR_FONTS
            for points in range(canvas.font_size(font, low) - 1, canvas.font_size(font, high) + 2)
            if low <= (cap := canvas.cap_height(font, points)) <= high
        ]
        return self.rng.choice(fitting) if fitting else None

    def free(self, box: Box) -> bool:
        left, top, right, bottom = box
        inside = any(
            left >= cell[0] and top >= cell[1] and right <= cell[2] and bottom <= cell[3] for cell in self.cells
        )
        return inside and not any(
            left < other[2] and right > other[0] and top < other[3] and bottom > other[1] for other in self.taken
        )

    def place(self, box: Box) -> int | None:
        """Third of the box's centre, or None near a border between thirds."""
        x, y = (box[0] + box[2]) / 2 / self.size[0], (box[1] + box[3]) / 2 / self.size[1]
        if any(abs(part - border) < 0.04 for part in (x, y) for border in (1 / 3, 2 / 3)):
            return None
        return place_of(x, y, 1, 1)

    def _near_a_shape(self, box: Box) -> bool:
        left, top, right, bottom = box
        return any(
            left < shape.x + shape.half[0] + 50
            and right > shape.x - shape.half[0] - 50
            and top < shape.y + shape.half[1] + 50
            and bottom > shape.y - shape.half[1] - 50
            for shape in self.scene.shapes
        )

    def candidates(self, wide: float, high: float) -> Iterator[tuple[tuple[int, int] | None, float, float]]:
        for _ in range(30):
            if self.scene.shapes and self.rng.random() < 0.5:
                index, side = self.rng.randrange(len(self.scene.shapes)), self.rng.choice((1, 3, 3, 2, 0))
                shape = self.scene.shapes[index]
                half_x, half_y = shape.half
                away = self.rng.uniform(10, 20)
                x = shape.x + ((-half_x - away - wide), half_x + away, -wide / 2, -wide / 2)[side]
                y = shape.y + (-high / 2, -high / 2, -half_y - away - high, half_y + away)[side]
                yield (index, side), x, y
            else:
                x = self.rng.uniform(10, self.size[0] - wide - 10)
                yield None, x, self.rng.uniform(10, self.size[1] - high - 10)

    def print(self) -> None:
        """Print one string if there is room."""
        if (face := self.font()) is None:
            return
        font, points, cap = face
        text = words.unguessable(self.rng)
        wide, high = canvas.text_size(text, font, points)
        for beside, x, y in self.candidates(wide, high):
            box = (x - 4, y - 4, x + wide + 4, y + high + 4)
            place = self.place(box)
            if place is None or not self.free(box) or (beside is None and self._near_a_shape(box)):
                continue
            self.marks += canvas.draw_text(self.pen, x, y, text, font, points, self.ink)
            # Keep others well away, so that a string belongs to one shape only.
            self.taken.append((box[0] - 20, box[1] - 20, box[2] + 20, box[3] + 20))
            self.prints.append(Print(text, place, beside, cap, box))
            return

    def print_receipt(self) -> None:
        """Print a whole receipt into one slice, if there is room."""
        if (face := self.font()) is None:
            return
        font, points, cap = face
        receipt = make_receipt(self.rng, 4)
        step = cap * self.rng.uniform(2.0, 2.6)
        wide = widest(receipt, font, points) * self.rng.uniform(1.05, 1.3)
        high = step * height_in_steps(receipt)
        for _ in range(30):
            x = self.rng.uniform(10, self.size[0] - wide - 30)
            y = self.rng.uniform(10, self.size[1] - high - 30)
            box = (x - 10, y - 10, x + wide + 10, y + high + 10)
            if self.free(box):
                self.pen.rectangle(box, fill=(255, 255, 255), outline=(120, 120, 120))
                spot = (x, y, x + wide, y + high)
                self.marks += print_receipt(self.pen, receipt, spot, font, points, (20, 20, 20), step)
                self.receipt = receipt
                return


def make_tiny(rng: random.Random) -> tuple[Tiny, Image.Image, list[Mark]]:
    """A large picture: at most four shapes, and one to four tiny strings or one tiny receipt.

    A fifth have sizes that people's pictures have, and print that is perhaps readable without slices.
    """
    tiny = rng.random() < 0.8
    size = _size(rng) if tiny else canvas.sliced_canvas_size(rng)
    limits = cap_range(*size, OVERVIEW_CAP if tiny else 17.0)
    if limits is None:
        return make_tiny(rng)
    contents = _fill(rng, size, limits, (35, 30, 20, 15))
    return _tiny(contents, "small_text" if tiny else "text") if contents else make_tiny(rng)


def make_fine(rng: random.Random) -> tuple[Tiny, Image.Image, list[Mark]]:
    """A picture that is not sliced, with up to nine small strings: what one slice of a larger one may show.

    It teaches to read small print at a fifth of the cost, and is never evaluated.
    """
    width, height = rng.choice(((448, 448), (448, 448), (512, 384), (384, 512), (560, 350), (350, 560)))
    shrink = rng.choice((1.0, rng.uniform(0.85, 1.0)))
    size = int(width * shrink), int(height * shrink)
    scale = canvas.overview_scale(*size)
    contents = _fill(rng, size, (SLICE_CAP / scale, 18.0 / scale), (0, 1, 1, 1, 1, 1, 1, 1, 1))
    return _tiny(contents, "text") if contents else make_fine(rng)


def _fill(
    rng: random.Random, size: tuple[int, int], limits: tuple[float, float], weights: tuple[int, ...]
) -> _Press | None:
    """At most four shapes, and one string or more (by ``weights``) or a receipt; None if nothing could be printed."""
    ground = canvas.background(rng, size)
    colours = canvas.readable_colours(ground)
    shapes = make_shapes(rng, size, colours, rng.choices((0, 1, 2, 3, 4), (1, 3, 4, 3, 2))[0])
    press = _Press(rng, Scene(*size, ground, in_reading_order(shapes, *size)), limits)
    if rng.random() < 0.15:
        press.print_receipt()
    else:
        for _ in range(rng.choices(range(1, len(weights) + 1), weights)[0]):
            press.print()
    return press if press.prints or press.receipt else None


def _tiny(press: _Press, category: str) -> tuple[Tiny, Image.Image, list[Mark]]:
    marks = press.marks + draw_shapes(press.picture, list(press.scene.shapes))
    return Tiny(press.scene, tuple(press.prints), press.receipt, category), press.picture, marks


class TinyQuestions:
    """Makes turns about tiny print in one language; the shapes have `SceneQuestions`."""

    def __init__(self, rng: random.Random, tiny: Tiny, language: str) -> None:
        self.rng, self.tiny, self.language = rng, tiny, language
        self.scene = SceneQuestions(rng, tiny.scene, language)

    def _turn(self, key: str, texts: list[str], **slots: str) -> Turn:
        text = question(self.rng, key, self.language, **slots)
        return Turn(text, reading(texts, self.language), self.tiny.category, self.language)

    def read(self) -> list[Turn] | None:
        prints = sorted(self.tiny.prints, key=lambda one: one.place)
        places = {one.place for one in prints}
        if not 1 <= len(prints) <= 3 or len(places) < len(prints):
            return None
        key = self.rng.choice(("read", "read_small", "read_small"))
        return [self._turn(key, [one.text for one in prints])]

    def at_place(self) -> list[Turn] | None:
        if not self.tiny.prints:
            return None
        one = self.rng.choice(self.tiny.prints)
        if sum(other.place == one.place for other in self.tiny.prints) > 1:
            return None
        where = place_in_question(self.rng, one.place, self.language)
        return [self._turn("read_small_at", [one.text], place=where)]

    def by_shape(self) -> list[Turn] | None:
        prints = [one for one in self.tiny.prints if one.beside]
        if not prints:
            return None
        one = self.rng.choice(prints)
        assert one.beside is not None
        index, side = one.beside
        name = self.scene.reference(self.tiny.scene.shapes[index], coloured=True)
        alone = sum(bool(other.beside) and other.beside[0] == index for other in prints if other.beside) == 1
        if name is None:
            return None
        if alone and self.rng.random() < 0.4:
            where = self.rng.choice(("next to", "beside") if self.language == "en" else ("旁边",))
        else:
            where = self.rng.choice([word for word in SIDES[self.language][side] if "than" not in word])
        return [self._turn("read_small_by", [one.text], side=where, one=name)]

    def number(self) -> list[Turn] | None:
        numbers = [one.text for one in self.tiny.prints if words.is_number(one.text)]
        if len(numbers) != 1 or sum(any(c.isdecimal() for c in one.text) for one in self.tiny.prints) > 1:
            return None
        answer = f"The number is {numbers[0]}." if self.language == "en" else f"数字是{numbers[0]}。"
        return [Turn(question(self.rng, "number", self.language), answer, self.tiny.category, self.language)]
