"""What ships for other supervisors, read as far as the tests need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from serving import ROOT

DEPLOY = ROOT / "deploy"


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile: its word and the rest, with continued lines joined."""

    word: str
    rest: str


def dockerfile() -> list[Instruction]:
    """Take the Dockerfile apart."""
    return list(_instructions((DEPLOY / "Dockerfile").read_text()))


def _instructions(text: str) -> Iterator[Instruction]:
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n", " ", code).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield Instruction(word, rest.strip())
