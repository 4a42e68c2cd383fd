"""How a model's weights are stored: the choice, without any arithmetic. Nothing here needs torch."""

from __future__ import annotations

from typing import Literal

import msgspec

Method = Literal["none", "int8", "fp8", "int4"]

GROUP_SIZE = 128
"""Input columns that share a scale in int4, unless a checkpoint says otherwise."""


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """What is quantized, and how.

    Attributes:
        method: ``int8``: weights only, symmetric, a scale for each output row. ``fp8``: e4m3 weights with a scale for
            each output row. ``int4``: weights only, a scale (and zero point) for each group of input columns.
        group_size: columns of a group; only int4 has groups.
        vision: whether the vision encoder's linear layers are quantized as well as the language model's.
        keep: linear layers, by our names or parts of them, that stay as they are.
    """

    method: Method = "none"
    group_size: int = GROUP_SIZE
    vision: bool = False
    keep: tuple[str, ...] = ()
