"""Several packed conversations as one batch, and who sees whom in it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 4


def join(batches: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Put worker batches one after another on the device."""
    offsets = {"image_rows": 0, "answering": 0, "turns": 0}
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        for name, value in batch.items():
            if isinstance(value, Tensor):
                columns[name].append(value.to(device, non_blocking=True) + offsets.get(name, 0))
        offsets["image_rows"] += len(batch["token_ids"])
        offsets["answering"] += len(batch["token_ids"])
        offsets["turns"] += len(batch["categories"])
    lists = {name: [one for batch in batches for one in batch[name]] for name in ("lengths", "tgt_sizes", "categories")}
    return {name: torch.cat(values) for name, values in columns.items()} | lists


class SegmentAttention:
    """Causal attention in packed conversations, in which a segment sees the common beginning and itself.

    Conversations are padded here only, in ``GROUPS`` groups of similar length.
    """

    def __init__(self, lengths: list[int], segments: Tensor, positions: Tensor) -> None:
        device = segments.device
        total = sum(lengths)
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = -(-len(order) // GROUPS)
        segments = F.pad(segments, (0, 1), value=-1)
        positions = F.pad(positions, (0, 1))
        self._groups: list[tuple[Tensor, Tensor]] = []
        tokens = []
        for chosen in (order[first : first + size] for first in range(0, len(order), size)):
            own = torch.tensor([lengths[index] for index in chosen])[:, None]
            # The fused kernels want rows of the mask to be multiples of 16 bytes.
            columns = torch.arange(-(-int(own.max()) // 8) * 8)
            index = torch.where(columns < own, starts[chosen][:, None] + columns, total).to(device)
            segment, position = segments[index], positions[index]
            seen = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
            seen &= position[:, None, :] <= position[:, :, None]
            # A row of padding sees the other padding: a row that sees nothing would be NaN.
            self._groups.append((index, torch.where(seen, 0.0, -torch.inf).to(torch.bfloat16)[:, None]))
            tokens.append(index[index != total])
        self._inverse = torch.cat(tokens).argsort()
        self._total = total

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[tokens, heads, head_dim], in the order of the tokens."""
        repeats = query.shape[1] // key.shape[1]
        padded = [F.pad(tensor, (0, 0, 0, 0, 0, 1)) for tensor in (query, key, value)]
        outputs = []
        for index, mask in self._groups:
            q, k, v = (tensor[index].transpose(1, 2) for tensor in padded)
            k, v = (tensor.repeat_interleave(repeats, 1) for tensor in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype)).transpose(1, 2)
            outputs.append(attended[index != self._total])
        return torch.cat(outputs)[self._inverse]
