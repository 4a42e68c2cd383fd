"""Backgrounds, antialiased shapes and printed strings, drawn fast."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from training.world.records import Box, Mark, character_label, shape_label

RGB = tuple[int, int, int]
Point = tuple[float, float]
OVERVIEW_AREA = 448 * 448

_FONT_FOLDER = Path(__file__).resolve().parent.parent / "fonts"
_BUILT_IN = ""
FONTS: tuple[str, ...] = (_BUILT_IN, *sorted(str(path) for path in _FONT_FOLDER.glob("*.ttf")))
# Strokes that stay apart at 9 pixels of cap height.
CLEAR_FONTS: tuple[str, ...] = tuple(font for font in FONTS if "Serif" not in font)

# Several tones a colour, among them those that drawing programs call by its name.
TONES: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 30, 30), (230, 40, 50)),
    "orange": ((255, 165, 0), (255, 140, 0), (245, 125, 20)),
    "yellow": ((255, 255, 0), (255, 221, 0), (250, 215, 40)),
    "green": ((0, 128, 0), (30, 160, 60), (0, 200, 0), (60, 180, 75)),
    "blue": ((0, 0, 255), (30, 80, 220), (30, 100, 200), (65, 105, 225)),
    "purple": ((128, 0, 128), (140, 50, 180), (106, 50, 159)),
    "pink": ((255, 192, 203), (255, 130, 180), (255, 150, 190)),
    "brown": ((139, 69, 19), (150, 90, 45), (120, 66, 30)),
    "black": ((0, 0, 0), (25, 25, 25)),
    "white": ((255, 255, 255),),
    "gray": ((128, 128, 128), (150, 150, 150), (110, 110, 110)),
}


@dataclass(frozen=True)
class Background:
    """A filled picture, and the colours that things on it must differ from."""

    picture: Image.Image
    colours: tuple[RGB, ...]
    name: str | None


def distance(one: RGB, other: RGB) -> float:
    return math.dist(one, other)


def tone(rng: random.Random, colour: str) -> RGB:
    """A tone of a named colour, with a little jitter."""
    base = rng.choice(TONES[colour])
    if rng.random() < 0.4:
        return base
    # The channels of a gray move together, or it would take on a hue.
    shift = rng.randint(-8, 8)
    spread = 2 if colour in ("gray", "black", "white") else 8
    red, green, blue = (min(255, max(0, channel + shift + rng.randint(-spread, spread))) for channel in base)
    return red, green, blue


def readable_colours(background: Background, contrast: float = 75.0) -> list[str]:
    """Named colours of which every tone differs from the background."""
    return [
        colour
        for colour, tones in TONES.items()
        if all(distance(one, under) >= contrast for one in tones for under in background.colours)
    ]


def ink_colours(background: Background) -> list[str]:
    """Named colours to print in: they also differ in lightness."""
    unders = [_lightness(under) for under in background.colours]
    return [
        colour
        for colour in readable_colours(background, 110.0)
        if all(abs(_lightness(one) - under) >= 65 for one in TONES[colour] for under in unders)
    ]


def _lightness(colour: RGB) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def overview_scale(width: int, height: int) -> float:
    """By how much the overview enlarges a picture."""
    return math.sqrt(OVERVIEW_AREA / (width * height))


def canvas_size(rng: random.Random, shortest: int = 120) -> tuple[int, int]:
    """A size whose picture is not sliced: sides of ``shortest`` to 633 pixels, at most 1:2."""
    if rng.random() < 0.3:
        return 448, 448
    ratio = math.exp(rng.uniform(-math.log(2), math.log(2)))
    side = rng.uniform(max(shortest, 200), 448) if rng.random() < 0.7 else rng.uniform(shortest, 448)
    width, height = side * math.sqrt(ratio), side / math.sqrt(ratio)
    grow = max(1.0, shortest / min(width, height))
    width, height = int(width * grow), int(height * grow)
    return (width, height) if width * height <= OVERVIEW_AREA else canvas_size(rng, shortest)


def sliced_canvas_size(rng: random.Random) -> tuple[int, int]:
    """A size that people's pictures have and whose picture is sliced."""
    size = rng.choice(((512, 512), (640, 480), (600, 400), (800, 600), (600, 600), (768, 576), (900, 450), (0, 0)))
    if size == (0, 0):
        size = (rng.randint(450, 900), rng.randint(450, 900))
    return size if rng.random() < 0.6 else (size[1], size[0])


def background(rng: random.Random, size: tuple[int, int], *, dark: bool = True) -> Background:
    """White half of the time; else black, gray, pastel, a gradient; sometimes with light noise."""
    draw = rng.random()
    if draw < 0.5:
        return _plain(rng, size, (255, 255, 255), "white", noise=0.1)
    if draw < 0.6 and dark:
        return _plain(rng, size, (0, 0, 0), "black", noise=0.1)
    if draw < 0.66:
        level = rng.choice((rng.randint(195, 240), rng.randint(30, 60) if dark else 225))
        return _plain(rng, size, (level, level, level), None, noise=0.3)
    if draw < 0.86:
        return _plain(rng, size, _pastel(rng), None, noise=0.4)
    first, second = _pastel(rng), _pastel(rng)
    ramp = _ramp(rng.randrange(2)).resize(size)
    picture = Image.composite(Image.new("RGB", size, first), Image.new("RGB", size, second), ramp)
    return Background(picture, (first, second, _between(first, second)), None)


