"""Batches that are learned from more than once: drawing them takes longer than learning from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from training.attention import moved

CAPACITY = 512
"""Batches that are kept; of 16 conversations each, they take about 10 GB."""


class Replay:
    """Hands out batches on the device: new ones, and for each of them ``repeat`` - 1 earlier ones."""

    def __init__(self, batches: Iterator[dict[str, Any]], device: torch.device, repeat: float) -> None:
        self._batches, self._device, self._repeat = batches, device, repeat
        self._kept: list[dict[str, Any]] = []
        self._owed = 0.0
        self._random = random.Random(0)

    def take(self, count: int) -> list[dict[str, Any]]:
        """Return ``count`` batches, no two of them the same."""
        self._owed += count / self._repeat
        fresh = min(count, max(int(self._owed), count - len(self._kept)))
        self._owed -= fresh
        taken = self._random.sample(self._kept, count - fresh)
        for _ in range(fresh):
            batch = next(self._batches)
            batch = {name: moved(value, self._device) if isinstance(value, Tensor) else value
                     for name, value in batch.items()}  # fmt: skip
            taken.append(batch)
            if self._repeat > 1:
                self._keep(batch)
        return taken

    def _keep(self, batch: dict[str, Any]) -> None:
        if len(self._kept) < CAPACITY:
            self._kept.append(batch)
        else:
            self._kept[self._random.randrange(CAPACITY)] = batch
