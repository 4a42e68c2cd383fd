"""How scenes are spoken of in answers, in both languages."""

from __future__ import annotations

import random

from training.world.scene import Scene, Shape
from training.world.vocabulary import (
    PLACE_SYNONYMS_EN,
    PLACE_SYNONYMS_ZH,
    SIZES_ZH,
    capitalised,
    counted,
    joined,
    place_name,
    quoted,
    shape_name,
    with_article,
)

SIDES = {
    "en": (
        ("to the left of", "left of", "on the left of"),
        ("to the right of", "right of", "on the right of"),
        ("above", "higher than"),
        ("below", "under", "lower than"),
    ),
    "zh": (("左边", "左侧"), ("右边", "右侧"), ("上面", "上方"), ("下面", "下方")),
}
NOTHING = {"en": "There is nothing there.", "zh": "那里什么也没有。"}
SAME_SIZE = {"en": "They are the same size.", "zh": "它们一样大。"}


def place_in_question(rng: random.Random, place: int, language: str) -> str:
    """A third of the picture, in any wording."""
    if rng.random() < 0.6:
        return place_name(place, language)
    return rng.choice((PLACE_SYNONYMS_EN if language == "en" else PLACE_SYNONYMS_ZH)[place])


def absent(colour: str | None, kind: str | None, language: str) -> str:
    """What is said about a shape that is not there."""
    name = shape_name(colour, kind, language)
    return f"There is no {name} in this picture." if language == "en" else f"图中没有{name}。"


def indefinite(shape: Shape, language: str, *, sized: bool = False) -> str:
    """ "a red circle"; 一个红色的圆形."""
    name = shape_name(shape.colour, shape.kind, language)
    if language == "en":
        return with_article(f"{shape.size} {name}" if sized else name)
    return f"一个{SIZES_ZH[shape.size]}{name}" if sized else f"一个{name}"


def sentence(text: str, language: str) -> str:
    return capitalised(text) + "." if language == "en" else text + "。"


def description(scene: Scene, language: str) -> str:
    """Every shape in reading order, with size and place, then the printed text."""
    shapes, english = scene.shapes, language == "en"
    if not shapes:
        text = "There are no shapes in this picture." if english else "图中没有图形。"
    elif english:
        parts = [f"{indefinite(shape, 'en', sized=True)} {place_name(scene.place(shape), 'en')}" for shape in shapes]
        verb = "is" if len(shapes) == 1 else "are"
        text = f"There {verb} {counted(len(shapes), None, None, 'en')}: {joined(parts, 'en')}."
    else:
        parts = [f"{place_name(scene.place(shape), 'zh')}有{indefinite(shape, 'zh', sized=True)}" for shape in shapes]
        text = f"图中有{len(shapes)}个图形：{'，'.join(parts)}。"
    if scene.printed:
        said = quoted(scene.printed.text, language)
        text += f" The text reads {said}." if english else f"文字是{said}。"
    return text


def count_answer(count: int, colour: str | None, kind: str | None, language: str) -> str:
    if count == 0:
        return absent(colour, kind, language) if colour or kind else description_of_none(language)
    if language == "zh":
        return f"图中有{counted(count, colour, kind, 'zh')}。"
    return f"There {'is' if count == 1 else 'are'} {counted(count, colour, kind, 'en')}."


def description_of_none(language: str) -> str:
    return "There are no shapes in this picture." if language == "en" else "图中没有图形。"


def place_answer(place: int, language: str) -> str:
    return f"It is {place_name(place, 'en')}." if language == "en" else f"它在{place_name(place, 'zh')}。"
