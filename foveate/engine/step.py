"""What the scheduler plans for a step, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.engine.messages import FinishReason
from foveate.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """One sequence's part in a step: its tokens ``[start, start + num_tokens)``, of which the last may be pending.

    Attributes:
        samples: whether the last of them is the newest token, so that the step chooses the next one.
        filled: blocks that this part fills to the end.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    filled: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledBatch:
    """What one step runs."""

    items: tuple[ScheduledSeq, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs."""
        return sum(item.num_tokens for item in self.items)

    @property
    def sampling(self) -> list[ScheduledSeq]:
        """The items whose next token the step chooses, in order."""
        return [item for item in self.items if item.samples]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a step chose for one sequence.

    With the ``finish_reason`` ``"stop"``, ``token_id`` ended the answer and is no part of it.
    """

    seq: Sequence
    token_id: int
    finish_reason: FinishReason | None
