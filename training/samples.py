"""Draws the sample pictures that ship with the demo model: ``python -m training.samples --output FOLDER``.

All are from seeds that training never sees.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training.world.conversation import HELD_OUT, draw

# (file, family, offset from the first held-out seed): chosen by eye, for being clear and different.
SAMPLES = (
    ("shapes.png", "scene", 5_000_002),
    ("sign.png", "text", 5_000_001),
    ("chart.png", "chart", 5_000_005),
    ("receipt.png", "receipt", 5_000_002),
    ("small-print.png", "small_text", 5_000_005),
    ("before.png+after.png", "pair", 5_000_006),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for files, family, offset in SAMPLES:
        conversation = draw(HELD_OUT + offset, family=family, language="en", stage=0.0)
        for file, picture in zip(files.split("+"), conversation.pictures, strict=True):
            picture.save(args.output / file, optimize=True)
            print(file, picture.size)
        for turn in conversation.turns:
            print(f"    {turn.question} -> {turn.answer}")


if __name__ == "__main__":
    main()
