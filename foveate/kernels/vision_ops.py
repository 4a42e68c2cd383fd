"""The vision encoder's own operations: one signature each, beside what runs where there are no kernels for it.

Kernels run on a CUDA device unless ``foveate.kernels.ops`` was told to take the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.kernels import ops, reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Packed sequences.

    Attributes:
        known: tokens of each, at least one sequence; None if only the device knows, where they may be 0 too.
        offsets: int32 [sequences + 1] on the device, where each begins, and the end of the last.
        longest: tokens of the longest, or more.
    """

    known: tuple[int, ...] | None
    offsets: Tensor
    longest: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each. Waits for the device if they are not known, so not while a CUDA graph is captured."""
        return tuple(self.offsets.diff().tolist()) if self.known is None else self.known

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Sequences:
        """Describe sequences of known lengths. Copies from the host, so not while a CUDA graph is captured."""
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
        return cls(tuple(lengths), offsets, max(lengths))

    @classmethod
    def even(cls, count: int, length: int, device: torch.device) -> Sequences:
        """Describe ``count`` sequences of one length. Copies nothing."""
        end = count * length + 1
        return cls((length,) * count, torch.arange(0, end, length, dtype=torch.int32, device=device), length)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize ``x`` [..., hidden] by mean and variance in float32, scale by ``weight`` [hidden], add ``bias``."""
    if (kernel := _kernel("vision", "layer_norm", x)) is not None:
        return kernel(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, and normalize the sum as :func:`layer_norm` does.

    Args:
        x: [..., hidden].
        residual: the shape and type of ``x``.
        weight: [hidden].
        bias: [hidden].
        eps: added to the variance.

    Returns:
        the normalized sum and the sum, both of the shape and type of ``x``
    """
    if (kernel := _kernel("vision", "add_layer_norm", x)) is not None:
        return kernel(x, residual, weight, bias, eps)
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def layer_norm_positions(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, table: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalize patches as :func:`layer_norm` does, and add to each the embedding of its place.

    Args:
        x: [patches, hidden].
        weight: [hidden].
        bias: [hidden].
        eps: added to the variance.
        table: [longest, hidden / 2], the embedding of a place along one axis, of the type of ``x``.
        places: int32 [2, patches], each patch's column, which the first half of its embedding stands for, and its row.

    Returns:
        what is normalized, and its sum with the embeddings, both of the shape and type of ``x``
    """
    if (kernel := _kernel("vision", "layer_norm_positions", x)) is not None:
        return kernel(x, weight, bias, eps, table, places)
    normed = F.layer_norm(x, weight.shape, weight, bias, eps)
    return normed, normed + table[places].transpose(0, 1).flatten(1)


def normalize_pixels(pixels: Tensor, values: Tensor) -> Tensor:
    """Look up what each pixel of packed patches is to the encoder.

    Args:
        pixels: uint8 [patches, 3 * size], channel first.
        values: [3, 256], for each channel and pixel.

    Returns:
        [patches, 3 * size] of the type of ``values``
    """
    if (kernel := _kernel("vision", "normalize_pixels", pixels)) is not None:
        return kernel(pixels, values)
    channel = torch.arange(3, device=pixels.device).repeat_interleave(pixels.shape[1] // 3) * 256
    return values.flatten()[pixels + channel]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, in its tanh form, of a linear layer: [rows, in] → [rows, out]."""
    if x.is_cuda and _allowed():
        # One kernel: cuBLASLt's epilogue, which is the tanh form. Elsewhere this operation has the other one.
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, queries: Sequences, keys: Sequences) -> Tensor:
    """Full attention within each of several packed sequences.

    Args:
        query: [tokens, heads, head_dim], as ``queries`` says.
        key: [tokens, heads, head_dim], as ``keys`` says.
        value: the shape of ``key``.
        queries: each sequence's part of ``query``.
        keys: each sequence's part of ``key`` and ``value``.

    Returns:
        [tokens, heads, head_dim], the shape of ``query``
    """
    if (kernel := ops.varlen_kernel(query)) is not None:
        return kernel(query, key, value, queries.offsets, keys.offsets, queries.longest)
    if not ops.has_flash_attention(query):
        return reference.varlen_attention(query, key, value, queries.lengths, keys.lengths)
    # What torch.nn.attention.varlen does, without the tenth of a millisecond that it takes to call.
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, queries.offsets, keys.offsets, queries.longest, keys.longest, 0.0, False, False
    )[0]
    return attended


def resize_kernels(device: torch.device) -> ModuleType | None:
    """Return :mod:`foveate.kernels.triton.vision_resize`, if it can run on a device."""
    return _module("vision_resize") if device.type == "cuda" and _allowed() else None


def _kernel(module: str, name: str, like: Tensor) -> Callable[..., Any] | None:
    if not like.is_cuda or not _allowed():
        return None
    found = _module(module)
    return None if found is None else getattr(found, name)


def _allowed() -> bool:
    return ops.choice() != "reference"


@cache
def _module(name: str) -> ModuleType | None:
    if torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        return import_module(f"{__package__}.triton.{name}")
    except ImportError as error:
        logger.warning("the vision encoder runs as plain PyTorch: %s", error)
        return None
