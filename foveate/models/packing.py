"""Where packed slices begin, and where each of their patches is: what a step's layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.kernels.vision_ops import Sequences


@dataclass(frozen=True, slots=True)
class Packing:
    """Slices of known sizes, one after another, and what is on the device of that.

    Attributes:
        tgt_sizes: (rows, columns) of each slice, in patches.
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
