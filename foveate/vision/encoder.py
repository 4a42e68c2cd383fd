"""Pixels in, embeddings out: the model part of the vision encoder."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.checkpoint.activations import ENCODED_BYTES
from foveate.kernels import ops, vision_ops
from foveate.kernels.memory import Room
from foveate.kernels.recording import CudaRecorder, Recorder
from foveate.models.minicpmv import VisionTower
from foveate.models.packing import Packing
from foveate.vision.graphs import Sizes, StepGraphs
from foveate.vision.preprocess import Patches, Pixels
from foveate.vision.resize import DeviceResizer

logger = logging.getLogger(__name__)

STEP_SECONDS = 0.015
"""On a GPU, about the longest step: an engine that shares the GPU gets its turn in between."""

_PACKINGS = 64
_MEASUREMENTS = 8


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
        cuda_graphs: replay the usual steps as CUDA graphs once the memory was measured, where that is possible.
    """

    def __init__(
        self,
        tower: VisionTower,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        cuda_graphs: bool = True,
    ) -> None:
        self.tower = tower
        self.batch_size = batch_size
        self._cuda_graphs = cuda_graphs
        self.step_patches: int | None = None
        """Patches of a step that takes :data:`STEP_SECONDS`, once that was measured."""
        self.resizer: DeviceResizer | None = None
        """What resizes pictures on the device, once the memory was measured."""
        self.step_bytes = 0
        """What :meth:`measure` has measured."""
        weight = tower.encoder.patch_embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.query_num, self.hidden_size = tower.resampler.query.shape
        self._columns = weight.shape[1]
        self._mean = torch.tensor(mean, device=self.device)[:, None]
        self._std = torch.tensor(std, device=self.device)[:, None]
        every = torch.arange(256, dtype=torch.uint8, device=self.device).repeat(1, 3)
        self._values = self._normalized(every).unflatten(1, (3, -1))[0]
        self._stream = torch.cuda.Stream(self.device, priority=0) if self.device.type == "cuda" else None
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._packings: OrderedDict[Sizes, Packing] = OrderedDict()
        self._rows = Room(self.device, ENCODED_BYTES)
        self._graphs: StepGraphs | None = None

    @property
    def slice_bytes(self) -> int:
        """Bytes of one slice's embeddings."""
        return self.query_num * self.hidden_size * self.dtype.itemsize

    def room(self, shape: tuple[int, int], dtype: type[np.uint8] = np.uint8) -> Patches:
        """Make memory for patches on the host, from which the device takes them fastest."""
        if self.device.type != "cuda":
            return np.empty(shape, dtype)
        pinned: Patches = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned

    @contextmanager
    def own_copies(self) -> Iterator[None]:
        """Let what this thread copies wait for no other copy, and no other for it. Of finished rows only."""
        with torch.cuda.stream(self._copies):
            yield

    def normalize(self, patches: Tensor) -> Tensor:
        """uint8 [patches, 3 * patch_size**2] → the encoder's input of that shape, rounded as the reference rounds."""
        patches = patches.to(self.device, non_blocking=True)
        # There are 256 values a channel: a kernel can look them up. Without one, computing them is faster.
        return vision_ops.normalize_pixels(patches, self._values) if patches.is_cuda else self._normalized(patches)

    def empty(self, num_slices: int) -> Tensor:
        """Make room for the embeddings of a picture: [num_slices, query_num, hidden_size].

        It is on the device, or on the host while too many wait on the device to be handed over.
        """
        device = self._rows.device_for(num_slices * self.slice_bytes)
        with self._own_stream():
            rows = torch.empty(num_slices, self.query_num, self.hidden_size, dtype=self.dtype, device=device)
        return self._rows.count(rows)

    @torch.inference_mode()
    def encode_slices(self, slices: Sequence[Slice], into: Sequence[Tensor]) -> None:
        """Encode slices together, in one step, and wait for it.

        Equal patch counts are best neighbours. What comes out of a slice does not depend on the others but for
        rounding.

        Args:
            slices: at least one, in any order.
            into: where each one's embeddings [query_num, hidden_size] are written.
        """
        with self._own_stream():
            sizes = tuple(piece.tgt_size for piece in slices)
            embeddings = None
            if self._graphs is not None:
                embeddings = self._graphs.run(sizes, lambda room: self._copy(slices, room))
            if embeddings is None:
                embeddings = self._forward(self._packed(slices), self._packing(sizes))
            torch._foreach_copy_(list(into), list(embeddings.unbind()))
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

        What resizes pictures and what waits to be handed over is a part of it. The memory stays with this process, so
        a step that is not larger finds it again. How long it takes says how much the steps to come should do, and so
        which of them get CUDA graphs, whose memory is counted too.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.resizer = self.resizer or DeviceResizer.make(self.device)
        with self._own_stream():
            waiting = torch.empty(ENCODED_BYTES, dtype=torch.uint8, device=self.device)
        patches = np.zeros((tgt_size[0] * tgt_size[1], self._columns), dtype=np.uint8)
        slices, into = [Slice(patches, tgt_size)] * num_slices, list(self.empty(num_slices))
        # The first time also compiles kernels.
        self.encode_slices(slices, into)
        # The shortest of some: others start at the same time, on the same cores and maybe the same device.
        seconds = min(self._timed(slices, into) for _ in range(_MEASUREMENTS))
        del waiting
        fit = max(1, min(num_slices, int(num_slices * STEP_SECONDS / seconds)))
        self.step_patches = fit * len(patches)
        logger.info("a slice takes %.2f ms; steps of up to %d slices", 1000 * seconds / num_slices, fit)
        needed = torch.cuda.max_memory_allocated(self.device) - before
        self.step_bytes = needed + self._make_graphs(slices[:fit], into)
        return self.step_bytes

    def use_graphs(self, recorder: Recorder, most_patches: int, longest: int) -> StepGraphs:
        """Repeat steps of up to so many patches, in slices that have ``longest`` at most."""
        with self._own_stream():
            self._graphs = StepGraphs(
                self._forward,
                most_patches=most_patches,
                longest=longest,
                side=self.tower.encoder.config.patches_per_side,
                columns=self._columns,
                like=self.empty(0),
                recorder=recorder,
            )
        return self._graphs

    def _make_graphs(self, slices: Sequence[Slice], into: Sequence[Tensor]) -> int:
        """Use graphs for steps that are not larger than this one, and return the bytes that they take in all."""
        if not self._can_record():
            return 0
        began, reserved = time.monotonic(), torch.cuda.memory_reserved(self.device)
        length = len(slices[0].patches)
        graphs = self.use_graphs(CudaRecorder(self.device, self._stream), len(slices) * length, length)
        # The largest first: all others fit into its memory. Then those of one slice; the rest when they are needed.
        fewer = max((size for size in graphs.sizes if size < length), default=length)
        for step in (slices, slices[:1], [Slice(slices[0].patches[:fewer], (1, fewer))]):
            self.encode_slices(step, into[: len(step)])
        logger.info(
            "%d CUDA graphs captured in %.2f s, of %d to %d patches",
            len(graphs), time.monotonic() - began, graphs.sizes[0], graphs.sizes[-1],
        )  # fmt: skip
        return torch.cuda.memory_reserved(self.device) - reserved

    def _can_record(self) -> bool:
        # Any other attention asks for the slices' lengths on the host.
        config = self.tower.encoder.config
        head_dim = config.hidden_size // config.num_attention_heads
        head = torch.empty(0, 1, head_dim, dtype=self.dtype, device=self.device)
        return (
            self._cuda_graphs
            and ops.choice() != "reference"
            and (ops.has_flash_attention(head) or ops.varlen_kernel(head) is not None)
        )

    def _forward(self, patches: Tensor, packing: Packing) -> Tensor:
        return self.tower(self.normalize(patches), packing)

    def _timed(self, slices: Sequence[Slice], into: Sequence[Tensor]) -> float:
        began = time.monotonic()
        self.encode_slices(slices, into)
        return time.monotonic() - began

    def _normalized(self, patches: Tensor) -> Tensor:
        channels = patches.float().unflatten(1, (3, -1))
        return ((channels / 255 - self._mean) / self._std).flatten(1).to(self.dtype)

    def _packing(self, sizes: Sizes) -> Packing:
        packing = self._packings.pop(sizes, None) or self.tower.encoder.packing(sizes)
        self._packings[sizes] = packing
        if len(self._packings) > _PACKINGS:
            self._packings.popitem(last=False)
        return packing

    def _packed(self, slices: Sequence[Slice]) -> Tensor:
        if self._stream is None and len(slices) == 1:
            return torch.from_numpy(slices[0].patches)
        rows = sum(len(piece.patches) for piece in slices)
        packed = torch.empty((rows, self._columns), dtype=torch.uint8, device=self.device)
        self._copy(slices, packed)
        return packed

    def _copy(self, slices: Sequence[Slice], room: Tensor) -> None:
        start = 0
        for piece in slices:
            end = start + len(piece.patches)
            # From pinned memory the device takes it while this thread goes on.
            room[start:end].copy_(torch.from_numpy(piece.patches), non_blocking=True)
            start = end

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield


def slices_of(pixels: Pixels) -> list[Slice]:
    """Take a picture's slices apart; they share its memory."""
    ends = np.cumsum([rows * columns for rows, columns in pixels.tgt_sizes])
    parts = np.split(pixels.patches, ends[:-1])
    return [Slice(patches, tgt_size) for patches, tgt_size in zip(parts, pixels.tgt_sizes, strict=True)]
