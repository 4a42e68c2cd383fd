"""Resizing and cutting pictures on the encoder's GPU: the pixels that Pillow would make, bit for bit.

Pillow resizes 8-bit pictures with whole numbers, one direction after the other, each rounded to 8 bits. Doing the same
sums anywhere gives the same pixels; a CPU takes tens of milliseconds for a large picture and a GPU a tenth of one.
What a version of Pillow does is checked once, when this is made.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from foveate.kernels import vision_ops
from foveate.media.slicing import Size, SlicePlan
from foveate.vision.preprocess import Patches, columns_first, preprocess

logger = logging.getLogger(__name__)

_WORKSPACE_BYTES = 96 * 2**20
_ALIGNMENT = 256
_TABLES = 128
_PRECISION = 22
_SUPPORT = 2.0


@dataclass(frozen=True, slots=True)
class Resizing:
    """A picture that is being resized on the device."""

    _patches: Tensor
    _picture: Tensor
    _done: torch.cuda.Event

    def wait(self) -> Patches:
        """Return uint8 [patches, 3 * patch_size**2] in pinned memory, all slices packed."""
        self._done.synchronize()
        return self._patches.numpy()


class DeviceResizer:
    """Resizes on a GPU, in memory of a fixed size. Safe to use from several threads.

    Args:
        device: the GPU.
        kernels: :mod:`foveate.kernels.triton.vision_resize`.
    """

    def __init__(self, device: torch.device, kernels: ModuleType) -> None:
        self._device = device
        self._kernels = kernels
        self._lock = threading.Lock()
        # Its kernels are short and somebody waits for them: they go before the encoder's.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._tables: OrderedDict[Size, tuple[Tensor, Tensor]] = OrderedDict()

    @classmethod
    def make(cls, device: torch.device) -> DeviceResizer | None:
        """Make one, if there are kernels for the device and they agree with Pillow."""
        kernels = vision_ops.resize_kernels(device)
        if kernels is None:
            return None
        made = cls(device, kernels)
        if made.agrees():
            return made
        logger.warning("pictures are resized on the CPU: Pillow's pixels are others than expected")
        return None

    def agrees(self) -> bool:
        """Say whether the Pillow that is there makes the same pixels."""
        random = np.random.default_rng(0)
        for (width, height), plan in _SAMPLES:
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            resizing = self.begin(pixels.tobytes(), (width, height), plan)
            expected = preprocess(Image.fromarray(pixels), plan).patches
            if resizing is None or not np.array_equal(resizing.wait(), expected):
                return False
        return True

    def begin(self, pixels: bytes, size: Size, plan: SlicePlan) -> Resizing | None:
        """Start to resize and cut a picture.

        Args:
            pixels: of an RGB picture, row by row.
            size: its width and height.
            plan: what becomes of it.

        Returns:
            what to wait for; None if the picture is too large
        """
        width, height = size
        columns = 3 * plan.patch_size**2
        counts = [rows * columns for rows, columns in plan.tgt_sizes]
        steps = [(plan.source_size, (1, 1), counts[0])]
        if plan.refine_size is not None and plan.grid is not None:
            steps.append((plan.refine_size, (plan.grid[1], plan.grid[0]), sum(counts[1:])))
        between = max(3 * max(target[1] * width, height * target[0]) for target, _, _ in steps)
        needed = [len(pixels), between, sum(counts) * columns]
        if sum(needed) + len(needed) * _ALIGNMENT > self._workspace.numel():
            return None
        picture = torch.empty(len(pixels), dtype=torch.uint8, pin_memory=True)
        picture.numpy()[:] = np.frombuffer(pixels, dtype=np.uint8)
        patches = torch.empty((sum(counts), columns), dtype=torch.uint8, pin_memory=True)
        # The workspace is reused as soon as the next picture's turn comes on the stream.
        with self._lock, torch.cuda.stream(self._stream):
            source, middle, target = self._rooms(needed)
            source.copy_(picture, non_blocking=True)
            start = 0
            for new_size, grid, count in steps:
                tables = self._table(width, new_size[0]), self._table(height, new_size[1])
                part = target.view(-1, columns)[start : start + count]
                first = columns_first(size, new_size)
                resize(self._kernels, source.view(height, width, 3), middle, tables, part, new_size, grid, first)
                start += count
            patches.copy_(target.view(-1, columns), non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return Resizing(patches, picture, done)

    def _rooms(self, sizes: list[int]) -> list[Tensor]:
        rooms, start = [], 0
        for size in sizes:
            rooms.append(self._workspace[start : start + size])
            start += -(-size // _ALIGNMENT) * _ALIGNMENT
        return rooms

    def _table(self, length: int, new_length: int) -> tuple[Tensor, Tensor]:
        key = (length, new_length)
        if (table := self._tables.pop(key, None)) is None:
            starts, weights = coefficients(length, new_length)
            table = torch.from_numpy(starts).to(self._device), torch.from_numpy(weights).to(self._device)
        self._tables[key] = table
        if len(self._tables) > _TABLES:
            self._tables.popitem(last=False)
        return table


def resize(
    kernels: ModuleType,
    source: Tensor,
    middle: Tensor,
    tables: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    patches: Tensor,
    new_size: Size,
    grid: tuple[int, int],
    columns_first: bool,
) -> None:
    """Resize a picture and cut it into patches.

    Args:
        kernels: :mod:`foveate.kernels.triton.vision_resize`.
        source: uint8 [height, width, 3].
        middle: uint8, room for what is resized in one direction.
        tables: :func:`coefficients` along the rows and along the columns, on the device.
        patches: uint8 [patches, 3 * patch_size**2], where the slices go.
        new_size: width and height.
        grid: rows and columns of slices.
        columns_first: the order.
    """
    (height, width), (new_width, new_height) = source.shape[:2], new_size
    along_rows, along_columns = tables
    patch_size = math.isqrt(patches.shape[1] // 3)
    shape = (new_height, new_width)
    if columns_first:
        between = middle[: new_height * width * 3].view(new_height, width, 3)
        kernels.resample_columns(source, *along_columns, between)
        kernels.resample_patches(between, *along_rows, patches, shape, grid, patch_size, along_row=True)
    else:
        between = middle[: height * new_width * 3].view(height, new_width, 3)
        kernels.resample_rows(source, *along_rows, between)
        kernels.resample_patches(between, *along_columns, patches, shape, grid, patch_size, along_row=False)


def coefficients(length: int, new_length: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return what each new pixel along an axis is made of, by Pillow's bicubic filter (a = -0.5).

    Returns:
        int32 [new_length], the first pixel that counts; int32 [new_length, taps], weights in units of 2**-22
    """
    scale = length / new_length
    stretch = max(scale, 1.0)
    support = _SUPPORT * stretch
    taps = int(np.ceil(support)) * 2 + 1
    centres = (np.arange(new_length) + 0.5) * scale
    starts = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + support + 0.5).astype(np.int64), length)
    places = starts[:, None] + np.arange(taps)
    x = np.abs((places - centres[:, None] + 0.5) * (1.0 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weights = np.where(places < ends[:, None], weights, 0.0)
    # One after the other, as Pillow adds: np.sum adds in pairs.
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    whole = np.trunc(weights * 2.0**_PRECISION + np.where(weights < 0, -0.5, 0.5))
    return starts.astype(np.int32), whole.astype(np.int32)


_SAMPLES = (
    ((90, 70), SlicePlan((42, 28), (140, 84), (2, 3), 14)),
    ((60, 150), SlicePlan((28, 56), (56, 112), (2, 2), 14)),
)
