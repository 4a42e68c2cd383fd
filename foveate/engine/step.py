"""What the scheduler plans for a step, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.engine.messages import FinishReason
from foveate.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """One sequence's part in a step: its tokens ``[start, start + num_tokens)``, of which the last may be pending.

    Attributes:
        samples: whether the newest token is among them, so that the step chooses the next one.
        filled: blocks that this part fills to the end, drafts aside.
        drafts: guesses of the tokens behind the newest one, which are the last of them; the step chooses a token behind
            each. Only in a step where every sequence has its newest token and nothing else but drafts.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    filled: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()

    @property
    def num_choices(self) -> int:
        """Tokens that the step chooses here."""
        return self.samples + len(self.drafts)


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

    @property
    def has_drafts(self) -> bool:
        """Whether anybody's tokens were guessed."""
        return any(item.drafts for item in self.items)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token that a step chose for one sequence.

    With the ``finish_reason`` ``"stop"``, ``token_id`` ended the answer and is no part of it.
    """

    seq: Sequence
    token_id: int
    finish_reason: FinishReason | None


@dataclass(slots=True)
class Counts:
    """What has come of all steps so far, for :class:`foveate.engine.messages.Stats`.

    Prompt and cached tokens count once a sequence, when it is first admitted.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
