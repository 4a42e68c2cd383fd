"""The choice among the wordings of a question."""

from __future__ import annotations

import random

from training.world.other_phrases import OTHER_PHRASES
from training.world.records import Turn
from training.world.scene_phrases import SCENE_PHRASES, Phrases

PHRASES: Phrases = {**SCENE_PHRASES, **OTHER_PHRASES}

_IN_PICTURE = {
    "en": (
        "In the {which} picture: ",
        "In the {which} image, ",
        "Look at the {which} picture. ",
        "{Which} picture: ",
    ),
    "zh": ("在{which}中，", "看{which}：", "{which}里，", "关于{which}，"),
}
WHICH = {"en": ("first", "second"), "zh": ("第一张图", "第二张图")}


def question(rng: random.Random, key: str, language: str, **slots: str) -> str:
    """One wording of a question, now and then typed carelessly."""
    text = rng.choice(PHRASES[key][language]).format(**slots)
    careless = rng.random()
    if careless < 0.06:
        text = text.rstrip(".?。？")
    elif careless < 0.10 and language == "en" and not slots.get("name"):
        text = text[0].lower() + text[1:]
    elif careless < 0.13 and language == "zh":
        text = text.replace("？", "?").replace("。", ".")
    return text


def about_picture(rng: random.Random, turn: Turn, picture: int, category: str) -> Turn:
    """The turn, asked about the first (0) or second (1) of two pictures."""
    which = WHICH[turn.language][picture]
    prefix = rng.choice(_IN_PICTURE[turn.language]).format(which=which, Which=which.capitalize())
    text = turn.question
    if turn.language == "en" and prefix.endswith(", "):
        text = text[0].lower() + text[1:]
    return Turn(prefix + text, turn.answer, category, turn.language)
