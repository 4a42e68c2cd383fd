"""Where packed slices begin, and where each of their patches is: what a step's layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.kernels.vision_ops import Sequences


@dataclass(frozen=True, slots=True)
class Packing:
    """Slices of known sizes, one after another, and what is on the device of that.

    Attributes:
        tgt_sizes: (rows, columns) of each slice, in patches; of those in a :class:`PackingRoom`, at least as much.
        slices: how many patches each slice has, and where they are.
        positions: int64 [patches], each patch's row in the encoder's table of positions.
        places: int32 [2, patches], each patch's column and row.
    """

    tgt_sizes: tuple[tuple[int, int], ...]
    slices: Sequences
    positions: Tensor
    places: Tensor

    @classmethod
    def of(cls, tgt_sizes: Sequence[tuple[int, int]], side: int, device: torch.device) -> Packing:
        """Describe at least one slice, for an encoder with ``side`` position buckets along each axis."""
        return cls(
            tuple(tgt_sizes),
            Sequences.of([rows * columns for rows, columns in tgt_sizes], device),
            torch.cat([position_ids(rows, columns, side) for rows, columns in tgt_sizes]).to(device),
            torch.cat([patch_places(rows, columns) for rows, columns in tgt_sizes], dim=1).to(device),
        )

    @property
    def num_patches(self) -> int:
        """Patches of all slices."""
        return sum(self.slices.lengths)


class PackingRoom:
    """Where the packings of steps go, one after another, for what reads them from the same places every time.

    The patches that a step does not have make up a sequence of their own, behind its slices: so nothing is computed
    from memory that nobody wrote. All sequences behind that one are empty.

    Args:
        num_patches: of every step with its filling, an even number.
        num_slices: most slices of a step.
        longest: most patches of a slice, and of the filling.
        device: where.
    """

    def __init__(self, num_patches: int, num_slices: int, longest: int, device: torch.device) -> None:
        self.num_patches = num_patches
        self.num_slices = num_slices
        sequences = num_slices + 1
        # Both kinds of places take 8 bytes a patch.
        self._memory = torch.zeros(16 * num_patches + 4 * (sequences + 1), dtype=torch.uint8, device=device)
        positions, places, offsets = self._memory.split((8 * num_patches, 8 * num_patches, 4 * (sequences + 1)))
        self.packing = Packing(
            # Whatever its shape, no side of a slice is longer than this.
            ((longest, 1),) * sequences,
            Sequences(None, offsets.view(torch.int32), longest),
            positions.view(torch.int64),
            places.view(torch.int32).unflatten(0, (2, num_patches)),
        )
        """What is there: as many slices as there is room for, and one more."""

    def contents(self, tgt_sizes: Sequence[tuple[int, int]], side: int) -> Tensor:
        """Return on the device what :meth:`put` puts here for some slices; ``side`` as for :meth:`Packing.of`."""
        packing = Packing.of(tgt_sizes, side, torch.device("cpu"))
        filling = self.num_patches - len(packing.positions)
        empty = self.num_slices + 1 - len(tgt_sizes)
        parts = (
            F.pad(packing.positions, (0, filling)),
            F.pad(packing.places, (0, filling)).flatten(),
            F.pad(packing.slices.offsets, (0, empty), value=self.num_patches),
        )
        return torch.cat([part.view(torch.uint8) for part in parts]).to(self._memory.device)

    def put(self, contents: Tensor) -> None:
        """Fill :attr:`packing` with what :meth:`contents` returned, in the order of the device's stream."""
        self._memory.copy_(contents)


@lru_cache(maxsize=1024)
def position_buckets(count: int, side: int) -> Tensor:
    """Return the bucket, 0 to ``side`` - 1, of each of ``count`` equal steps from 0 to 1: int64 [count].

    Mathematically that is ``i * side // count``. The published encoder compares float32 fractions from
    ``torch.arange(0, 1 - 1e-6, 1 / count)`` with float32 boundaries, so where both are equal the rounding decides.
    How ``arange`` rounds depends on the processor; here it is spelled out as the reference ran it (eight lanes, each
    a fused multiply-add on the first one), so that every machine gives the reference's answer.
    """
    step = torch.tensor(1 / count, dtype=torch.float32)
    index = torch.arange(count)
    first_lane = (index // 8 * 8).float() * step
    # Both factors have few bits, so the float64 product is exact and only the final rounding counts.
    fractions = (first_lane.double() + (index % 8).double() * step.double()).float()
    boundaries = (torch.arange(1, side, dtype=torch.float64) / side).float()
    return torch.bucketize(fractions, boundaries, right=True)


@lru_cache(maxsize=1024)
def position_ids(rows: int, columns: int, side: int) -> Tensor:
    """Return each patch's row in the position table, row by row: int64 [rows * columns]."""
    return (position_buckets(rows, side)[:, None] * side + position_buckets(columns, side)).flatten()


@lru_cache(maxsize=1024)
def patch_places(rows: int, columns: int) -> Tensor:
    """Return every patch's column and row, row by row: int32 [2, rows * columns]."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((column.flatten(), row.flatten())).int()
