"""CUDA graphs of the encoder's steps: one launch instead of some hundred, which take longer than a slice on the device.

A graph does not depend on the slices' sizes. It reads where they begin and end, their pixels and their places from
memory that stays where it is, and its number of patches is one of a few: a step is filled up to the next one.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from foveate.kernels.recording import Recorder
from foveate.models.packing import Packing, PackingRoom

logger = logging.getLogger(__name__)

Sizes = tuple[tuple[int, int], ...]
Forward = Callable[[Tensor, Packing], Tensor]

_WIDTHS = ((2048, 128), (8192, 256), (1 << 62, 512))
"""Up to so many patches, sizes are multiples of this. Matrix products work on 128 rows at a time anyway."""
_CONTENTS = 64


class StepGraphs:
    """The graphs of one encoder, for the one thread that runs it and the stream on which it does.

    They are made at the first step that needs them, which takes some ten milliseconds longer. One runs at a time, so
    they share their input, their output, and the memory of what lies between.

    Args:
        forward: from uint8 pixels [patches, columns] and their packing to [slices, query_num, hidden_size]; the same
            kernels whatever the values are.
        most_patches: of the largest step that gets a graph.
        longest: patches of the largest slice that does. Few slices have less than half as many.
        side: position buckets of the encoder along each axis.
        columns: bytes of a patch.
        like: an output, whose columns, type and device those of the graphs have: [any number, query_num, hidden_size].
        recorder: makes the graphs.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        most_patches: int,
        longest: int,
        side: int,
        columns: int,
        like: Tensor,
        recorder: Recorder,
    ) -> None:
        self.sizes = graph_sizes(most_patches)
        """Numbers of patches, ascending."""
        self._forward = forward
        self._longest = longest
        self._side = side
        self._recorder = recorder
        self._pixels = torch.zeros((self.sizes[-1], columns), dtype=torch.uint8, device=like.device)
        self._output = like.new_zeros((self._most_slices(self.sizes[-1]) + 1, *like.shape[1:]))
        self._rooms: dict[int, PackingRoom] = {}
        self._replays: dict[int, Callable[[], None]] = {}
        self._contents: OrderedDict[Sizes, Tensor] = OrderedDict()
        self._failed = False

    def __len__(self) -> int:
        return len(self._replays)

    @torch.inference_mode()
    def run(self, tgt_sizes: Sizes, fill: Callable[[Tensor], None]) -> Tensor | None:
        """Run a step.

        Args:
            tgt_sizes: (rows, columns) of each slice, in patches.
            fill: called with uint8 [at least the slices' patches, columns], copies their pixels to its beginning.

        Returns:
            [slices, query_num, hidden_size], until the next step; None if there is no graph for it: nothing has been
            done then
        """
        size = self._size(tgt_sizes)
        if size is None or (self._failed and size not in self._replays):
            return None
        room = self._room(size)
        room.put(self._contents_of(tgt_sizes, room))
        fill(self._pixels)
        replay = self._replays.get(size) or self._record(size)
        if replay is None:
            return None
        replay()
        return self._output[: len(tgt_sizes)]

    def _size(self, tgt_sizes: Sizes) -> int | None:
        lengths = [rows * columns for rows, columns in tgt_sizes]
        index = bisect_left(self.sizes, sum(lengths))
        if max(lengths) > self._longest or index == len(self.sizes):
            return None
        return self.sizes[index] if len(lengths) <= self._most_slices(self.sizes[index]) else None

    def _most_slices(self, size: int) -> int:
        return 1 + 2 * size // self._longest

    def _room(self, size: int) -> PackingRoom:
        if size not in self._rooms:
            # The filling is a sequence too, and less than the largest distance between two sizes.
            longest = max(self._longest, *(width for _, width in _WIDTHS))
            self._rooms[size] = PackingRoom(size, self._most_slices(size), longest, self._pixels.device)
        return self._rooms[size]

    def _contents_of(self, tgt_sizes: Sizes, room: PackingRoom) -> Tensor:
        contents = self._contents.pop(tgt_sizes, None)
        if contents is None:
            contents = room.contents(tgt_sizes, self._side)
        self._contents[tgt_sizes] = contents
        if len(self._contents) > _CONTENTS:
            self._contents.popitem(last=False)
        return contents

    def _record(self, size: int) -> Callable[[], None] | None:
        pixels, packing = self._pixels[:size], self._rooms[size].packing
        output = self._output[: len(packing.tgt_sizes)]

        def run() -> Tensor:
            # Copied, so that the memory of one graph has nothing that another one must not overwrite.
            return output.copy_(self._forward(pixels, packing))

        try:
            replay, _ = self._recorder.record(run, run)
        except RuntimeError as error:
            # Whatever it is, steps run without.
            self._failed = True
            logger.warning("no CUDA graph of %d patches, and no more of others: %s", size, error)
            return None
        self._replays[size] = replay
        return replay


def graph_sizes(most_patches: int) -> list[int]:
    """Return the numbers of patches of graphs, ascending, up to the first that is enough for ``most_patches``."""
    sizes: list[int] = []
    for end, width in _WIDTHS:
        start = sizes[-1] if sizes else 0
        if start < most_patches:
            sizes += range(start + width, min(end, most_patches + width - 1) + 1, width)
    return sizes
