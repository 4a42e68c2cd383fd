"""What the runner keeps for a sequence, on the device, from its admission to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(slots=True)
class SequenceState:
    """Everything about a sequence that is a tensor.

    Attributes:
        seed: makes its random choices reproducible.
        embeddings: rows of all its pictures in order, [rows, hidden_size], or None.
        image_positions: the prompt position of each of those rows, ascending.
        counts: how often each token was generated, [vocab_size]; only where a penalty needs it.
        bias: (token ids, values to add to their logits), where the request has any.
        ends: ids that may not be chosen before ``min_tokens``, where the request has a minimum.
    """

    seed: int
    embeddings: Tensor | None = None
    image_positions: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    counts: Tensor | None = None
    bias: tuple[Tensor, Tensor] | None = None
    ends: Tensor | None = None
