"""What a KV cache holds: keys and values in the model's type, or in 8 bits without what 8 bits cannot hold.

An 8-bit float (e4m3) has 3 bits behind its first one, so a number is off by up to a 16th of itself. Qwen2's keys have a
bias of hundreds in some channels, around which they differ by a few units: a 16th of that bias is more than all that
tells one key from another, with any scale. But the bias is known. It is left out of 8-bit keys before they are rotated,
and comes back, rotated by the key's position, where they are read: by a sum in the key, or by its product with the
query in the score. That takes no calibration, and what is rounded is as small as in a model without biases.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
"""448. What is larger becomes this: it would be no number otherwise."""


class KeyOffset(NamedTuple):
    """What is left out of one layer's keys.

    Attributes:
        bias: [kv_heads * head_dim], of every key before it is rotated.
        angles: [positions, head_dim], cosines and then sines of as many positions as a block table has room for, of
            the model's type.
    """

    bias: Tensor
    angles: Tensor


def stored(x: Tensor, cache: Tensor) -> Tensor:
    """Round ``x`` to the type of ``cache``, to the nearest number that it has."""
    return (x.float().clamp(-FP8_MAX, FP8_MAX) if cache.dtype == FP8 else x).to(cache.dtype)


def raw(cache: Tensor) -> Tensor:
    """Return 8-bit floats as bytes, which every operation that only moves them can take; anything else as it is."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache
