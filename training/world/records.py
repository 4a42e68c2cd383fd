"""What the generator hands over: pictures, marks on them, and turns about them."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from training.world.vocabulary import COLOURS, KINDS

Box = tuple[float, float, float, float]

CHARSET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:/-$%&#!?+'"
SHAPE_LABELS_START = 1 + len(CHARSET)
NUM_LABELS = SHAPE_LABELS_START + len(KINDS) * len(COLOURS)


@dataclass(frozen=True)
class Turn:
    """One question with the only answer that counts as right."""

    question: str
    answer: str
    category: str
    language: str


@dataclass(frozen=True)
class Mark:
    """Where something is: (left, top, right, bottom) in pixels of the source picture, and what it is."""

    box: Box
    label: int


@dataclass(frozen=True)
class Conversation:
    """Turns about pictures, all of which belong to the first question; one list of marks a picture."""

    pictures: list[Image.Image]
    marks: list[list[Mark]]
    turns: list[Turn]


def character_label(character: str) -> int:
    """Label of a printed character of `CHARSET`; 0 is the background."""
    return 1 + CHARSET.index(character)


def shape_label(kind: str, colour: str) -> int:
    """Label of a shape."""
    return SHAPE_LABELS_START + KINDS.index(kind) * len(COLOURS) + COLOURS.index(colour)
