"""What a sequence gets of the KV cache: blocks to start with, more as it grows, and those that are filled already.

Two policies say whether a sequence can start. ``guaranteed_no_evict`` wants all blocks that it can ever need, beside
what the running ones can still come to need. ``max_utilization`` wants blocks for the tokens it has now and one more
for everybody; a running sequence can come to lack one then.

Full blocks are registered for sharing as soon as their tokens are known and the step that computes them is scheduled,
so sequences of one step share as well (the runner writes a layer's keys and values of the whole step before it reads
any). What the step of a sequence that has ended writes behind its last token, or behind a wrong guess, is never in a
registered block, since its token is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing

from foveate.engine.blocks import BlockAllocator
from foveate.engine.sequence import Sequence
from foveate.errors import EngineError


class KVManager:
    """Gives blocks to sequences and takes them back, by a policy.

    Args:
        allocator: the KV blocks.
        guaranteed: whether whoever starts can surely finish.
    """

    def __init__(self, allocator: BlockAllocator, *, guaranteed: bool) -> None:
        self.allocator = allocator
        self.guaranteed = guaranteed

    def can_ever_hold(self, seq: Sequence) -> bool:
        """Whether the whole cache is enough for a sequence at its longest."""
        return self._most_blocks(seq) <= self.allocator.num_blocks

    def num_cached_tokens(self, seq: Sequence) -> int:
        """Return how many of a sequence's first tokens need not be computed if it starts now."""
        return len(self._hit(seq)) * self.allocator.block_size

    def start(self, seq: Sequence, running: Iterable[Sequence]) -> bool:
        """Give a sequence blocks for all of its tokens, or change nothing if there are too few.

        Args:
            seq: has none.
            running: all that have some.
        """
        hit, num_blocks = self._hit(seq), self.allocator.blocks_for(seq.num_tokens)
        spare = self._promised(seq, num_blocks)
        spare += sum(self._promised(other, len(other.block_table)) for other in running)
        table = self.allocator.allocate(hit, num_blocks - len(hit), spare=spare)
        if table is None:
            return False
        seq.block_table = table
        seq.num_offered_blocks = len(hit)
        seq.num_computed_tokens = len(hit) * self.allocator.block_size
        return True

    def extend(self, seq: Sequence) -> bool:
        """Give a running sequence the block of its next token, if it lacks that and there is one."""
        return self.allocator.extend(seq.block_table, seq.num_placed)

    def take_back(self, seq: Sequence) -> None:
        """Take all blocks of a sequence; what is in them does not count as computed any more."""
        self.allocator.free(seq.block_table)
        seq.num_computed_tokens = seq.num_offered_blocks = 0

    def register(self, seq: Sequence) -> None:
        """Offer those of a sequence's blocks to the prefix cache that are full, of known tokens, and computed."""
        hashes = self._hashes(seq)
        full = min(seq.num_computed_tokens // self.allocator.block_size, len(hashes))
        for index in range(seq.num_offered_blocks, full):
            self.allocator.register(seq.block_table[index], hashes[index])
        seq.num_offered_blocks = max(full, seq.num_offered_blocks)

    def check(self, running: Listing[Sequence]) -> None:
        """Verify that all blocks are where they belong, given all sequences that have some.

        Raises:
            EngineError: one is not, or more are promised than there are.
        """
        self.allocator.check(seq.block_table for seq in running)
        for seq in running:
            for block, block_hash in zip(seq.block_table, self._hashes(seq), strict=False):
                if self.allocator.hash_of(block) not in (None, block_hash):
                    raise EngineError(f"{seq} holds block {block}, which is registered for other contents")
        promised = sum(self._promised(seq, len(seq.block_table)) for seq in running)
        if self.guaranteed and promised > self.allocator.num_free:
            raise EngineError(f"{promised} blocks are promised, but {self.allocator.num_free} are free")

    def _hit(self, seq: Sequence) -> list[int]:
        """Return the blocks that hold a sequence's prefix already."""
        # The newest token is always computed, as its logits are wanted: its block is not part of a hit.
        return self.allocator.match_prefix(self._hashes(seq)[: (seq.num_tokens - 1) // self.allocator.block_size])

    def _hashes(self, seq: Sequence) -> list[bytes]:
        return seq.block_hashes(self.allocator.block_size) if self.allocator.enable_prefix_caching else []

    def _most_blocks(self, seq: Sequence) -> int:
        """Blocks for a sequence at its longest. Its very last token is chosen, but never run."""
        return self.allocator.blocks_for(seq.max_len - 1)

    def _promised(self, seq: Sequence, num_blocks: int) -> int:
        """Free blocks to keep for a sequence that has ``num_blocks``: all it can ever need, or just the next.

        Without the next one, whoever is admitted last would often be preempted at once.
        """
        more = self._most_blocks(seq) - num_blocks
        return more if self.guaranteed else min(more, 1)
