"""What a training run writes down: one line of JSON for every so many steps."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path

from torch import Tensor


class Log:
    """Collects what steps say, and writes a line of it now and then."""

    def __init__(self, path: Path, every: int) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._every = every
        self._steps: list[tuple[dict[str, Tensor], list[str], Tensor]] = []
        self._since = time.time()
        self._seen = 0
        self._waited = 0.0

    def add(self, parts: dict[str, Tensor], categories: list[str], exact: Tensor, seen: int, waited: float) -> bool:
        """Take in a step; say whether a line is due."""
        self._steps.append((parts, categories, exact))
        self._seen += seen
        self._waited += waited
        return len(self._steps) == self._every

    def write(self, **entry: float) -> None:
        """Write means of the losses, the share of turns answered exactly, and the speed since the last line."""
        right: dict[str, list[float]] = defaultdict(list)
        for _, categories, exact in self._steps:
            for category, flag in zip(categories, exact.tolist(), strict=True):
                right[category].append(flag)
        seconds = time.time() - self._since
        means = {
            name: sum(float(parts[name]) for parts, _, _ in self._steps) / self._every for name in self._steps[0][0]
        }
        line = {
            **entry,
            "conversations_per_second": round(self._seen / seconds, 1),
            "waiting_for_data": round(self._waited / seconds, 2),
            **{name: round(mean, 4) for name, mean in means.items()},
            "exact": {name: round(sum(flags) / len(flags), 3) for name, flags in sorted(right.items())},
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        print(json.dumps(line), flush=True)
        self._steps.clear()
        self._since, self._seen, self._waited = time.time(), 0, 0.0
