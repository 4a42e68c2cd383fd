"""What the service takes of its machine: the GPUs, as their driver tells, and its own processes."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psutil
import pynvml

_CHILDREN = {"foveate.worker": "engine", "foveate.vision.process": "vision"}
_PERCENT = 100
_lock = threading.Lock()


class Gpu(NamedTuple):
    """One GPU now. What its driver does not tell is None.

    Attributes:
        number: the driver's number for it, in the order of the bus; CUDA's own may differ.
        name: of the product.
        utilization: part of the driver's last sampling period in which anything ran on it, 0 to 1.
        used_bytes: memory that any process has.
        total_bytes: all of its memory.
    """

    number: int
    name: str
    utilization: float | None
    used_bytes: int | None
    total_bytes: int | None


class ProcessUse(NamedTuple):
    """One of the service's processes on this machine: ``api``, ``engine`` or ``vision``."""

    name: str
    cpu_seconds: float
    resident_bytes: int


def gpus() -> list[Gpu]:
    """Return every GPU that the driver shows this process; none without a driver. Takes milliseconds."""
    with _lock, contextlib.suppress(pynvml.NVMLError):
        return [_gpu(index) for index in range(_count())]
    return []


@functools.cache
def _count() -> int:
    """Begin to talk to the driver, once; a machine without one is not asked again."""
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


def _gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    # Parts of a GPU have no utilization of their own, and some share the host's memory.
    busy = _if_told(pynvml.nvmlDeviceGetUtilizationRates, handle)
    memory = _if_told(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return Gpu(
        index,
        str(pynvml.nvmlDeviceGetName(handle)),
        None if busy is None else busy.gpu / _PERCENT,
        None if memory is None else int(memory.used),
        None if memory is None else int(memory.total),
    )


def _if_told(ask: Callable[[Any], Any], handle: Any) -> Any:
    with contextlib.suppress(pynvml.NVMLError):
        return ask(handle)
    return None


def processes() -> list[ProcessUse]:
    """Return this process, which is the API's, and those of its children that run a part of the service."""
    return list(_processes())


def _processes() -> Iterator[ProcessUse]:
    own = psutil.Process()
    for process in (own, *own.children()):
        with contextlib.suppress(psutil.Error):
            command = [] if process == own else process.cmdline()
            name = "api" if process == own else next((_CHILDREN[word] for word in command if word in _CHILDREN), None)
            if name is not None:
                times = process.cpu_times()
                yield ProcessUse(name, times.user + times.system, process.memory_info().rss)
