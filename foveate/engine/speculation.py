"""Prompt lookup: guesses an answer's next tokens from what followed its last ones where they stood before.

The guesses, *drafts*, run in the same step as the newest token, and each position chooses its own token as if it were
alone. As long as what was chosen is what was guessed, the next position's choice is good as well. So a step brings as
many tokens as guesses were right, and one more; and since a choice depends on nothing but the tokens before it, the
sequence's parameters and its seed, the answer is the same with and without drafts, drawn or greedy (as far as products
of several rows are rounded as those of one). Saxena, "Prompt Lookup Decoding", 2023.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from foveate.config import MOST_VERIFIED_ROWS, EngineSettings
from foveate.engine.blocks import BlockAllocator
from foveate.engine.sequence import Sequence
from foveate.engine.step import ScheduledBatch, ScheduledSeq

SHORTEST_MATCH, LONGEST_MATCH = 2, 8
"""Tokens at the end that must have stood somewhere before, and how many are compared to find the best place."""

_CANDIDATES = 64  # Places that are compared: the newest ones. Text of one and the same token has thousands.
_MOST_MISSES = 6
_PICTURE = -1  # Stands for a position that holds a row of a picture: its token id means nothing.


class PromptLookup:
    """Guesses for one sequence.

    A search compares the last two tokens with all pairs before them, which takes some 30 µs for 30,000 tokens: that
    is less than an index of them would take to build for most answers.

    Args:
        seq: whose tokens are guessed.
        most: guesses at a time.
    """

    def __init__(self, seq: Sequence, most: int) -> None:
        self._seq, self._most = seq, most
        self._tokens = np.zeros(max(seq.max_len, seq.num_tokens), np.int32)
        self._num_read = 0
        self._found: list[int] = []
        self._misses = self._resumes_at = 0

    def propose(self) -> list[int]:
        """Guess what follows the known tokens: at most ``most`` ids, perhaps none."""
        if self._num_read != self._seq.num_tokens:
            self._read()
            self._found = self._search(self._tokens[: self._num_read])
        return self._found if self._num_read >= self._resumes_at else []

    def note(self, num_accepted: int) -> None:
        """Learn how many guesses of a step were right, once the sequence has its tokens.

        Each step in vain doubles the number of tokens for which nothing is guessed then, up to 64; each right guess
        takes one step back.
        """
        self._misses = max(self._misses - num_accepted, 0) if num_accepted else min(self._misses + 1, _MOST_MISSES)
        if not num_accepted:
            self._resumes_at = self._seq.num_tokens + 2**self._misses - 1

    def _read(self) -> None:
        """Take in the tokens that are new."""
        first, last = self._num_read, self._seq.num_tokens
        self._tokens[first:last] = self._seq.token_ids[first:last]
        self._num_read = last
        if first == 0:
            for image in self._seq.images:
                for start, length in image.ranges:
                    self._tokens[start : start + length] = _PICTURE

    def _search(self, known: npt.NDArray[np.int32]) -> list[int]:
        """Return what followed the longest match of the last tokens, the newest among equals."""
        if len(known) <= SHORTEST_MATCH or known[-SHORTEST_MATCH:].min() == _PICTURE:
            return []
        # Where a match ends: anywhere before the last token.
        ends = np.flatnonzero((known[1:-1] == known[-1]) & (known[:-2] == known[-2]))[-_CANDIDATES:] + 1
        if not len(ends):
            return []
        for length in range(SHORTEST_MATCH + 1, LONGEST_MATCH + 1):
            longer = ends[ends >= length - 1]
            longer = longer[known[longer - length + 1] == known[-length]]
            if not len(longer):
                break
            ends = longer
        # What ends with the text goes on as it has begun: a match close to the end is a loop.
        guessed = np.resize(known[ends[-1] + 1 :], self._most).tolist()
        return guessed[: guessed.index(_PICTURE)] if _PICTURE in guessed else guessed


class Speculation:
    """Guesses for all sequences of one scheduler; none if the settings do not want any.

    Args:
        settings: limits.
        allocator: the KV blocks.

    Attributes:
        num_drafts: guesses that were verified.
        num_accepted: those among them that were right.
    """

    def __init__(self, settings: EngineSettings, allocator: BlockAllocator) -> None:
        self.num_drafts = self.num_accepted = 0
        self._allocator = allocator
        self._most, self._most_rows = most_drafts(settings), settings.verified_rows()
        self._lookups: dict[Sequence, PromptLookup] = {}

    def awaits(self, batches: Iterable[ScheduledBatch], running: Listing[Sequence]) -> bool:
        """Say whether the next step had better wait for these open ones: guesses need to know what they choose."""
        if any(batch.has_drafts for batch in batches):
            return True
        return can_draft(running) and bool(self._guess({seq: seq.num_placed for seq in running}))

    def with_drafts(self, items: list[ScheduledSeq]) -> list[ScheduledSeq]:
        """Put guesses behind the newest tokens of a step in which all sequences decode and know theirs."""
        guesses = self._guess({item.seq: item.seq.num_tokens for item in items})
        return [self._extend(item, guesses[item.seq]) if item.seq in guesses else item for item in items]

    def note(self, item: ScheduledSeq, num_accepted: int) -> None:
        """Learn how many of an item's drafts were right, and take the others' blocks back."""
        if item.drafts:
            self.num_drafts += len(item.drafts)
            self.num_accepted += num_accepted
            self._allocator.shrink(item.seq.block_table, item.seq.num_tokens)
            if item.seq in self._lookups:  # It has not ended.
                self._lookups[item.seq].note(num_accepted)

    def forget(self, seq: Sequence) -> None:
        """Drop what is kept for a sequence that has ended."""
        self._lookups.pop(seq, None)

    def _extend(self, item: ScheduledSeq, guessed: list[int]) -> ScheduledSeq:
        """Add as many guesses as there are blocks for.

        Nobody misses these blocks: before another step is scheduled, they hold tokens of the answer or are free again.
        """
        allocator, table, num_tokens = self._allocator, item.seq.block_table, item.seq.num_tokens
        guessed = guessed[: (len(table) + allocator.num_free) * allocator.block_size - num_tokens]
        allocator.extend(table, num_tokens + len(guessed))
        return replace(item, num_tokens=1 + len(guessed), drafts=tuple(guessed)) if guessed else item

    def _guess(self, lengths: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """Guess for the sequences of a step, with so many tokens each; who has no guesses is left out.

        A guess is never a sequence's last token, which no step runs. No guess leads beyond a sequence's minimum of
        tokens, so that it may choose an end either at all positions of a step or at none.
        """
        found: dict[Sequence, list[int]] = {}
        for seq, length in lengths.items() if self._most_rows else ():
            most = seq.max_len - length - 1
            missing = seq.num_prompt_tokens + seq.sampling.min_tokens - length
            if missing > 0:
                most = min(most, missing - 1)
            if most > 0 and (guessed := self._lookup(seq).propose()):
                found[seq] = guessed[:most]
        share = (self._most_rows - len(lengths)) // max(len(found), 1)
        return {seq: guessed[:share] for seq, guessed in found.items()} if share > 0 else {}

    def _lookup(self, seq: Sequence) -> PromptLookup:
        if seq not in self._lookups:
            self._lookups[seq] = PromptLookup(seq, self._most)
        return self._lookups[seq]


def can_draft(running: Iterable[Sequence]) -> bool:
    """Say whether a step of these sequences may have drafts: none of them is in its prompt."""
    return all(seq.is_decoding for seq in running)


def most_drafts(settings: EngineSettings) -> int:
    """Return how many guesses a sequence can have in a step."""
    return min(settings.speculative_tokens, MOST_VERIFIED_ROWS - 1)
