"""How bytes get into an arena and out of it: from and to the CPU's memory, or a GPU's through pinned memory."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foveate.errors import Unavailable
from foveate.transport import cuda_driver

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]


class Writer(Protocol):
    """Where an encoder's rows go."""

    def write(self, start: int, rows: Tensor) -> None:
        """Copy uint8 [num_bytes] from any device to a place in bytes; the copy is complete on return.

        Raises:
            Unavailable: it is closed.
        """
        ...

    def close(self, *, in_use: bool) -> None:
        """Give back what nobody needs; ``in_use`` says that readers may still have it mapped. No write follows."""
        ...


class Reader(Protocol):
    """Where an engine's rows come from."""

    outlives_writer: bool
    """Whether the memory can be read after its writer's death."""

    def copy(self, start: int, num_bytes: int) -> Tensor:
        """Copy bytes from a place into a new uint8 [num_bytes] on the engine's device; complete on return."""
        ...

    def close(self) -> None:
        """Give the mapping back. No copy follows."""
        ...


class HostWriter:
    """Writes into mapped memory; from a GPU without a detour, if the memory can be pinned.

    Args:
        data: the arena's bytes.
        device: where the encoder's rows usually are.
    """

    def __init__(self, data: Bytes, device: torch.device) -> None:
        self._data = data
        self._device = device
        self._pinned = device.type == "cuda" and _pin(data, device, read_only=False)
        self._lock = threading.Lock()

    def write(self, start: int, rows: Tensor) -> None:
        """Copy rows, as the current stream of this thread leaves them."""
        if rows.device.type == "cpu":
            np.copyto(self._target(start, rows.numel()), rows.numpy())
            return
        # The lock keeps the memory pinned until the copy is complete.
        with self._lock, torch.cuda.device(rows.device):
            torch.from_numpy(self._target(start, rows.numel())).copy_(rows, non_blocking=True)
            torch.cuda.current_stream().synchronize()

    def close(self, *, in_use: bool) -> None:
        """Unpin."""
        with self._lock:
            if self._pinned:
                _unpin(self._data, self._device)
            self._pinned = False
            self._data = np.empty(0, np.uint8)

    def _target(self, start: int, num_bytes: int) -> Bytes:
        target = self._data[start : start + num_bytes]
        if target.size != num_bytes:
            raise Unavailable("the encoder's arena is closed")
        return target


class HostReader:
    """Reads mapped memory into the CPU's."""

    outlives_writer = True

    def __init__(self, data: Bytes) -> None:
        self._data = data

    def copy(self, start: int, num_bytes: int) -> Tensor:
        """Copy, in one piece."""
        out = torch.empty(num_bytes, dtype=torch.uint8)
        np.copyto(out.numpy(), self._data[start : start + num_bytes])
        return out

    def close(self) -> None:
        """Drop the mapping."""
        self._data = np.empty(0, np.uint8)


class DeviceReader:
    """Reads into a GPU's memory, on a stream of its own, so that it waits for nothing that the model still computes.

    Args:
        source: uint8 [size], on the host or on the device.
        device: the engine's.
        written: recorded by the writer after each write, if it writes on a GPU.
    """

    outlives_writer = True

    def __init__(self, source: Tensor, device: torch.device, written: torch.cuda.Event | None = None) -> None:
        self._source = source
        self._device = device
        self._written = written
        self._stream = torch.cuda.Stream(device)

    def copy(self, start: int, num_bytes: int) -> Tensor:
        """Copy, and wait for it."""
        with torch.cuda.stream(self._stream):
            # Memory of this stream's own: what other streams' queued kernels still use is never overwritten.
            out = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            if self._written is not None:
                self._stream.wait_event(self._written)
            out.copy_(self._source[start : start + num_bytes], non_blocking=True)
        self._stream.synchronize()
        out.record_stream(torch.cuda.current_stream(self._device))
        return out

    def close(self) -> None:
        """Drop the source."""
        self._source = torch.empty(0, dtype=torch.uint8)


class PinnedReader(DeviceReader):
    """Reads mapped memory into a GPU's; asynchronously, if the mapping can be pinned."""

    def __init__(self, data: Bytes, device: torch.device) -> None:
        self._data = data
        self._pinned = _pin(data, device, read_only=True)
        with warnings.catch_warnings():
            # PyTorch has no read-only tensors and says so; nothing writes to this one.
            warnings.simplefilter("ignore", UserWarning)
            source = torch.from_numpy(data)
        super().__init__(source, device)

    def close(self) -> None:
        """Unpin and drop the mapping."""
        if self._pinned:
            _unpin(self._data, self._device)
        self._pinned = False
        self._data = np.empty(0, np.uint8)
        super().close()


def host_reader(data: Bytes, device: torch.device) -> Reader:
    """Choose how an engine on this device reads mapped memory."""
    return PinnedReader(data, device) if device.type == "cuda" else HostReader(data)


def _pin(data: Bytes, device: torch.device, *, read_only: bool) -> bool:
    try:
        cuda_driver.pin(data.ctypes.data, data.nbytes, device, read_only=read_only)
    except Unavailable as error:
        logger.warning("the arena's memory is not pinned, so copies take longer: %s", error.message)
        return False
    return True


def _unpin(data: Bytes, device: torch.device) -> None:
    try:
        cuda_driver.unpin(data.ctypes.data, device)
    except Unavailable as error:
        logger.warning("the arena's memory stays pinned: %s", error.message)
