"""A reader's view of an arena: its memory, mapped for reading, and the check that what it finds there is its own."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from foveate.errors import Unavailable
from foveate.transport import memfd
from foveate.transport.layout import MAX_GENERATION, READY, Layout, block_word


class ArenaView:
    """An arena as its readers see it. The mapping ends with the last reference to it.

    Args:
        fd: the memory; stays the caller's to close.
        layout: its sizes.

    Raises:
        Unavailable: the memory is not what the layout says.
    """

    def __init__(self, fd: int, layout: Layout) -> None:
        memory = memfd.map_read_only(fd, layout.file_bytes)
        self.layout = layout
        self.words: npt.NDArray[np.uint64] = np.frombuffer(memory, np.uint64, layout.num_blocks)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8, offset=layout.header_bytes)
        self._fence = threading.Lock()

    def check(self, start: int, num_bytes: int, generation: int) -> None:
        """See that the blocks from ``start`` on hold this use's bytes. Call it before copying and again afterwards.

        Raises:
            Unavailable: the blocks were freed (and perhaps used again), or there are no such blocks.
        """
        num_blocks = self.layout.blocks_for(num_bytes)
        if not (0 <= start <= self.layout.num_blocks - num_blocks and 0 <= generation <= MAX_GENERATION):
            raise Unavailable(
                f"a picture's handle names blocks {start} to {start + num_blocks} of generation {generation}, "
                f"and the arena has {self.layout.num_blocks} blocks",
                retry_after=1,
            )
        # Taking and leaving a lock keeps the processor from reading the words before the copy is finished.
        with self._fence:
            pass
        if not (self.words[start : start + num_blocks] == block_word(generation, READY)).all():
            raise Unavailable("a picture's embeddings were given up before they were read; try again", retry_after=1)
        with self._fence:
            pass
