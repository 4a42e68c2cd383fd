"""What a process does about a device's memory while it serves: a bound for what waits there, and running out of it."""

from __future__ import annotations

import ctypes
import logging
import queue
import weakref
from collections import deque
from typing import TypeVar

import torch
from torch import Tensor

from foveate.errors import Overloaded

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_RETRY_SECONDS = 1.0
_IDLE_SECONDS = 2.0

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # Of malloc.h.
_HEAPS = 2
_LARGE_BYTES = 2**20


class Room:
    """A bound for the tensors of one kind that live on a device at once; what goes beyond it lives on the host.

    For use by one thread; the tensors may be dropped by any.

    Args:
        device: where.
        num_bytes: most bytes of them there.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.device = device
        self.num_bytes = num_bytes
        self._used = 0
        # What a finalizer interrupts may be the arithmetic on the sum itself, so it leaves a note instead.
        self._dropped: deque[int] = deque()

    @property
    def used(self) -> int:
        """Bytes of the tensors that are alive on the device."""
        while self._dropped:
            self._used -= self._dropped.popleft()
        return self._used

    def device_for(self, num_bytes: int) -> torch.device:
        """Say where a tensor of some bytes should be."""
        return self.device if self.used + num_bytes <= self.num_bytes else torch.device("cpu")

    def count(self, tensor: Tensor) -> Tensor:
        """Count a new tensor for as long as it or a view of it lives, if it is on the device, and return it."""
        if tensor.device.type == self.device.type:
            self._used += tensor.nbytes
            # In inference mode a view keeps the storage alive, and not the tensor.
            weakref.finalize(tensor.untyped_storage(), self._dropped.append, tensor.nbytes).atexit = False
        return tensor


def trim_heap() -> None:
    """Have the C library give back to the system what the process has freed; others than glibc do that by themselves.

    Steps of all sizes leave holes between what is still in use: hundreds of megabytes, after a few large pictures.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def use_few_heaps() -> None:
    """Have glibc keep two heaps for all threads, and give large blocks back at once; call it before threads start.

    Left alone it has a heap for each thread, and after a large block was freed it takes the next from a heap, in which
    whatever is small then stands in the way: an encoder on a CPU grew from 0.4 to 1.2 GiB over 5,000 pictures.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_M_ARENA_MAX, _HEAPS)
        option(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def wait_idly(items: queue.SimpleQueue[T]) -> T:
    """Return the next item of a queue; if none comes for a while, give free memory back and go on waiting.

    Not earlier: the next step would want the memory again.
    """
    try:
        return items.get(timeout=_IDLE_SECONDS)
    except queue.Empty:
        trim_heap()
        return items.get()


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether a step failed for lack of memory, after which the device works on.

    Allocations outside of PyTorch's own, such as a CUDA graph's, report it as an error of the device.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) == _OUT_OF_MEMORY


def make_room(device: torch.device) -> Overloaded:
    """Give back what PyTorch keeps for later and nobody uses, and return the error for those whose step failed.

    Outside of the ``except`` block: the exception keeps the failed step's tensors alive.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        logger.warning("%s ran out of memory; now %d of %d MiB are free", device, free >> 20, total >> 20)
    return Overloaded(f"{device} ran out of memory for this request; try again", retry_after=_RETRY_SECONDS)
