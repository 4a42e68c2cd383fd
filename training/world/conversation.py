"""The generator: a seed becomes pictures, marks and turns, always the same ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from PIL import Image

from training.world import canvas
from training.world.chart import ChartQuestions, make_chart
from training.world.chat import small_talk
from training.world.pair import PairQuestions, make_pair
from training.world.receipt import ReceiptQuestions, receipt_picture
from training.world.records import CHARSET, NUM_LABELS, Conversation, Mark, Turn
from training.world.scene import make_scene, render
from training.world.scene_questions import SceneQuestions
from training.world.sign import SMALLEST_CAP, SignQuestions, make_sign
from training.world.tiny import Tiny, TinyQuestions, make_fine, make_tiny
from training.world.vocabulary import LANGUAGES

__all__ = [
    "CHARSET",
    "FAMILIES",
    "HELD_OUT",
    "NUM_LABELS",
    "Conversation",
    "Mark",
    "Turn",
    "draw",
    "families_at",
    "weights",
]

FAMILIES = ("scene", "text", "chart", "receipt", "small_text", "fine_print", "pair", "chat")
HELD_OUT = 10**9
"""Seeds from here on are for evaluation and never for training."""

Makers = Sequence[tuple[Callable[[], list[Turn] | None], float]]
Pictures = tuple[list[Image.Image], list[list[Mark]], Callable[[str], Makers]]


_SHARES = {
    "scene": (0.42, 0.28),
    "text": (0.30, 0.18),
    "chart": (0.13, 0.09),
    "receipt": (0.12, 0.09),
    "small_text": (0.0, 0.14),
    "fine_print": (0.0, 0.04),
    "pair": (0.0, 0.15),
    "chat": (0.03, 0.03),
}


def weights(stage: float) -> dict[str, float]:
    """Shares of the families in training: stage 0 has pictures without slices only, stage 1 everything."""
    return {family: first + (last - first) * stage for family, (first, last) in _SHARES.items()}


def families_at(stage: float, seed: int) -> str:
    """The family that a seed gets at a stage of training (0 to 1)."""
    shares = weights(stage)
    # Not the stream of `draw`, which would tie a picture's size to its family.
    return random.Random(~seed).choices(list(shares), list(shares.values()))[0]


def draw(
    seed: int,
    *,
    family: str | None = None,
    max_turns: int = 8,
    stage: float = 1.0,
    language: str | None = None,
) -> Conversation:
    """Draw one conversation.

    Args:
        seed: decides everything.
        family: one of `FAMILIES`; at random by `weights` of the stage if None.
        max_turns: most turns, at least 1; a follow-up stays with its question.
        stage: 0 for pictures that are never sliced (except in `small_text`), 1 for a fifth that are.
        language: "en" or "zh" for every turn; at random if None.
    """
    rng = random.Random(seed)
    family = family or families_at(stage, seed)
    pictures, marks, makers = _FAMILIES[family](rng, stage)
    if rng.random() < 0.1:
        pictures = [canvas.compressed(rng, picture) for picture in pictures]
    mixed = language is None and rng.random() < 0.1
    language = language or rng.choice(LANGUAGES)
    by_language = {one: makers(one) for one in (LANGUAGES if mixed else (language,))}
    turns: list[Turn] = []
    answers: list[str] = []
    for _ in range(5 * max_turns):
        chosen = by_language[rng.choice(LANGUAGES) if mixed else language]
        maker = rng.choices([maker for maker, _ in chosen], [weight for _, weight in chosen])[0]
        unit = maker()
        # The same answer twice is enough: other questions teach more.
        if unit is None or len(turns) + len(unit) > max_turns or answers.count(unit[0].answer) > 1:
            continue
        answers += [turn.answer for turn in unit]
        turns += unit
        if len(turns) == max_turns:
            break
    return Conversation(pictures, marks, turns or small_talk(rng, language, picture=bool(pictures)))


def _size(rng: random.Random, stage: float, shortest: int = 120) -> tuple[int, int]:
    if rng.random() < 0.2 * stage:
        return canvas.sliced_canvas_size(rng)
    return canvas.canvas_size(rng, shortest)


def _scene(rng: random.Random, stage: float) -> Pictures:
    scene = make_scene(rng, _size(rng, stage))
    picture, marks = render(scene)

    def makers(language: str) -> Makers:
        return [
            *SceneQuestions(rng, scene, language).makers(),
            (lambda: small_talk(rng, language, picture=True), 0.3),
        ]

    return [picture], [marks], makers


def _text(rng: random.Random, stage: float) -> Pictures:
    smallest_cap = 11.0 if rng.random() < 0.2 * stage else SMALLEST_CAP
    sign, picture, marks = make_sign(rng, _size(rng, stage, 200), smallest_cap)

    def makers(language: str) -> Makers:
        asked = SignQuestions(rng, sign, language)
        several = len(sign.lines) > 1
        return [
            (asked.read, 3.0),
            (asked.line, 4.0 if several else 0.0),
            (asked.number, 2.0),
            (asked.any_text, 0.4),
            (asked.colour, 0.6),
            (asked.count, 0.5),
            (asked.describe, 0.7),
            (asked.no_shapes, 0.25),
            (lambda: small_talk(rng, language, picture=True), 0.2),
        ]

    return [picture], [marks], makers


def _chart(rng: random.Random, stage: float) -> Pictures:
    large = rng.random() < 0.2 * stage
    chart, picture, marks = make_chart(rng, rng.choice(((640, 480), (800, 600), (512, 512))) if large else None)

    def makers(language: str) -> Makers:
        asked = ChartQuestions(rng, chart, language)
        return [
            (asked.value, 3.0),
            (asked.extreme, 2.0),
            (asked.count, 0.8),
            (asked.colour, 1.0),
            (asked.title, 1.0),
            (asked.describe, 1.0),
            (lambda: small_talk(rng, language, picture=True), 0.2),
        ]

    return [picture], [marks], makers


def _receipt(rng: random.Random, stage: float) -> Pictures:
    large = rng.random() < 0.2 * stage
    size = rng.choice(((400, 600), (480, 640), (600, 800))) if large else None
    receipt, picture, marks = receipt_picture(rng, size)

    def makers(language: str) -> Makers:
        asked = ReceiptQuestions(rng, receipt, language)
        return [
            (asked.total, 1.5),
            (asked.price, 3.0),
            (asked.shop, 1.5),
            (asked.count, 0.8),
            (asked.extreme, 1.5),
            (asked.describe, 1.0),
            (lambda: small_talk(rng, language, picture=True), 0.2),
        ]

    return [picture], [marks], makers


def _small_text(rng: random.Random, stage: float) -> Pictures:
    return _printed(rng, *make_tiny(rng))


def _fine_print(rng: random.Random, stage: float) -> Pictures:
    return _printed(rng, *make_fine(rng))


def _printed(rng: random.Random, tiny: Tiny, picture: Image.Image, marks: list[Mark]) -> Pictures:
    def makers(language: str) -> Makers:
        if tiny.receipt:
            printed = ReceiptQuestions(rng, tiny.receipt, language, tiny.category)
            found: Makers = [(printed.total, 1.5), (printed.price, 3.0), (printed.shop, 1.5)]
        else:
            asked = TinyQuestions(rng, tiny, language)
            found = [(asked.read, 3.0), (asked.at_place, 4.0), (asked.by_shape, 4.0), (asked.number, 2.0)]
        scene = SceneQuestions(rng, tiny.scene, language)
        known = (scene.count_all, scene.count_some, scene.colour_of, scene.place_of, scene.kind_of)
        return [*found, *((maker, 0.4) for maker in known)]

    return [picture], [marks], makers


def _pair(rng: random.Random, stage: float) -> Pictures:
    pair = make_pair(rng, canvas.canvas_size(rng), canvas.canvas_size(rng))
    first, first_marks = render(pair.scenes[0])
    second, second_marks = render(pair.scenes[1])

    def makers(language: str) -> Makers:
        asked = PairQuestions(rng, pair, language)
        return [
            (asked.difference, 3.0),
            (asked.same, 0.7),
            (asked.about, 4.0),
            (asked.which_more, 1.0),
            (asked.which_has, 1.0),
        ]

    return [first, second], [first_marks, second_marks], makers


def _chat(rng: random.Random, stage: float) -> Pictures:
    return [], [], lambda language: [(lambda: small_talk(rng, language, picture=False), 1.0)]


_FAMILIES: dict[str, Callable[[random.Random, float], Pictures]] = {
    "scene": _scene,
    "text": _text,
    "chart": _chart,
    "receipt": _receipt,
    "small_text": _small_text,
    "fine_print": _fine_print,
    "pair": _pair,
    "chat": _chat,
}
