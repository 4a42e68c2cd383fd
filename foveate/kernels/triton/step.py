"""The ends of a decode step, between the newest tokens on the device and the layers: some small operations in one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.kernels.triton import pdl

_BLOCK = 1024
_VOCAB_BLOCK = 4096


def start_decode(
    tokens: Tensor, tables: Tensor, weight: Tensor, rows: Tensor, table_places: Tensor, table_blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring block tables up to date, and look up embeddings and tables.

    Args:
        tokens: int64 [places], the newest token of each sequence.
        tables: int32 [places, longest], their block tables; in place.
        weight: [vocab_size, hidden], the embeddings.
        rows: int64 [batch], each sequence's place.
        table_places: int64 [batch], an element of each sequence's table, counted from the first of all tables.
        table_blocks: int32 [batch], what it becomes.

    Returns:
        [batch, hidden] of the type of ``weight``, and int32 [batch, longest]
    """
    batch, longest, hidden = rows.shape[0], tables.shape[1], weight.shape[1]
    x, gathered = weight.new_empty((batch, hidden)), tables.new_empty((batch, longest))
    if batch:
        grid = (batch, triton.cdiv(max(hidden, longest), _BLOCK))
        _start_kernel[grid](
            tokens, tables, weight, rows, table_places, table_blocks, x, gathered, longest, hidden,
            BLOCK=_BLOCK, num_warps=4, **pdl.launch_options(weight),
        )  # fmt: skip
    return x, gathered


def greedy(scores: Tensor, rows: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """Choose the most likely tokens, the first among equals; note them, and keep the scores.

    Args:
        scores: [batch, vocab_size], of any floating type.
        rows: int64 [batch], each sequence's place in ``tokens``.
        tokens: int64 [places], gets the chosen tokens.
        logits: float32 [batch, vocab_size], gets the scores.

    Returns:
        int64 [batch]
    """
    batch, vocab_size = scores.shape
    chosen = rows.new_empty(batch)
    if batch:
        scores = scores.contiguous()
        blocks = triton.cdiv(vocab_size, _VOCAB_BLOCK)
        best = scores.new_empty((batch, blocks), dtype=torch.float32)
        ids = scores.new_empty((batch, blocks), dtype=torch.int32)
        options = pdl.launch_options(scores)
        _best_kernel[(batch, blocks)](
            scores, logits, best, ids, vocab_size, logits.stride(0), blocks, BLOCK=_VOCAB_BLOCK, num_warps=8, **options
        )
        _choose_kernel[(batch,)](
            best, ids, rows, tokens, chosen, blocks, vocab_size,
            BLOCKS=triton.next_power_of_2(blocks), num_warps=1, **options,
        )  # fmt: skip
    return chosen


@triton.jit
def _start_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr,
    tables_ptr,
    weight_ptr,
    rows_ptr,
    table_places_ptr,
    table_blocks_ptr,
    x_ptr,
    gathered_ptr,
    longest,
    hidden,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.wait(PDL)
    pdl.release(PDL)
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + place)
    token = tl.load(tokens_ptr + row)
    inside = columns < hidden
    embedding = tl.load(weight_ptr + token * hidden + columns, mask=inside, other=0.0)
    tl.store(x_ptr + place * hidden + columns, embedding, mask=inside)
    # The one that changes is replaced on its way: another program may not have written it yet.
    changed = tl.load(table_places_ptr + place) - row * longest
    block = tl.load(table_blocks_ptr + place)
    inside = columns < longest
    table = tl.load(tables_ptr + row * longest + columns, mask=inside, other=0)
    table = tl.where(columns == changed, block, table)
    tl.store(gathered_ptr + place * longest + columns, table, mask=inside)
    tl.store(tables_ptr + row * longest + columns, table, mask=inside & (columns == changed))


@triton.jit
def _best_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,
    logits_ptr,
    best_ptr,
    ids_ptr,
    vocab_size,
    logits_stride,
    blocks,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    # One program a block of the vocabulary.
    pdl.wait(PDL)
    pdl.release(PDL)
    place = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    scores = tl.load(scores_ptr + place * vocab_size + columns, mask=inside, other=-float("inf")).to(tl.float32)
    tl.store(logits_ptr + place * logits_stride + columns, scores, mask=inside)
    best, index = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_ptr + place * blocks + block, best)
    tl.store(ids_ptr + place * blocks + block, block * BLOCK + index)


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    best_ptr,
    ids_ptr,
    rows_ptr,
    tokens_ptr,
    chosen_ptr,
    blocks,
    vocab_size,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.wait(PDL)
    pdl.release(PDL)
    place = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCKS)
    inside = columns < blocks
    best = tl.load(best_ptr + place * blocks + columns, mask=inside, other=-float("inf"))
    ids = tl.load(ids_ptr + place * blocks + columns, mask=inside, other=0)
    _, winner = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
    # Scores that are NaN have no order; whatever comes of them must be a token.
    token = tl.minimum(tl.sum(tl.where(columns == winner, ids, 0), axis=0), vocab_size - 1).to(tl.int64)
    tl.store(chosen_ptr + place, token)
    tl.store(tokens_ptr + tl.load(rows_ptr + place), token)
