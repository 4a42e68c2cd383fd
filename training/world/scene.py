"""Scenes: a few shapes on a background, at most one of them crowding another."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

from training.world import canvas, words
from training.world.canvas import RGB, Background, Point
from training.world.records import Box, Mark
from training.world.vocabulary import KINDS, SIZES

# Extent (longer side of the box) for each size, in shorter sides of the picture. The gaps keep sizes apart.
EXTENTS = {"small": (0.09, 0.15), "medium": (0.20, 0.28), "large": (0.36, 0.50)}
_BORDER_MARGIN = 0.04
_ROW_GAP = 0.08


@dataclass(frozen=True)
class Shape:
    """One shape; its centre, extent and half sides are in pixels."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    extent: float
    outline: tuple[Point, ...]
    rgb: RGB

    @property
    def half(self) -> Point:
        return _half_sides(self.outline, self.extent)


@dataclass(frozen=True)
class Printed:
    """A printed string, the place of its centre, and its marks."""

    text: str
    place: int
    colour: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order (by thirds, then from left to right), and at most one printed word."""

    width: int
    height: int
    ground: Background
    shapes: tuple[Shape, ...]
    smooth: bool = True
    border: RGB | None = None
    printed: Printed | None = None

    def place(self, shape: Shape) -> int:
        return place_of(shape.x, shape.y, self.width, self.height)


def place_of(x: float, y: float, width: float, height: float) -> int:
    """Which third, 0 to 8 in reading order."""
    return min(2, int(3 * y / height)) * 3 + min(2, int(3 * x / width))


def _half_sides(outline: tuple[Point, ...], extent: float) -> Point:
    return extent * max(abs(x) for x, _ in outline), extent * max(abs(y) for _, y in outline)


def _regular(corners: int, start: float, inner: float | None = None) -> list[Point]:
    count = corners if inner is None else corners * 2
    radii = [1.0 if inner is None or index % 2 == 0 else inner for index in range(count)]
    angles = [start + 2 * math.pi * index / count for index in range(count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


@lru_cache(maxsize=1)
def _heart() -> list[Point]:
    angles = [2 * math.pi * index / 48 for index in range(48)]
    return [
        (
            16 * math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
        )
        for a in angles
    ]


def _points(rng: random.Random, kind: str) -> list[Point]:
    """Corners at any scale, before turning."""
    if kind in ("circle", "ring"):
        return _regular(64, 0.0)
    if kind == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if kind == "rectangle":
        ratio = rng.uniform(1.55, 2.3)
        wide, high = (ratio, 1.0) if rng.random() < 0.65 else (1.0, ratio)
        return [(-wide, -high), (wide, -high), (wide, high), (-wide, high)]
    if kind == "triangle":
        if rng.random() < 0.15:
            return [(-1, -0.87), (1, -0.87), (0, 0.87)]
        return [(rng.choice((0.0, 0.0, 0.0, -0.3, 0.3)), -0.9), (1, 0.85), (-1, 0.85)]
    if kind == "star":
        return _regular(5, -math.pi / 2, rng.uniform(0.38, 0.5))
    if kind == "diamond":
        wide = rng.uniform(0.65, 1.0)
        return [(0, -1), (wide, 0), (0, 1), (-wide, 0)]
    if kind == "hexagon":
        return _regular(6, rng.choice((0.0, math.pi / 6)))
    if kind == "heart":
        return _heart()
    arm = rng.uniform(0.25, 0.4)
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    return [point for turn in range(4) for point in [_turned(point, turn * math.pi / 2) for point in quarter]]


def _turned(point: Point, angle: float) -> Point:
    cosine, sine = math.cos(angle), math.sin(angle)
    return point[0] * cosine - point[1] * sine, point[0] * sine + point[1] * cosine


def make_outline(rng: random.Random, kind: str) -> tuple[Point, ...]:
    """Corners around the origin whose box has a longer side of 1."""
    points = _points(rng, kind)
    if kind not in ("circle", "ring") and rng.random() < 0.4:
        angle = rng.uniform(-0.14, 0.14)
        points = [_turned(point, angle) for point in points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    scale = max(max(xs) - min(xs), max(ys) - min(ys))
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    return tuple(((x - middle[0]) / scale, (y - middle[1]) / scale) for x, y in points)


def make_extent(rng: random.Random, size: str, width: int, height: int) -> float:
    return rng.uniform(*EXTENTS[size]) * min(width, height)


def _free(shape: Shape, others: list[Shape], keep_out: list[Box], width: int, height: int) -> bool:
    gap = 0.025 * min(width, height)
    half_x, half_y = shape.half
    place = place_of(shape.x, shape.y, width, height)
    for other in others:
        other_x, other_y = other.half
        beside = abs(shape.x - other.x) >= half_x + other_x + gap
        if not beside and abs(shape.y - other.y) < half_y + other_y + gap:
            return False
        same = place_of(other.x, other.y, width, height) == place
        if same and abs(shape.x - other.x) < _ROW_GAP * width:
            return False
    return not any(
        shape.x + half_x + gap > left
        and shape.x - half_x - gap < right
        and shape.y + half_y + gap > top
        and shape.y - half_y - gap < bottom
        for left, top, right, bottom in keep_out
    )


def put(
    rng: random.Random,
    shape: Shape,
    others: list[Shape],
    size: tuple[int, int],
    *,
    places: list[int] | None = None,
    keep_out: list[Box] | None = None,
) -> Shape | None:
    """The shape at a random free position, well inside one of ``places``, or None if none was found."""
    width, height = size
    half_x, half_y = shape.half
    for _ in range(24):
        row, column = divmod(rng.choice(places) if places else rng.randrange(9), 3)
        lowest_x = max((column / 3 + _BORDER_MARGIN) * width, half_x + 2)
        highest_x = min(((column + 1) / 3 - _BORDER_MARGIN) * width, width - half_x - 2)
        lowest_y = max((row / 3 + _BORDER_MARGIN) * height, half_y + 2)
        highest_y = min(((row + 1) / 3 - _BORDER_MARGIN) * height, height - half_y - 2)
        if lowest_x > highest_x or lowest_y > highest_y:
            continue
        placed = Shape(
            shape.kind,
            shape.colour,
            shape.size,
            rng.uniform(lowest_x, highest_x),
            rng.uniform(lowest_y, highest_y),
            shape.extent,
            shape.outline,
            shape.rgb,
        )
        if _free(placed, others, keep_out or [], width, height):
            return placed
    return None


def new_shape(
    rng: random.Random, size: tuple[int, int], colours: list[str], *, kind: str, colour: str, extent: str
) -> Shape:
    """A shape that has no position yet."""
    assert colour in colours
    outline = make_outline(rng, kind)
    return Shape(kind, colour, extent, 0.0, 0.0, make_extent(rng, extent, *size), outline, canvas.tone(rng, colour))


def in_reading_order(shapes: list[Shape], width: int, height: int) -> tuple[Shape, ...]:
    return tuple(sorted(shapes, key=lambda shape: (min(2, int(3 * shape.y / height)), shape.x)))


def make_shapes(
    rng: random.Random,
    size: tuple[int, int],
    colours: list[str],
    count: int,
    *,
    keep_out: list[Box] | None = None,
    distinct: bool = False,
) -> list[Shape]:
    """Up to ``count`` shapes; unless ``distinct``, kinds and colours repeat often enough to be counted."""
    sizes = sorted(rng.choices(SIZES, (3, 4, 3 if count < 5 else 1), k=count), key=SIZES.index, reverse=True)
    repeat = 0.0 if distinct else rng.choice((0.0, 0.3, 0.6))
    shapes: list[Shape] = []
    for extent in sizes:
        model = rng.choice(shapes) if shapes and rng.random() < repeat else None
        alike = rng.choice(("kind", "kind", "colour", "both")) if model else ""
        kind = model.kind if model and alike in ("kind", "both") else rng.choice(KINDS)
        colour = model.colour if model and alike in ("colour", "both") else rng.choice(colours)
        if distinct and any((kind, colour) == (other.kind, other.colour) for other in shapes):
            continue
        shape = new_shape(rng, size, colours, kind=kind, colour=colour, extent=extent)
        placed = put(rng, shape, shapes, size, keep_out=keep_out)
        if placed is not None:
            shapes.append(placed)
    return shapes


def make_scene(
    rng: random.Random,
    size: tuple[int, int],
    *,
    count: int | None = None,
    distinct: bool = False,
    text_share: float = 0.1,
) -> Scene:
    """A scene of ``count`` shapes (at random 0 to 6; fewer where there is no room)."""
    ground = canvas.background(rng, size)
    colours = canvas.readable_colours(ground)
    if count is None:
        count = rng.choices(range(7), (2, 17, 20, 22, 17, 12, 10))[0]
    shapes = make_shapes(rng, size, colours, count, distinct=distinct)
    outlined = rng.random() < 0.12 and distance_to_black(ground) > 300
    border = (0, 0, 0) if outlined and all(shape.colour != "black" for shape in shapes) else None
    scene = Scene(*size, ground, in_reading_order(shapes, *size), rng.random() < 0.8, border)
    if rng.random() < text_share:
        return _with_text(rng, scene)
    return scene


def distance_to_black(ground: Background) -> float:
    return min(canvas.distance(colour, (0, 0, 0)) for colour in ground.colours)


def _with_text(rng: random.Random, scene: Scene) -> Scene:
    """The scene with one readable word in a free place, if there is room."""
    scale = canvas.overview_scale(scene.width, scene.height)
    font = rng.choice(canvas.FONTS)
    size = canvas.font_size(font, max(rng.uniform(17, 26) / scale, 10))
    text = words.printed(rng, 6)
    wide, high = canvas.text_size(text, font, size)
    colour = rng.choice(canvas.ink_colours(scene.ground) or ["black"])
    # A stand-in for the string's box: the search for a free position is the same.
    outline: tuple[Point, ...] = ((-0.5, -0.5 * high / wide), (0.5, 0.5 * high / wide))
    stand_in = Shape("rectangle", colour, "small", 0.0, 0.0, wide, outline, canvas.tone(rng, colour))
    placed = put(rng, stand_in, list(scene.shapes), (scene.width, scene.height))
    if placed is None:
        return scene
    picture = scene.ground.picture.copy()
    marks = canvas.draw_text(
        ImageDraw.Draw(picture), placed.x - wide / 2, placed.y - high / 2, text, font, size, placed.rgb
    )
    ground = Background(picture, scene.ground.colours, scene.ground.name)
    printed = Printed(text, scene.place(placed), colour, tuple(marks))
    return Scene(scene.width, scene.height, ground, scene.shapes, scene.smooth, scene.border, printed)


def render(scene: Scene) -> tuple[Image.Image, list[Mark]]:
    """Draw a scene."""
    picture = scene.ground.picture.copy()
    marks = list(scene.printed.marks) if scene.printed else []
    marks += draw_shapes(picture, list(scene.shapes), smooth=scene.smooth, border=scene.border)
    return picture, marks


def draw_shapes(
    picture: Image.Image, shapes: list[Shape], *, smooth: bool = True, border: RGB | None = None
) -> list[Mark]:
    """Draw shapes onto a picture."""
    marks = []
    for shape in shapes:
        polygon = [(shape.x + shape.extent * x, shape.y + shape.extent * y) for x, y in shape.outline]
        polygons = [polygon]
        if shape.kind == "ring":
            polygons.append([(shape.x + 0.6 * (x - shape.x), shape.y + 0.6 * (y - shape.y)) for x, y in polygon])
        box = canvas.fill_polygons(picture, polygons, shape.rgb, smooth=smooth)
        if border is not None:
            pen = ImageDraw.Draw(picture)
            width = max(1, round(0.006 * min(picture.size)))
            for edge in polygons:
                pen.line([*edge, edge[0]], fill=border, width=width, joint="curve")
        marks.append(canvas.shape_mark(box, shape.kind, shape.colour))
    return marks
