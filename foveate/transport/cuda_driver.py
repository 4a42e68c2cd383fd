"""The few calls of CUDA's driver that PyTorch does not offer: pinning mapped memory, and memory for other processes.

The driver rather than the runtime: its library is there wherever a GPU is, under one name, and a failing call leaves no
error behind that PyTorch's next kernel launch would report as its own.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from foveate.errors import Unavailable

_REGISTER_PORTABLE = 0x01
_REGISTER_READ_ONLY = 0x08
_LAZY_PEER_ACCESS = 0x01
_HANDLE_BYTES = 64


class _IpcMemHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


def pin(address: int, num_bytes: int, device: torch.device, *, read_only: bool) -> None:
    """Keep mapped memory in place, so that the GPU copies to and from it by itself.

    Raises:
        Unavailable: CUDA refuses (not every system can pin memory that is mapped for reading only).
    """
    flags = _REGISTER_PORTABLE | (_REGISTER_READ_ONLY if read_only else 0)
    with _context(device):
        _call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_uint(flags))


def unpin(address: int, device: torch.device) -> None:
    """Undo :func:`pin`."""
    with _context(device):
        _call("cuMemHostUnregister", ctypes.c_void_p(address))


def allocate(num_bytes: int, device: torch.device) -> int:
    """Allocate GPU memory of its own (no part of PyTorch's pools, which would be exported whole); return its address.

    Raises:
        Unavailable: there is not enough.
    """
    address = ctypes.c_uint64()
    with _context(device):
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
    return address.value


def free(address: int, device: torch.device) -> None:
    """Give back what :func:`allocate` returned."""
    with _context(device):
        _call("cuMemFree_v2", ctypes.c_uint64(address))


def export_memory(address: int, device: torch.device) -> bytes:
    """Name allocated memory for other processes on the same GPU."""
    handle = _IpcMemHandle()
    with _context(device):
        _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
    return bytes(handle)


def open_memory(exported: bytes, device: torch.device) -> int:
    """Map another process's memory; return its address here.

    Raises:
        Unavailable: it cannot be mapped: another GPU, its process is gone, or CUDA does not allow it here.
    """
    if len(exported) != _HANDLE_BYTES:
        raise Unavailable(f"a GPU memory handle has {len(exported)} bytes, not {_HANDLE_BYTES}")
    handle = _IpcMemHandle.from_buffer_copy(exported)
    address = ctypes.c_uint64()
    with _context(device):
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
    return address.value


def close_memory(address: int, device: torch.device) -> None:
    """Undo :func:`open_memory`."""
    with _context(device):
        _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


class DeviceMemory:
    """GPU memory at an address, in the form in which PyTorch takes it over without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }

    def tensor(self, device: torch.device) -> torch.Tensor:
        """See it as uint8 [num_bytes]; the memory must outlive the tensor."""
        return torch.as_tensor(self, device=device)


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"CUDA's driver is not there: {error}") from error
    driver.cuInit(0)
    return driver


def _call(name: str, *args: Any) -> None:
    driver = _driver()
    code = getattr(driver, name)(*args)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(text))
        raise Unavailable(f"{name} failed: {(text.value or b'error').decode()} ({code})")


@functools.cache
def _primary_context(ordinal: int) -> ctypes.c_void_p:
    """The context that PyTorch uses too; kept for the life of the process, as PyTorch does."""
    device = ctypes.c_int()
    context = ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


@contextmanager
def _context(device: torch.device) -> Iterator[None]:
    """Make the device's context current on this thread, whatever PyTorch has made current so far."""
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    _call("cuCtxPushCurrent_v2", _primary_context(ordinal))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
