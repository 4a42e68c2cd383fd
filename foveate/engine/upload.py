"""Arrays of the host on the device: all of a step's in one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Tensors = dict[str, Tensor]

_ALIGNMENT = 16
"""Bytes: where every array may begin, whatever its type, and aligned for a kernel's widest loads."""

_TYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}


def upload(*groups: Mapping[str, Array], device: torch.device, into: Tensor | None = None) -> list[Tensors]:
    """Copy arrays to the device, in the order of its stream and without waiting for it.

    Args:
        groups: arrays of one dimension, by name. On a CPU the tensors may be their memory: leave them alone afterwards.
        device: where to.
        into: uint8 [bytes] there, to be filled from its beginning; None for memory of its own. For arrays of the same
            types and lengths, in the same order, the tensors are at the same places.

    Returns:
        for each group, a tensor for each array, by its name
    """
    if device.type == "cpu" and into is None:
        return [{name: torch.from_numpy(array) for name, array in group.items()} for group in groups]
    arrays = [array for group in groups for array in group.values()]
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    # PyTorch gives pinned memory to somebody else only when the copy from it is over.
    staged = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = staged.numpy()
    for start, array in zip(starts, arrays, strict=True):
        host[start : start + array.nbytes] = array.view(np.uint8)
    target = torch.empty(end, dtype=torch.uint8, device=device) if into is None else into[:end]
    target.copy_(staged, non_blocking=True)
    tensors = iter(
        target[start : start + array.nbytes].view(_TYPES[array.dtype.type])
        for start, array in zip(starts, arrays, strict=True)
    )
    return [{name: next(tensors) for name in group} for group in groups]
