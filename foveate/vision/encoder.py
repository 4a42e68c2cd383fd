"""Pixels in, embeddings out: the model part of the vision encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.models.minicpmv import VisionTower
from foveate.vision.preprocess import Patches, Pixels


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice of a picture.

    Attributes:
        patches: uint8 [rows * columns, 3 * patch_size**2], row by row, channel first within a patch.
        tgt_size: (rows, columns) in patches.
    """

    patches: Patches
    tgt_size: tuple[int, int]


class VisionEncoder:
    """Runs encoder and resampler on slices of any number of pictures. For one thread at a time.

    On a GPU it has a stream of its own, of the lowest priority: whatever shares the process may run ahead of it.

    Args:
        tower: the model, on its device.
        mean: subtracted from each channel of pixels scaled to 0 to 1.
        std: each channel is then divided by this.
        batch_size: slices that :meth:`encode` takes in one step.
    """

    def __init__(self, tower: VisionTower, *, mean: Sequence[float], std: Sequence[float], batch_size: int) -> None:
        self.tower = tower
        self.batch_size = batch_size
        weight = tower.encoder.patch_embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.query_num, self.hidden_size = tower.resampler.query.shape
        self._mean = torch.tensor(mean, device=self.device)[:, None]
        self._std = torch.tensor(std, device=self.device)[:, None]
        self._stream = torch.cuda.Stream(self.device, priority=0) if self.device.type == "cuda" else None

    @property
    def slice_bytes(self) -> int:
        """Bytes of one slice's embeddings."""
        return self.query_num * self.hidden_size * self.dtype.itemsize

    def normalize(self, patches: Tensor) -> Tensor:
        """uint8 [patches, 3 * patch_size**2] → the encoder's input of that shape, rounded as the reference rounds."""
        channels = patches.to(self.device, non_blocking=True).float().unflatten(1, (3, -1))
        return ((channels / 255 - self._mean) / self._std).flatten(1).to(self.dtype)

    def empty(self, num_slices: int) -> Tensor:
        """Make room for the embeddings of a picture: [num_slices, query_num, hidden_size] on the device."""
        with self._own_stream():
            return torch.empty(num_slices, self.query_num, self.hidden_size, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def encode_slices(self, slices: Sequence[Slice], into: Sequence[Tensor]) -> None:
        """Encode slices together, in one step, and wait for it.

        Equal patch counts are best neighbours. What comes out of a slice does not depend on the others but for
        rounding.

        Args:
            slices: at least one, in any order.
            into: where each one's embeddings [query_num, hidden_size] are written.
        """
        sizes = [piece.tgt_size for piece in slices]
        with self._own_stream():
            features = self.tower.encoder(self.normalize(self._packed(slices)), sizes)
            for target, embeddings in zip(into, self.tower.resampler(features, sizes), strict=True):
                target.copy_(embeddings)
        if self._stream is not None:
            self._stream.synchronize()

    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Encode whole pictures, ``batch_size`` slices in a step.

        Returns:
            for each picture its embeddings, [slices * query_num, hidden_size] on the device
        """
        rooms = [self.empty(len(pixels.tgt_sizes)) for pixels in pictures]
        slices = [piece for pixels in pictures for piece in slices_of(pixels)]
        into = [target for room in rooms for target in room]
        for start in range(0, len(slices), self.batch_size):
            end = start + self.batch_size
            self.encode_slices(slices[start:end], into[start:end])
        return [room.flatten(0, 1) for room in rooms]

    def measure(self, num_slices: int, tgt_size: tuple[int, int]) -> int:
        """Run a step of slices of one size and return its peak of memory on the device, in bytes; 0 on a CPU.

        The memory stays with this process, so a step that is not larger finds it again.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        columns = self.tower.encoder.patch_embedding.weight.shape[1]
        patches = np.zeros((tgt_size[0] * tgt_size[1], columns), dtype=np.uint8)
        self.encode_slices([Slice(patches, tgt_size)] * num_slices, list(self.empty(num_slices)))
        return torch.cuda.max_memory_allocated(self.device) - before

    def _packed(self, slices: Sequence[Slice]) -> Tensor:
        patches = [torch.from_numpy(piece.patches) for piece in slices]
        if self.device.type != "cuda":
            return patches[0] if len(patches) == 1 else torch.cat(patches)
        # From pinned memory the copy runs beside what this thread does next.
        shape = (sum(len(part) for part in patches), patches[0].shape[1])
        return torch.cat(patches, out=torch.empty(shape, dtype=torch.uint8, pin_memory=True))

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield


def slices_of(pixels: Pixels) -> list[Slice]:
    """Take a picture's slices apart; they share its memory."""
    ends = np.cumsum([rows * columns for rows, columns in pixels.tgt_sizes])
    parts = np.split(pixels.patches, ends[:-1])
    return [Slice(patches, tgt_size) for patches, tgt_size in zip(parts, pixels.tgt_sizes, strict=True)]
