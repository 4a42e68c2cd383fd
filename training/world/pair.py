"""Two pictures: the same scene with one change, or two scenes of their own."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from training.world import canvas
from training.world.phrases import WHICH, about_picture, question
from training.world.records import Turn
from training.world.scene import (
    Scene,
    Shape,
    in_reading_order,
    make_extent,
    make_outline,
    make_scene,
    new_shape,
    put,
)
from training.world.scene_questions import SceneQuestions
from training.world.vocabulary import (
    COLOURS_ZH,
    KINDS,
    SIZES,
    capitalised,
    place_name,
    shape_name,
    with_article,
)
from training.world.wording import indefinite

# A change of size finds no room as often as not.
CHANGES = ("colour", "kind", "added", "removed", "size", "size", "moved", "none")


@dataclass(frozen=True)
class Pair:
    """Two scenes; ``change`` is None for unrelated ones, else (change, shape before, shape after)."""

    scenes: tuple[Scene, Scene]
    change: tuple[str, Shape | None, Shape | None] | None


def make_pair(rng: random.Random, size: tuple[int, int], other_size: tuple[int, int]) -> Pair:
    """Mostly one change; a fifth of the pairs are unrelated."""
    if rng.random() < 0.2:
        return Pair((make_scene(rng, size, text_share=0), make_scene(rng, other_size, text_share=0)), None)
    while True:
        first = make_scene(rng, size, count=rng.choices((1, 2, 3, 4), (2, 4, 4, 2))[0], distinct=True, text_share=0)
        if first.shapes:
            for _ in range(6):
                pair = _changed(rng, first, rng.choice(CHANGES))
                if pair is not None:
                    return pair


def _changed(rng: random.Random, scene: Scene, change: str) -> Pair | None:
    if change == "none":
        return Pair((scene, scene), ("none", None, None))
    shapes, size = list(scene.shapes), (scene.width, scene.height)
    colours = canvas.readable_colours(scene.ground)
    old = rng.choice(shapes)
    rest = [shape for shape in shapes if shape is not old]
    new: Shape | None = None
    if change == "removed":
        return _pair(scene, rest, ("removed", old, None))
    if change == "added":
        wanted = new_shape(
            rng,
            size,
            colours,
            kind=rng.choice(KINDS),
            colour=rng.choice(colours),
            extent=rng.choice(SIZES[:2]),
        )
        new = put(rng, wanted, shapes, size) if _unlike(wanted, shapes) else None
        return _pair(scene, [*shapes, new], ("added", None, new)) if new else None
    if change == "colour":
        colour = rng.choice([colour for colour in colours if colour != old.colour])
        new = replace(old, colour=colour, rgb=canvas.tone(rng, colour))
    elif change == "kind":
        kind = rng.choice([kind for kind in KINDS if kind != old.kind])
        new = replace(old, kind=kind, outline=make_outline(rng, kind))
    elif change == "size":
        extent = rng.choice([extent for extent in SIZES if extent != old.size])
        new = replace(old, size=extent, extent=make_extent(rng, extent, *size))
        new = _still_fits(new, rest, size)
    else:
        places = [place for place in range(9) if place != scene.place(old)]
        new = put(rng, old, rest, size, places=places)
    if new is None or not _unlike(new, rest):
        return None
    return _pair(scene, [*rest, new], (change, old, new))


def _unlike(shape: Shape, others: list[Shape]) -> bool:
    return all((shape.kind, shape.colour) != (other.kind, other.colour) for other in others)


def _still_fits(shape: Shape, others: list[Shape], size: tuple[int, int]) -> Shape | None:
    half_x, half_y = shape.half
    if not (half_x < shape.x < size[0] - half_x and half_y < shape.y < size[1] - half_y):
        return None
    for other in others:
        other_x, other_y = other.half
        if abs(shape.x - other.x) < half_x + other_x + 4 and abs(shape.y - other.y) < half_y + other_y + 4:
            return None
    return shape


def _pair(scene: Scene, shapes: list[Shape], change: tuple[str, Shape | None, Shape | None]) -> Pair:
    second = replace(scene, shapes=in_reading_order(shapes, scene.width, scene.height))
    return Pair((scene, second), change)


class PairQuestions:
    """Makes turns about two pictures in one language."""

    def __init__(self, rng: random.Random, pair: Pair, language: str) -> None:
        self.rng, self.pair, self.language = rng, pair, language
        self.scenes = [SceneQuestions(rng, scene, language) for scene in pair.scenes]

    def turn(self, key: str, answer: str, category: str, **slots: str) -> Turn:
        return Turn(question(self.rng, key, self.language, **slots), answer, category, self.language)

    def difference(self) -> list[Turn] | None:
        if self.pair.change is None:
            return None
        answer = self._english() if self.language == "en" else self._chinese()
        return [self.turn("difference", answer, "difference")]

    def _english(self) -> str:
        assert self.pair.change is not None
        change, old, new = self.pair.change
        if old and new:
            name = f"The {shape_name(old.colour, old.kind, 'en')}"
            if change == "colour":
                return f"{name} became {new.colour}."
            if change == "kind":
                return f"{name} became {with_article(shape_name(new.colour, new.kind, 'en'))}."
            if change == "size":
                return f"{name} became {'larger' if new.extent > old.extent else 'smaller'}."
            places = [place_name(self.pair.scenes[0].place(shape), "en") for shape in (old, new)]
            before, after = (place.removeprefix("at ").removeprefix("in ") for place in places)
            return f"{name} moved from {before} to {after}."
        if new:
            place = place_name(self.pair.scenes[1].place(new), "en")
            return f"{capitalised(indefinite(new, 'en'))} was added {place}."
        if old:
            place = place_name(self.pair.scenes[0].place(old), "en")
            return f"The {shape_name(old.colour, old.kind, 'en')} {place} was removed."
        return "The two pictures are the same."

    def _chinese(self) -> str:
        assert self.pair.change is not None
        change, old, new = self.pair.change
        if old and new:
            name = shape_name(old.colour, old.kind, "zh")
            if change == "colour":
                return f"{name}变成了{COLOURS_ZH[new.colour]}。"
            if change == "kind":
                return f"{name}变成了{shape_name(new.colour, new.kind, 'zh')}。"
            if change == "size":
                return f"{name}变{'大' if new.extent > old.extent else '小'}了。"
            before, after = (place_name(self.pair.scenes[0].place(shape), "zh") for shape in (old, new))
            return f"{name}从{before}移到了{after}。"
        if new:
            return f"{place_name(self.pair.scenes[1].place(new), 'zh')}多了{indefinite(new, 'zh')}。"
        if old:
            place = place_name(self.pair.scenes[0].place(old), "zh")
            return f"{place}的{shape_name(old.colour, old.kind, 'zh')}不见了。"
        return "两张图是一样的。"

    def same(self) -> list[Turn]:
        same = self.pair.change is not None and self.pair.change[0] == "none"
        if self.pair.change is None and self.pair.scenes[0].shapes == self.pair.scenes[1].shapes:
            same = True
        if self.language == "en":
            answer = "Yes, they are the same." if same else "No, they are different."
        else:
            answer = "是的，两张图是一样的。" if same else "不，两张图不一样。"
        return [self.turn("same", answer, "yes_no")]

    def about(self) -> list[Turn] | None:
        """A question about one of the pictures, sometimes repeated about the other."""
        index = self.rng.randrange(2)
        asked = self.scenes[index]
        makers = (
            asked.count_all,
            asked.count_some,
            asked.colour_of,
            asked.at_place,
            asked.place_of,
            asked.exists,
        )
        turns = self.rng.choice((*makers, asked.describe))()
        if not turns:
            return None
        found = [about_picture(self.rng, turns[0], index, "pair")]
        if turns[0].category == "count" and self.rng.random() < 0.4 and not turns[1:]:
            other = self.scenes[1 - index].count_all()
            if other and turns[0].answer in (count.answer for count in asked.count_all() or []):
                which = WHICH[self.language][1 - index]
                found.append(self.turn("then_other", other[0].answer, "follow_up", which=which))
        return found

    def which_more(self) -> list[Turn]:
        first, second = (len(scene.shapes) for scene in self.pair.scenes)
        if first == second:
            answer = "Both have the same number of shapes." if self.language == "en" else "两张图的图形一样多。"
        elif self.language == "en":
            answer = f"The {'first' if first > second else 'second'} picture has more shapes."
        else:
            answer = f"第{'一' if first > second else '二'}张图的图形更多。"
        return [self.turn("which_more", answer, "pair")]

    def which_has(self) -> list[Turn] | None:
        shapes = [shape for scene in self.pair.scenes for shape in scene.shapes]
        if not shapes:
            return None
        shape = self.rng.choice(shapes)
        colour, kind = self.rng.choice(((None, shape.kind), (shape.colour, shape.kind)))
        first, second = (bool(scene.count(colour, kind)) for scene in self.scenes)
        if self.language == "en":
            answer = "Both pictures." if first and second else f"The {'first' if first else 'second'} picture."
        else:
            answer = "两张图都有。" if first and second else f"第{'一' if first else '二'}张图。"
        name = shape_name(colour, kind, self.language)
        return [self.turn("which_has", answer, "pair", one=name, a_one=with_article(name))]
