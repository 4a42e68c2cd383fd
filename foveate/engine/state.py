"""What the runner keeps for a sequence from its admission to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from foveate.engine.messages import FirstTokenTimes
from foveate.engine.sequence import Sequence


@dataclass(slots=True)
class SequenceState:
    """Everything about a sequence that only the runner knows.

    Attributes:
        seed: makes its random choices reproducible.
        embeddings: rows of all its pictures in order, [rows, hidden_size], or None.
        image_positions: the prompt position of each of those rows, ascending.
        arrived: when it was queued (seconds, monotonic), like all times.
        read_seconds: how long reading its embeddings took.
        admitted: when its first step began, or None before that.
        told: whether its times have been taken.
    """

    seed: int
    embeddings: Tensor | None = None
    image_positions: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    arrived: float = 0.0
    read_seconds: float = 0.0
    admitted: float | None = None
    told: bool = False

    def mark_admitted(self, now: float) -> None:
        """Note the beginning of its first step."""
        if self.admitted is None:
            self.admitted = now

    def take_times(self, now: float) -> FirstTokenTimes | None:
        """Return how long it took to the first token, once."""
        if self.told or self.admitted is None:
            return None
        self.told = True
        return FirstTokenTimes(self.read_seconds, self.admitted - self.arrived, now - self.admitted)


def state_of(seq: Sequence) -> SequenceState:
    """Return the state that the runner keeps with a sequence."""
    assert isinstance(seq.payload, SequenceState)
    return seq.payload
