"""Questions about the shapes of a scene, each with the one right answer."""

from __future__ import annotations

import random
from collections.abc import Callable

from training.world.phrases import question
from training.world.records import Turn
from training.world.scene import Scene, Shape
from training.world.vocabulary import (
    COLOURS,
    COLOURS_ZH,
    KIND_SYNONYMS_ZH,
    KINDS,
    KINDS_ZH,
    SIZE_ANSWERS_ZH,
    SIZES,
    counted,
    joined,
    plural,
    quoted,
    shape_name,
    with_article,
)
from training.world.wording import (
    NOTHING,
    SAME_SIZE,
    SIDES,
    absent,
    count_answer,
    description,
    indefinite,
    place_answer,
    place_in_question,
    sentence,
)

# Centres closer than this part of the picture's side are neither left nor right, above nor below.
_RELATION_GAP = 0.10


class SceneQuestions:
    """Makes turns about a scene in one language; a maker returns None where its question makes no sense."""

    def __init__(self, rng: random.Random, scene: Scene, language: str) -> None:
        self.rng, self.scene, self.language = rng, scene, language
        self.shapes = scene.shapes

    def turn(self, key: str, answer: str, category: str, **slots: str) -> Turn:
        return Turn(question(self.rng, key, self.language, **slots), answer, category, self.language)

    def name(self, colour: str | None, kind: str | None) -> str:
        """Name for use in a question, sometimes by another word."""
        name = shape_name(colour, kind, self.language)
        if self.language == "zh" and kind in KIND_SYNONYMS_ZH and self.rng.random() < 0.15:
            name = name.replace(KINDS_ZH[kind], self.rng.choice(KIND_SYNONYMS_ZH[kind]))
        if self.language == "zh" and colour and self.rng.random() < 0.15:
            name = name.replace("色的", "色", 1)
        return name

    def count(self, colour: str | None, kind: str | None) -> int:
        return sum(colour in (None, shape.colour) and kind in (None, shape.kind) for shape in self.shapes)

    def reference(self, shape: Shape, *, coloured: bool = False) -> str | None:
        """A name that fits no other shape."""
        if not coloured and self.count(None, shape.kind) == 1 and self.rng.random() < 0.5:
            return self.name(None, shape.kind)
        return self.name(shape.colour, shape.kind) if self.count(shape.colour, shape.kind) == 1 else None

    def referable(self) -> tuple[Shape, str] | None:
        shapes = [shape for shape in self.shapes if self.count(shape.colour, shape.kind) == 1]
        if not shapes:
            return None
        shape = self.rng.choice(shapes)
        name = self.reference(shape)
        return (shape, name) if name else None

    def missing(self) -> tuple[str | None, str | None]:
        """A kind, a colour or a coloured kind that is not in the scene."""
        draw = self.rng.random()
        if draw < 0.5 or not self.shapes:
            return None, self.rng.choice([kind for kind in KINDS if not self.count(None, kind)])
        if draw < 0.65:
            return self.rng.choice([colour for colour in COLOURS if not self.count(colour, None)]), None
        shape = self.rng.choice(self.shapes)
        if draw < 0.82:
            others = [colour for colour in COLOURS if not self.count(colour, shape.kind)]
            return self.rng.choice(others), shape.kind
        return shape.colour, self.rng.choice([kind for kind in KINDS if not self.count(shape.colour, kind)])

    def describe(self) -> list[Turn] | None:
        return [self.turn("describe", description(self.scene, self.language), "describe")]

    def count_all(self) -> list[Turn] | None:
        return [self.turn("count_all", count_answer(len(self.shapes), None, None, self.language), "count")]

    def count_some(self) -> list[Turn] | None:
        if not self.shapes:
            return None
        shape = self.rng.choice(self.shapes)
        colour, kind = self.rng.choice(
            ((None, shape.kind), (None, shape.kind), (shape.colour, None), (shape.colour, shape.kind))
        )
        if self.rng.random() < 0.1:
            colour, kind = self.missing()
        return [self._count_turn("count_some", colour, kind, "count")]

    def _count_turn(self, key: str, colour: str | None, kind: str | None, category: str) -> Turn:
        many = f"{colour + ' ' if colour else ''}{plural(kind or 'shape')}"
        answer = count_answer(self.count(colour, kind), colour, kind, self.language)
        return self.turn(key, answer, category, many=many, one=self.name(colour, kind))

    def colour_answer(self, shape: Shape) -> str:
        return f"It is {shape.colour}." if self.language == "en" else f"它是{COLOURS_ZH[shape.colour]}的。"

    def kind_answer(self, shape: Shape) -> str:
        return f"It is {with_article(shape.kind)}." if self.language == "en" else f"它是{KINDS_ZH[shape.kind]}。"

    def size_answer(self, shape: Shape) -> str:
        return f"It is {shape.size}." if self.language == "en" else SIZE_ANSWERS_ZH[shape.size]

    def colour_of(self) -> list[Turn] | None:
        kinds = [shape for shape in self.shapes if self.count(None, shape.kind) == 1]
        if not kinds:
            return None
        shape = self.rng.choice(kinds)
        turns = [self.turn("colour_of", self.colour_answer(shape), "colour", one=self.name(None, shape.kind))]
        others = [other for other in kinds if other is not shape]
        if others and self.rng.random() < 0.3:
            other = self.rng.choice(others)
            name = self.name(None, other.kind)
            turns.append(self.turn("then_same", self.colour_answer(other), "follow_up", one=name))
            return turns
        return turns + self.then(shape, known=("colour", "kind"), share=0.25)

    def kind_of(self) -> list[Turn] | None:
        shapes = [shape for shape in self.shapes if self.count(shape.colour, None) == 1]
        if not shapes:
            return None
        shape = self.rng.choice(shapes)
        colour = shape.colour if self.language == "en" else COLOURS_ZH[shape.colour]
        turns = [self.turn("kind_of", self.kind_answer(shape), "shape", colour=colour)]
        return turns + self.then(shape, known=("colour", "kind"), share=0.3)

    def at_place(self) -> list[Turn] | None:
        places = [self.scene.place(shape) for shape in self.shapes]
        if self.rng.random() < 0.12 or not places:
            free = [place for place in range(9) if place not in places]
            place = self.rng.choice(free)
            if self.scene.printed and self.scene.printed.place == place:
                return None
            where = place_in_question(self.rng, place, self.language)
            return [self.turn("at_place", NOTHING[self.language], "absent", place=where)]
        shape = self.rng.choice(self.shapes)
        place = self.scene.place(shape)
        if places.count(place) > 1 or (self.scene.printed and self.scene.printed.place == place):
            return None
        where = place_in_question(self.rng, place, self.language)
        if self.rng.random() < 0.25:
            turns = [self.turn("colour_at", self.colour_answer(shape), "colour", place=where)]
            return turns + self.then(shape, known=("colour", "place"), share=0.5)
        answer = sentence(indefinite(shape, self.language), self.language)
        turns = [self.turn("at_place", answer, "shape", place=where)]
        return turns + self.then(shape, known=("place",), share=0.55)

    def then(self, shape: Shape, *, known: tuple[str, ...], share: float) -> list[Turn]:
        """Up to two questions that call a shape "it"."""
        if self.rng.random() >= share:
            return []
        keys = [key for key in ("colour", "kind", "size", "place", "others") if key not in known]
        if "kind" in keys and "colour" not in known:
            keys.remove("kind")
        self.rng.shuffle(keys)
        return [self._then(key, shape) for key in keys[: self.rng.choice((1, 1, 2))]]

    def _then(self, key: str, shape: Shape) -> Turn:
        if key == "colour":
            answer = self.colour_answer(shape)
        elif key == "kind":
            answer = self.kind_answer(shape)
        elif key == "size":
            answer = self.size_answer(shape)
        elif key == "place":
            answer = place_answer(self.scene.place(shape), self.language)
        else:
            answer = self._others(shape)
        return self.turn(f"then_{key}", answer, "follow_up")

    def _others(self, shape: Shape) -> str:
        others = self.count(None, shape.kind) - 1
        if self.language == "zh":
            name = KINDS_ZH[shape.kind]
            return f"有，还有{others}个{name}。" if others else f"没有，只有这一个{name}。"
        if not others:
            return f"No, it is the only {shape.kind}."
        noun = shape.kind if others == 1 else plural(shape.kind)
        return f"Yes, there {'is' if others == 1 else 'are'} {others} more {noun}."

    def place_of(self) -> list[Turn] | None:
        found = self.referable()
        if not found:
            return None
        shape, name = found
        answer = place_answer(self.scene.place(shape), self.language)
        known = ("colour", "kind", "place")
        return [self.turn("place_of", answer, "place", one=name), *self.then(shape, known=known, share=0.2)]

    def size_of(self) -> list[Turn] | None:
        found = self.referable()
        if not found:
            return None
        shape, name = found
        turns = [self.turn("size_of", self.size_answer(shape), "size", one=name)]
        return turns + self.then(shape, known=("colour", "kind", "size"), share=0.2)

    def more(self) -> list[Turn] | None:
        kinds = sorted({shape.kind for shape in self.shapes})
        if not kinds:
            return None
        first = self.rng.choice(kinds)
        second = self.rng.choice([kind for kind in (kinds if len(kinds) > 1 else KINDS) if kind != first])
        if self.rng.random() < 0.5:
            first, second = second, first
        counts = self.count(None, first), self.count(None, second)
        if self.language == "en":
            start = "Yes" if counts[0] > counts[1] else "No"
            there = "is" if counts[0] == 1 else "are"
            parts = [counted(counts[0], None, first, "en"), counted(counts[1], None, second, "en")]
            answer = f"{start}, there {there} {parts[0]} and {parts[1]}."
        else:
            start = "是的" if counts[0] > counts[1] else "不是"
            parts = [counted(counts[0], None, first, "zh"), counted(counts[1], None, second, "zh")]
            answer = f"{start}，有{parts[0]}和{parts[1]}。"
        names = self.name(None, first), self.name(None, second)
        slots = {"many": plural(first), "many2": plural(second), "one": names[0], "one2": names[1]}
        return [self.turn("more", answer, "compare", **slots)]

    def larger(self) -> list[Turn] | None:
        if len(self.shapes) < 2:
            return None
        first, second = self.rng.sample(self.shapes, 2)
        names = self.reference(first, coloured=True), self.reference(second, coloured=True)
        if not names[0] or not names[1]:
            return None
        order = SIZES.index(first.size) - SIZES.index(second.size)
        answer = self._definite(first if order > 0 else second, "larger") if order else SAME_SIZE[self.language]
        return [self.turn("larger", answer, "compare", one=names[0], one2=names[1])]

    def _definite(self, shape: Shape, what: str) -> str:
        name = shape_name(shape.colour, shape.kind, self.language)
        if self.language == "en":
            return f"The {name} is {what}."
        return f"{name}{ {'larger': '更大', 'the largest': '最大', 'the smallest': '最小'}[what] }。"

    def extreme(self) -> list[Turn] | None:
        if len(self.shapes) < 2:
            return None
        key = self.rng.choice(("largest", "smallest"))
        ordered = sorted(self.shapes, key=lambda shape: shape.extent, reverse=key == "largest")
        first, second = ordered[:2]
        if first.size == second.size:
            return None
        return [self.turn(key, self._definite(first, f"the {key}"), "compare")]

    def _gap(self, shape: Shape, other: Shape, side: int) -> float:
        """How far the other lies on a side of the shape, in sides of the picture."""
        across = (other.x - shape.x) / self.scene.width
        down = (other.y - shape.y) / self.scene.height
        return (-across, across, -down, down)[side]

    def beside(self) -> list[Turn] | None:
        found = self.referable()
        side = self.rng.randrange(4)
        if not found or len(self.shapes) < 2:
            return None
        shape, name = found
        gaps = [(other, self._gap(shape, other, side)) for other in self.shapes if other is not shape]
        there = [indefinite(other, self.language) for other, gap in gaps if gap > 0]
        if any(abs(gap) < _RELATION_GAP for _, gap in gaps) or len(there) > 3 or len(set(there)) < len(there):
            return None
        answer = sentence(joined(there, self.language), self.language) if there else NOTHING[self.language]
        where = self.rng.choice(SIDES[self.language][side][:2])
        where = "above" if where == "higher than" else where
        return [self.turn("beside", answer, "relation", one=name, side=where)]

    def is_beside(self) -> list[Turn] | None:
        if len(self.shapes) < 2:
            return None
        first, second = self.rng.sample(self.shapes, 2)
        names = self.reference(first), self.reference(second)
        side = self.rng.randrange(4)
        gap = self._gap(second, first, side)
        if not names[0] or not names[1] or abs(gap) < _RELATION_GAP:
            return None
        where = self.rng.choice(SIDES[self.language][side])
        true_side = side if gap > 0 else side ^ 1
        name = [shape_name(shape.colour, shape.kind, self.language) for shape in (first, second)]
        said = SIDES[self.language][true_side][0]
        if self.language == "en":
            answer = f"{'Yes' if gap > 0 else 'No'}, the {name[0]} is {said} the {name[1]}."
        else:
            answer = f"{'是的' if gap > 0 else '不是'}，{name[0]}在{name[1]}的{said}。"
        return [self.turn("is_beside", answer, "relation", one=names[0], one2=names[1], side=where)]

    def exists(self) -> list[Turn] | None:
        present = bool(self.shapes) and self.rng.random() < 0.5
        if not present:
            colour, kind = self.missing()
        else:
            shape = self.rng.choice(self.shapes)
            colour, kind = self.rng.choice(((None, shape.kind), (shape.colour, shape.kind), (shape.colour, None)))
        name = shape_name(colour, kind, self.language)
        if self.language == "en":
            answer = f"Yes, there is {with_article(name)}." if present else f"No, there is no {name}."
        else:
            answer = f"有，图中有{name}。" if present else f"没有，图中没有{name}。"
        asked = self.name(colour, kind)
        turns = [self.turn("exists", answer, "yes_no", one=asked, a_one=with_article(asked))]
        if present and self.count(colour, kind) == 1:
            known = tuple(key for key, value in (("colour", colour), ("kind", kind)) if value)
            turns += self.then(shape, known=known, share=0.3)
        return turns

    def is_colour(self) -> list[Turn] | None:
        kinds = [shape for shape in self.shapes if self.count(None, shape.kind) == 1]
        if not kinds:
            return None
        shape = self.rng.choice(kinds)
        true = self.rng.random() < 0.5
        colour = shape.colour if true else self.rng.choice([one for one in COLOURS if one != shape.colour])
        if self.language == "en":
            answer, said = f"{'Yes' if true else 'No'}, it is {shape.colour}.", colour
        else:
            answer = f"{'是的' if true else '不是'}，它是{COLOURS_ZH[shape.colour]}的。"
            said = COLOURS_ZH[colour]
        return [self.turn("is_colour", answer, "yes_no", one=self.name(None, shape.kind), colour=said)]

    def not_there(self) -> list[Turn] | None:
        """A question that takes for granted what is not in the picture."""
        colour, kind = self.missing()
        key = self.rng.choice(("colour_of", "place_of", "size_of") if not colour else ("place_of", "size_of"))
        return [self.turn(key, absent(colour, kind, self.language), "absent", one=self.name(colour, kind))]

    def count_then(self) -> list[Turn] | None:
        kinds = sorted({shape.kind for shape in self.shapes})
        if len(kinds) < 2:
            return None
        first, second = self.rng.sample(kinds, 2)
        return [
            self._count_turn("count_some", None, first, "count"),
            self._count_turn("then_count", None, second, "follow_up"),
        ]

    def ground(self) -> list[Turn] | None:
        name = self.scene.ground.name
        if not name:
            return None
        answer = f"The background is {name}." if self.language == "en" else f"背景是{COLOURS_ZH[name]}的。"
        return [self.turn("ground", answer, "colour")]

    def text(self) -> list[Turn] | None:
        """The printed word of the scene, or that there is none."""
        printed, english = self.scene.printed, self.language == "en"
        if self.rng.random() < 0.3:
            if printed:
                answer = "Yes, there is text." if english else "有，图中有文字。"
            else:
                answer = "No, there is no text." if english else "没有，图中没有文字。"
            return [self.turn("any_text", answer, "yes_no")]
        if not printed:
            answer = "There is no text in this picture." if english else "图中没有文字。"
            return [self.turn("read", answer, "absent")]
        said = quoted(printed.text, self.language)
        answer = f"The text reads {said}." if english else f"文字是{said}。"
        return [self.turn("read", answer, "text")]

    def makers(self) -> list[tuple[Callable[[], list[Turn] | None], float]]:
        """Every maker with its weight."""
        return [
            (self.describe, 1.6),
            (self.count_all, 1.0),
            (self.count_some, 1.4),
            (self.colour_of, 1.2),
            (self.kind_of, 1.1),
            (self.at_place, 2.0),
            (self.place_of, 1.4),
            (self.size_of, 1.2),
            (self.more, 0.9),
            (self.larger, 0.9),
            (self.extreme, 0.4),
            (self.beside, 1.2),
            (self.is_beside, 1.0),
            (self.exists, 1.2),
            (self.is_colour, 0.6),
            (self.not_there, 0.9),
            (self.count_then, 0.5),
            (self.ground, 0.4),
            (self.text, 2.0 if self.scene.printed else 0.35),
        ]
