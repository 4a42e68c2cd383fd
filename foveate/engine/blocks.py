"""Which KV block belongs to whom: reference counts, reuse of free blocks, and the prefix cache.

A block is in exactly one of three states::

    blank   free, and nothing in it is worth keeping              reused first
    idle    free, but its keys and values are known by a hash     reused when none is blank, oldest first
    held    in the block table of one sequence or more

A held block may be registered under the hash of its contents (see :mod:`foveate.engine.sequence`); only then
can another sequence hold it too. Blocks are registered when the step which computes them is *scheduled*, or
later, so whoever registers must see to it that the step runs before any that is scheduled after that, or
:meth:`BlockAllocator.forget` them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from itertools import chain

from foveate.errors import EngineError


class BlockAllocator:
    """Hands out the blocks ``0 … num_blocks - 1`` of a paged KV cache.

    Args:
        num_blocks: blocks of the cache.
        block_size: tokens in a block.
        enable_prefix_caching: keep what free blocks hold, for whoever needs the same. Otherwise nothing is
            ever registered.

    Raises:
        ValueError: a number is less than 1.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._blank = list(reversed(range(num_blocks)))  # A stack: a warm block is used again at once.
        self._idle: OrderedDict[int, None] = OrderedDict()  # Least recently used first.

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds: blank and idle."""
        return len(self._blank) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that a prefix hit can find, held or idle."""
        return len(self._by_hash)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks ``num_tokens`` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def hash_of(self, block: int) -> bytes | None:
        """Return the hash under which a block is registered, if it is."""
        return self._hashes[block]

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest cached prefix of ``hashes``, without allocating them."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self, cached: list[int], num_new: int, *, spare: int = 0) -> list[int] | None:
        """Make a block table of a prefix hit and fresh blocks. Without enough free ones, change nothing.

        Args:
            cached: what :meth:`match_prefix` found; nothing may have been allocated since.
            num_new: fresh blocks after them.
            spare: blocks that must be free afterwards.

        Returns:
            The table, or None without enough free blocks.
        """
        num_idle = sum(1 for block in cached if self._refs[block] == 0)
        if num_idle + num_new + spare > self.num_free:
            return None
        for block in cached:  # All of the hit first: a fresh block must not be one of them.
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1
        return [*cached, *(self._take() for _ in range(num_new))]

    def extend(self, block_table: list[int], num_tokens: int) -> bool:
        """Give a table the blocks it lacks for ``num_tokens`` tokens, or change nothing and return False."""
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        block_table.extend(self._take() for _ in range(missing))
        return True

    def shrink(self, block_table: list[int], num_tokens: int) -> None:
        """Let go of the blocks at a table's end that ``num_tokens`` tokens do not need."""
        surplus = block_table[self.blocks_for(num_tokens) :]
        del block_table[self.blocks_for(num_tokens) :]
        self.free(surplus)

    def free(self, block_table: list[int]) -> None:
        """Let go of a table's blocks and empty the table.

        The last block becomes idle first, so that a prefix outlives what is of no use without it.

        Raises:
            EngineError: nobody holds one of the blocks: they were freed before.
        """
        while block_table:
            block = block_table.pop()
            if self._refs[block] == 0:
                raise EngineError(f"KV block {block} was freed twice")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def register(self, block: int, block_hash: bytes) -> bool:
        """Let others find a held, full block by its hash.

        Returns False, and does nothing, if another block answers to that hash or prefix caching is off.

        Raises:
            EngineError: nobody holds the block, or it is registered already.
        """
        if not self.enable_prefix_caching or block_hash in self._by_hash:
            return False
        if self._refs[block] == 0 or self._hashes[block] is not None:
            raise EngineError(f"KV block {block} cannot be registered: it is free, or registered already")
        self._hashes[block] = block_hash
        self._by_hash[block_hash] = block
        return True

    def forget(self, blocks: Iterable[int]) -> None:
        """Take blocks out of the prefix cache, because they do not hold what they were registered for."""
        for block in blocks:
            self._unregister(block)
            if block in self._idle:
                del self._idle[block]
                self._blank.append(block)

    def check(self, block_tables: Iterable[list[int]]) -> None:
        """Verify that every block is where it belongs, given all tables that hold any.

        Raises:
            EngineError: a block is lost, free and held at once, shared without a hash, or counted wrongly.
        """
        held: Counter[int] = Counter()
        for table in block_tables:
            if len(set(table)) != len(table):
                raise EngineError(f"a block table names a KV block twice: {table}")
            held.update(table)
        if not self._sums_up(held):
            self._explain(held)

    def _sums_up(self, held: Counter[int]) -> bool:
        """Check everything without a look at each block: there may be many, and somebody may come meanwhile."""
        places = Counter(chain(self._blank, self._idle, held))
        registered = self._by_hash.values()
        return (
            places.total() == len(places) == self.num_blocks
            and sum(self._refs) == held.total()
            and all(self._refs[block] == count for block, count in held.items())
            and all(self._hashes[block] is not None for block, count in held.items() if count > 1)
            and len(self._by_hash) == self.num_blocks - self._hashes.count(None)
            and all(self._hashes[block] == block_hash for block_hash, block in self._by_hash.items())
            and all(self._hashes[block] is not None for block in self._idle)
            and all(block in self._idle or block in held for block in registered)
        )

    def _explain(self, held: Counter[int]) -> None:
        """Raise the error that names the block where something is wrong."""
        places = Counter(chain(self._blank, self._idle, held))
        for block in range(self.num_blocks):
            block_hash = self._hashes[block]
            if places[block] != 1:
                raise EngineError(f"KV block {block} is in {places[block]} places instead of one")
            if self._refs[block] != held[block]:
                raise EngineError(f"KV block {block} counts {self._refs[block]} holders, but has {held[block]}")
            if held[block] > 1 and block_hash is None:
                raise EngineError(f"KV block {block} is shared by {held[block]} sequences without a hash")
            if block_hash is not None and self._by_hash.get(block_hash) != block:
                raise EngineError(f"KV block {block} has a hash by which it cannot be found")
            if held[block] == 0 and (block_hash is not None) != (block in self._idle):
                raise EngineError(f"KV block {block} is free, but in the wrong list")
        raise EngineError("the prefix cache names a KV block that does not know of it")

    def _take(self) -> int:
        """Take a free block for its first holder; the caller has made sure that there is one."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._unregister(block)
        self._refs[block] = 1
        return block

    def _unregister(self, block: int) -> None:
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hashes[block] = None
