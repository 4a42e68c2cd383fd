"""Draws the loss curve of recorded runs: ``python -m training.curve training/record/*.jsonl --output FILE``.

Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

SHOWN = ("shape", "count", "text", "chart", "receipt", "small_text", "difference", "follow_up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+", help="log.jsonl of each run, in order")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    entries = []
    minutes = 0.0
    ends = []
    for log in args.logs:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        entries += [line | {"minutes": minutes + line["seconds"] / 60} for line in lines]
        minutes = entries[-1]["minutes"]
        ends.append(minutes)
    figure, (losses, exact) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    times = [entry["minutes"] for entry in entries]
    for name in ("answer", "reading"):
        losses.plot(times, [entry[name] for entry in entries], label=f"{name} loss")
    losses.set(yscale="log", xlabel="minutes on one H100", title="Cross-entropy")
    for category in SHOWN:
        points = [
            (entry["minutes"], sum(found) / len(found))
            for entry in entries
            if (found := [entry["exact"][key] for key in entry["exact"] if key.startswith(f"{category}/")])
        ]
        exact.plot(*zip(*points, strict=True), label=category.replace("_", " "))
    exact.set(xlabel="minutes on one H100", ylim=(0, 1), title="Answered exactly, on the pictures of each step")
    for axis in (losses, exact):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        for end in ends[:-1]:
            axis.axvline(end, color="gray", linestyle=":")
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
