"""How an arena's memory is laid out, for both of its ends."""

from __future__ import annotations

import bisect

import msgspec

PAGE_BYTES = 4096
WORD_BYTES = 8

FREE, WRITING, READY = 0, 1, 2
"""States of a block."""
_STATE_BITS = 2
MAX_GENERATION = 2 ** (64 - _STATE_BITS) - 1


def block_word(generation: int, state: int) -> int:
    """Put a block's generation and state into the one number that the header holds for it.

    One aligned word is read and written whole: no reader ever sees the generation of one use with the state of another.
    """
    return generation << _STATE_BITS | state


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of an arena: a header with one word for each block, then (unless it lies elsewhere) the data.

    Attributes:
        block_bytes: the unit of allocation, a multiple of the page size.
        num_blocks: blocks.
        data_in_file: whether the data follow the header, or lie in a GPU's memory.
    """

    block_bytes: int
    num_blocks: int
    data_in_file: bool = True

    @property
    def header_bytes(self) -> int:
        """Bytes before the first block, whole pages."""
        return -(-self.num_blocks * WORD_BYTES // PAGE_BYTES) * PAGE_BYTES

    @property
    def data_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self.block_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the shared file."""
        return self.header_bytes + (self.data_bytes if self.data_in_file else 0)

    def blocks_for(self, num_bytes: int) -> int:
        """Blocks that hold this many bytes; at least one, so that everything published has a place."""
        return max(1, -(-num_bytes // self.block_bytes))


class FreeRuns:
    """The free blocks as runs in ascending order, neighbours merged. Not safe to use from several threads.

    First fit, so that a quiet arena uses the same few blocks again and again, whose pages are in the caches already.
    """

    def __init__(self, num_blocks: int) -> None:
        self._starts = [0]
        self._lengths = [num_blocks]

    @property
    def total(self) -> int:
        """Free blocks."""
        return sum(self._lengths)

    @property
    def longest(self) -> int:
        """Blocks of the longest run."""
        return max(self._lengths, default=0)

    def take(self, num_blocks: int) -> int | None:
        """Take a run out; return its first block, or None where no run is long enough."""
        for index, length in enumerate(self._lengths):
            if length < num_blocks:
                continue
            start = self._starts[index]
            if length == num_blocks:
                del self._starts[index], self._lengths[index]
            else:
                self._starts[index] += num_blocks
                self._lengths[index] -= num_blocks
            return start
        return None

    def give(self, start: int, num_blocks: int) -> None:
        """Put a run back."""
        index = bisect.bisect(self._starts, start)
        if index < len(self._starts) and start + num_blocks == self._starts[index]:
            num_blocks += self._lengths[index]
            del self._starts[index], self._lengths[index]
        if index and self._starts[index - 1] + self._lengths[index - 1] == start:
            self._lengths[index - 1] += num_blocks
        else:
            self._starts.insert(index, start)
            self._lengths.insert(index, num_blocks)