def _pastel(rng: random.Random) -> RGB:
    return rng.randint(205, 255), rng.randint(205, 255), rng.randint(205, 255)


def _between(one: RGB, other: RGB) -> RGB:
    return (one[0] + other[0]) // 2, (one[1] + other[1]) // 2, (one[2] + other[2]) // 2


def _plain(rng: random.Random, size: tuple[int, int], colour: RGB, name: str | None, *, noise: float) -> Background:
    picture = Image.new("RGB", size, colour)
    if rng.random() < noise:
        picture = noisy(rng, picture)
    return Background(picture, (colour,), name)


@lru_cache(maxsize=2)
def _ramp(turn: int) -> Image.Image:
    ramp = Image.linear_gradient("L")
    return ramp if turn == 0 else ramp.transpose(Image.Transpose.ROTATE_90)


@lru_cache(maxsize=1)
def _noise() -> Image.Image:
    values = np.random.default_rng(0).normal(0.0, 5.0, (640, 640, 3))
    return Image.fromarray(np.clip(values + 128.0, 0, 255).astype(np.uint8))


def noisy(rng: random.Random, picture: Image.Image) -> Image.Image:
    """Light noise; pictures larger than the tile stay clean, because that would be slow."""
    width, height = picture.size
    tile = _noise()
    if width > tile.width or height > tile.height:
        return picture
    left, top = rng.randint(0, tile.width - width), rng.randint(0, tile.height - height)
    return ImageChops.add(picture, tile.crop((left, top, left + width, top + height)), offset=-128)


def compressed(rng: random.Random, picture: Image.Image) -> Image.Image:
    """The picture as a JPEG file shows it."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=rng.randint(75, 95))
    return Image.open(file).convert("RGB")


def fill_polygons(
    picture: Image.Image, polygons: list[list[Point]], colour: RGB, *, smooth: bool = True
) -> tuple[float, float, float, float]:
    """Fill the first polygon, cut the others out of it, and return the box (left, top, right, bottom)."""
    left = min(x for x, _ in polygons[0])
    top = min(y for _, y in polygons[0])
    right = max(x for x, _ in polygons[0])
    bottom = max(y for _, y in polygons[0])
    x0, y0 = math.floor(left) - 1, math.floor(top) - 1
    width, height = math.ceil(right) + 1 - x0, math.ceil(bottom) + 1 - y0
    factor = 3 if smooth else 1
    mask = Image.new("L", (width * factor, height * factor), 0)
    pen = ImageDraw.Draw(mask)
    for index, polygon in enumerate(polygons):
        pen.polygon([((x - x0) * factor, (y - y0) * factor) for x, y in polygon], fill=0 if index else 255)
    picture.paste(colour, (x0, y0), mask.reduce(factor) if smooth else mask)
    return left, top, right, bottom


def shape_mark(box: Box, kind: str, colour: str) -> Mark:
    return Mark(box, shape_label(kind, colour))


@lru_cache(maxsize=1024)
def _font(font: str, size: int) -> ImageFont.FreeTypeFont:
    if font == _BUILT_IN:
        built_in = ImageFont.load_default(size)
        assert isinstance(built_in, ImageFont.FreeTypeFont)
        return built_in
    return ImageFont.truetype(font, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=64)
def _cap_ratio(font: str) -> float:
    """Height of a capital H for each pixel of font size."""
    _, top, _, bottom = _font(font, 200).getbbox("H")
    return (bottom - top) / 200


def font_size(font: str, cap_height: float) -> int:
    """Font size (pixels) whose capitals are at least ``cap_height`` pixels high."""
    return max(6, math.ceil(cap_height / _cap_ratio(font) - 0.01))


@lru_cache(maxsize=1 << 16)
def _glyph(font: str, size: int, character: str) -> tuple[float, Box]:
    """Advance and ink box of one character, drawn at the origin."""
    face = _font(font, size)
    return face.getlength(character), face.getbbox(character)


def cap_height(font: str, size: int) -> float:
    """Height of a capital H in pixels, as it is drawn."""
    _, top, _, bottom = _glyph(font, size, "H")[1]
    return bottom - top


def text_size(text: str, font: str, size: int) -> tuple[float, float]:
    """Width and height (of "Hg") of a string, in pixels."""
    height = _glyph(font, size, "g")[1][3] - _glyph(font, size, "H")[1][1]
    return sum(_glyph(font, size, character)[0] for character in text), height


def draw_text(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, font: str, size: int, colour: RGB) -> list[Mark]:
    """Print a string whose capitals start at (x, y), and return one mark a character (spaces have none)."""
    y -= _glyph(font, size, "H")[1][1]
    x, y = round(x), round(y)
    face = _font(font, size)
    pen.text((x, y), text, font=face, fill=colour)
    marks = []
    kerned = face.getlength(text) / max(1e-6, sum(_glyph(font, size, character)[0] for character in text))
    position = float(x)
    for character in text:
        advance, (left, top, right, bottom) = _glyph(font, size, character)
        if character != " ":
            box = (position + left, y + top, position + right, y + bottom)
            marks.append(Mark(box, character_label(character)))
        position += advance * kerned
    return marks
