"""An arena's data in one GPU's memory, for an encoder and an engine that share the GPU.

States, generations and leases are those of :mod:`foveate.transport.arena`, in host memory: the writer changes a block's
word before it starts to copy into the block, and the reader's last look at the word comes after its copy has finished,
so the same check holds.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from foveate.errors import Unavailable
from foveate.transport import cuda_driver
from foveate.transport.memory import DeviceReader
from foveate.transport.wire import CudaExport


class CudaWriter:
    """GPU memory that an encoder writes and other processes read.

    Args:
        num_bytes: its size.
        device: the GPU.

    Raises:
        Unavailable: it cannot be allocated or exported.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._address = cuda_driver.allocate(num_bytes, device)
        try:
            self._data = cuda_driver.DeviceMemory(self._address, num_bytes).tensor(device)
            with torch.cuda.device(device):
                self._written = torch.cuda.Event(interprocess=True)
                self.export = CudaExport(
                    memory=cuda_driver.export_memory(self._address, device),
                    event=bytes(self._written.ipc_handle()),
                )
        except RuntimeError as error:
            cuda_driver.free(self._address, device)
            raise Unavailable(f"the GPU's memory cannot be shared: {error}") from error
        except Unavailable:
            cuda_driver.free(self._address, device)
            raise

    def write(self, start: int, rows: Tensor) -> None:
        """Copy rows, as the current stream of this thread leaves them."""
        # One at a time: the event tells of one stream only.
        with self._lock, torch.cuda.device(self._device):
            target = self._data[start : start + rows.numel()]
            if target.numel() != rows.numel():
                raise Unavailable("the encoder's arena is closed")
            target.copy_(rows, non_blocking=True)
            self._written.record()
            self._written.synchronize()

    def close(self, *, in_use: bool) -> None:
        """Free the memory; while readers have it mapped that is undefined, and only the process's end gives it back."""
        with self._lock:
            self._data = torch.empty(0, dtype=torch.uint8)
            if self._address and not in_use:
                cuda_driver.free(self._address, self._device)
            self._address = 0


class CudaReader(DeviceReader):
    """Another process's GPU memory.

    CUDA does not promise that memory can be read once the process that shared it is gone, and a fault there would end
    every request of this one: rows that were not read by then are lost.

    Args:
        export: what the writer shares.
        num_bytes: its size.
        device: the GPU, the same one.

    Raises:
        Unavailable: it cannot be opened here.
    """

    outlives_writer = False

    def __init__(self, export: CudaExport, num_bytes: int, device: torch.device) -> None:
        self._address = cuda_driver.open_memory(export.memory, device)
        try:
            data = cuda_driver.DeviceMemory(self._address, num_bytes).tensor(device)
            written = torch.cuda.Event.from_ipc_handle(device, export.event)
        except RuntimeError as error:
            cuda_driver.close_memory(self._address, device)
            raise Unavailable(f"the encoder's GPU memory cannot be used: {error}") from error
        super().__init__(data, device, written)

    def close(self) -> None:
        """Unmap the memory."""
        super().close()
        self._written = None
        if self._address:
            cuda_driver.close_memory(self._address, self._device)
        self._address = 0
