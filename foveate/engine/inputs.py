"""What a step reads on the device, and how its rows attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.kernels import ops
from foveate.kernels.kv_cache import KeyOffset


@dataclass(frozen=True, slots=True)
class EmbeddingInputs:
    """What makes the input embeddings, and brings the block tables up to date.

    Attributes:
        table_places, table_blocks: int64 and int32, what changes in ``Rows.tables``, seen as one row.
        token_ids: int64, of the chunks; missing if there is none.
        picture_places: int64, tokens whose embeddings are replaced by pictures' rows; missing if there are none.
    """

    table_places: Tensor
    table_blocks: Tensor
    token_ids: Tensor | None = None
    picture_places: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What the layers need to know of the tokens. Without chunks, everything behind ``slots`` is missing.

    Attributes:
        rows: int64 [decodes], each one's row of :class:`foveate.engine.rows.Rows`.
        lengths: int32 [decodes], tokens of each sequence with this one; 0 for one that is not there, whose token is
            the next of a chunk.
        positions, slots: int64 [tokens]; see :func:`foveate.kernels.reference.rotary_write`.
        chunk_rows: int64 [chunks], each one's row.
        query_offsets, key_lengths: see :func:`foveate.kernels.reference.paged_prefill_attention`.
        sampled: int64, the tokens whose logits are wanted; without chunks it is all of them.
    """

    rows: Tensor
    lengths: Tensor
    positions: Tensor
    slots: Tensor
    chunk_rows: Tensor | None = None
    query_offsets: Tensor | None = None
    key_lengths: Tensor | None = None
    sampled: Tensor | None = None


class LayerCache(NamedTuple):
    """Where one layer's keys and values are kept: [blocks, block_size, kv_heads, head_dim] each.

    ``offset`` says what the keys are without, if anything.
    """

    keys: Tensor
    values: Tensor
    offset: KeyOffset | None


class PagedAttention:
    """How the rows of one step attend, and where their keys and values are kept (an ``AttendFused`` of the model).

    Args:
        inputs: the step's.
        caches: each layer's.
        tables: int32 [decodes, longest], block tables of the decodes, and [chunks, longest], of the chunks; None
            without any.
        cos_sin: see :func:`foveate.kernels.reference.rotary_write`.
        heads: query heads.
        longest_query: tokens of the longest chunk, or more.
        has_drafts: whether several decodes may be of one sequence.
    """

    def __init__(
        self,
        inputs: ForwardInputs,
        caches: list[LayerCache],
        tables: tuple[Tensor, Tensor | None],
        cos_sin: Tensor,
        heads: int,
        longest_query: int,
        has_drafts: bool = False,
    ) -> None:
        self._inputs, self._caches, self._cos_sin, self._heads = inputs, caches, cos_sin, heads
        self._longest_query, self._has_drafts = longest_query, has_drafts
        self._decode_tables, self._chunk_tables = tables
        if self._chunk_tables is not None:
            self._decodes = (inputs.lengths > 0)[:, None, None]

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[tokens, heads, head_dim], in the order of the step's tokens."""
        inputs, (keys, values, offset) = self._inputs, self._caches[layer]
        # A fused decode may read another one's key before it is written.
        if self._chunk_tables is None and not self._has_drafts:
            return ops.fused_decode(
                qkv, self._cos_sin, inputs.positions, inputs.slots, keys, values, self._decode_tables, inputs.lengths,
                self._heads, offset,
            )  # fmt: skip
        # The whole step's keys come first: sequences of one step may share blocks.
        query = ops.rotary_write(qkv, self._cos_sin, inputs.positions, inputs.slots, keys, values, self._heads, offset)
        if self._chunk_tables is None:
            return ops.paged_decode_attention(query, keys, values, self._decode_tables, inputs.lengths, offset)
        assert inputs.query_offsets is not None
        assert inputs.key_lengths is not None
        attended = ops.paged_prefill_attention(
            query, keys, values, self._chunk_tables, inputs.query_offsets, inputs.key_lengths, self._longest_query,
            offset,
        )  # fmt: skip
        if len(inputs.rows):
            first = attended[: len(inputs.rows)]
            decodes = ops.paged_decode_attention(
                query[: len(first)], keys, values, self._decode_tables, inputs.lengths, offset
            )
            torch.where(self._decodes, decodes, first, out=first)
        return attended
