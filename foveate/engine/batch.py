"""A scheduled step as tensors: which token goes where, what it sees, and which rows are sampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.engine.scheduler import ScheduledBatch, ScheduledSeq
from foveate.engine.state import state_of
from foveate.kernels import ops


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Rows [start, end) of the batch are a chunk of one prompt, after ``num_cached`` earlier tokens of it."""

    start: int
    end: int
    num_cached: int
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """The model's input. Decodes come first, one row each, then the chunks of prompts.

    Attributes:
        token_ids, positions, slots: [tokens].
        pictures: (rows, embeddings) that replace the embedding of the tokens in those rows.
        num_decodes: rows of decodes.
        block_tables: [decodes, longest].
        mask: see :func:`foveate.kernels.reference.paged_decode_attention`.
        prefills: the other rows.
        sample_rows: [samples], rows whose next token is chosen.
        samples: the scheduled items of those rows, in the same order.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    pictures: list[tuple[Tensor, Tensor]]
    num_decodes: int
    block_tables: Tensor
    mask: Tensor | None
    prefills: list[PrefillChunk]
    sample_rows: Tensor
    samples: list[ScheduledSeq]


def build(scheduled: ScheduledBatch, block_size: int, device: torch.device) -> Batch:
    """Lay out a step's tokens and copy what the model needs to ``device``."""
    decodes = [item for item in scheduled.items if item.num_tokens == 1]
    chunks = [item for item in scheduled.items if item.num_tokens > 1]
    items = decodes + chunks
    ids: list[int] = []
    positions, slots, pictures, prefills, rows = [], [], [], [], []
    for item in items:
        first, end = item.start, item.start + item.num_tokens
        table = np.array(item.seq.block_table, dtype=np.int64)
        places = np.arange(first, end)
        pictures += _picture_rows(item, len(ids), device)
        if item.num_tokens > 1:
            used = torch.from_numpy(table[: -(-end // block_size)]).to(device)
            prefills.append(PrefillChunk(len(ids), len(ids) + item.num_tokens, first, used))
        ids += item.seq.token_ids[first:end]
        positions.append(places)
        slots.append(table[places // block_size] * block_size + places % block_size)
        if item.samples:
            rows.append(len(ids) - 1)
    tables, mask = _decode_tables(decodes, block_size)
    return Batch(
        token_ids=torch.tensor(ids, device=device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        slots=torch.from_numpy(np.concatenate(slots)).to(device),
        pictures=pictures,
        num_decodes=len(decodes),
        block_tables=tables.to(device),
        mask=None if mask is None else mask.to(device),
        prefills=prefills,
        sample_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        samples=[item for item in items if item.samples],
    )


def _picture_rows(item: ScheduledSeq, row: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    state = state_of(item.seq)
    if state.embeddings is None:
        return []
    first, last = np.searchsorted(state.image_positions, (item.start, item.start + item.num_tokens))
    if first == last:
        return []
    rows = torch.from_numpy(state.image_positions[first:last] - item.start + row)
    return [(rows.to(device), state.embeddings[first:last])]


def _decode_tables(decodes: list[ScheduledSeq], block_size: int) -> tuple[Tensor, Tensor | None]:
    lengths = np.array([item.start + 1 for item in decodes], dtype=np.int64)
    longest = int(-(-lengths.max(initial=0) // block_size))
    tables = np.zeros((len(decodes), longest), dtype=np.int64)
    for row, item in enumerate(decodes):
        used = item.seq.block_table[: -(-(item.start + 1) // block_size)]
        tables[row, : len(used)] = used
    if not decodes or (lengths == longest * block_size).all():
        return torch.from_numpy(tables), None
    mask = np.arange(longest * block_size) < lengths[:, None]
    return torch.from_numpy(tables), torch.from_numpy(mask)[:, None, None]


class PagedAttention:
    """How the rows of one batch attend, and where their keys and values are kept (an ``Attend`` of the model)."""

    def __init__(self, batch: Batch, kv_cache: Tensor) -> None:
        self._batch = batch
        self._kv_cache = kv_cache

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[tokens, heads, head_dim], in the order of the batch's rows."""
        batch = self._batch
        key_cache, value_cache = self._kv_cache[layer].unbind(0)
        # The whole step's keys come first: sequences of one step may share blocks.
        ops.write_kv(key_cache, value_cache, key, value, batch.slots)
        outputs = []
        if batch.num_decodes:
            outputs.append(
                ops.paged_decode_attention(
                    query[: batch.num_decodes], key_cache, value_cache, batch.block_tables, batch.mask
                )
            )
        outputs += [
            ops.paged_prefill_attention(
                query[chunk.start : chunk.end], key_cache, value_cache, chunk.block_table, chunk.num_cached
            )
            for chunk in batch.prefills
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
