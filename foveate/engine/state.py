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
        embeddings: rows of all its pictures in order, [rows, hidden_size], or None. Those of a picture that is missing
            are written when it comes.
        image_positions: the prompt position of each of those rows, ascending.
        arrived: when it was queued (seconds, monotonic), like all times.
        read_seconds: how long reading its embeddings took.
        admitted: when its first step began, or None before that.
        stalled: since when it has waited for a picture, or None while it does not.
        stalled_seconds: how long it waited for pictures since it was admitted.
        told: whether its times have been taken.
    """

    seed: int
    embeddings: Tensor | None = None
    image_positions: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    arrived: float = 0.0
    read_seconds: float = 0.0
    admitted: float | None = None
    stalled: float | None = None
    stalled_seconds: float = 0.0
    told: bool = False

    def mark_admitted(self, now: float) -> None:
        """Note the beginning of its first step."""
        if self.admitted is None:
            self.admitted = now

    def go_on(self, now: float) -> None:
        """Note that it need not wait for a picture any more."""
        if self.stalled is not None:
            self.stalled_seconds += now - self.stalled
            self.stalled = None

    def take_times(self, now: float) -> FirstTokenTimes | None:
        """Return how long it took to the first token, once."""
        if self.told or self.admitted is None:
            return None
        self.told = True
        wait = self.admitted - self.arrived + self.stalled_seconds
        return FirstTokenTimes(self.read_seconds, wait, now - self.arrived - wait)


def state_of(seq: Sequence) -> SequenceState:
    """Return the state that the runner keeps with a sequence."""
    assert isinstance(seq.payload, SequenceState)
    return seq.payload
