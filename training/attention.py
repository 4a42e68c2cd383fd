"""Several packed conversations as one batch, and who sees whom in it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 4


def join(batches: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Put worker batches one after another on the device."""
    offsets = {"image_rows": 0, "answering": 0, "turns": 0, "labelled": 0}
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        for name, value in batch.items():
            if isinstance(value, Tensor):
                columns[name].append(value.to(device, non_blocking=True) + offsets.get(name, 0))
        offsets["image_rows"] += len(batch["token_ids"])
        offsets["answering"] += len(batch["token_ids"])
        offsets["turns"] += len(batch["categories"])
        offsets["labelled"] += len(batch["patches"])
    lists = {name: [one for batch in batches for one in batch[name]] for name in ("lengths", "tgt_sizes", "categories")}
    return {name: torch.cat(values) for name, values in columns.items()} | lists


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for what it is doing."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class SegmentAttention:
    """Causal attention in packed conversations, in which a segment sees the common beginning and itself.

    Conversations are padded here only, in ``GROUPS`` groups of similar length.
    """

    def __init__(self, lengths: list[int], segments: Tensor, positions: Tensor) -> None:
        device = segments.device
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = -(-len(order) // GROUPS)
        self._groups: list[_Group] = []
        for chosen in (order[first : first + size] for first in range(0, len(order), size)):
            own = torch.tensor([lengths[index] for index in chosen])[:, None]
            # The fused kernels want rows of the mask to be multiples of 16 bytes.
            columns = torch.arange(-(-int(own.max()) // 8) * 8)
            inside = columns < own
            tokens = (starts[chosen][:, None] + columns)[inside]
            slots = inside.flatten().nonzero().squeeze(1)
            tokens, slots = moved(tokens, device), moved(slots, device)
            shape = (len(chosen), len(columns))
            segment = _padded(segments, tokens, slots, shape, -1)
            position = _padded(positions, tokens, slots, shape, 0)
            seen = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
            seen &= position[:, None, :] <= position[:, :, None]
            # A row of padding sees the other padding: a row that sees nothing would be NaN.
            mask = torch.zeros(seen.shape, dtype=torch.bfloat16, device=device).masked_fill_(~seen, -torch.inf)[:, None]
            self._groups.append(_Group(tokens, slots, shape, mask))
        self._inverse = torch.cat([group.tokens for group in self._groups]).argsort()

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[tokens, heads, head_dim], in the order of the tokens."""
        repeats = query.shape[1] // key.shape[1]
        outputs = []
        for group in self._groups:
            q, k, v = (
                _padded(tensor, group.tokens, group.slots, group.shape, 0).transpose(1, 2)
                for tensor in (query, key, value)
            )
            k, v = (tensor.repeat_interleave(repeats, 1) for tensor in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask.to(q.dtype)).transpose(1, 2)
            outputs.append(attended.flatten(0, 1).index_select(0, group.slots))
        return torch.cat(outputs).index_select(0, self._inverse)


class _Group(NamedTuple):
    """Conversations of similar length: which tokens, where each goes in [conversations, longest], who sees whom."""

    tokens: Tensor
    slots: Tensor
    shape: tuple[int, int]
    mask: Tensor


def _padded(tensor: Tensor, tokens: Tensor, slots: Tensor, shape: tuple[int, int], filler: int) -> Tensor:
    # Every index is there once, so that the gradients are copies too: repeated ones would be summed one by one.
    flat = tensor.new_full((shape[0] * shape[1], *tensor.shape[1:]), filler)
    return flat.index_copy(0, slots, tensor.index_select(0, tokens)).unflatten(0, shape)
