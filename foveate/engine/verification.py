"""Choosing tokens behind guesses, on the device: which of a step's choices count, and what they leave behind.

A step with drafts has a row for each newest token and behind it one for each of its drafts. Every row chooses as if all
drafts before it were right; what is chosen up to the first wrong one is what the sequence gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.engine.sampling import SamplingInputs, SamplingState, Variant, pick


@dataclass(frozen=True, slots=True)
class DraftInputs:
    """What the rows of a step with drafts run.

    Attributes:
        token_ids: int64 [rows], newest tokens and drafts.
        first: int64 [rows], the row with the newest token of each one's sequence: its own for that one.
    """

    token_ids: Tensor
    first: Tensor


def choose_behind(
    logits: Tensor, inputs: SamplingInputs, drafts: DraftInputs, state: SamplingState, variant: Variant, most: int
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row, and count those that the sequences get.

    Args:
        logits: float32 [rows, vocab_size]; left as they are.
        inputs: parameters of the rows; those of one sequence name the same place in ``state``.
        drafts: what the rows run.
        state: of all sequences; ``counts`` is updated.
        variant: see :func:`foveate.engine.sampling.choose`.
        most: drafts that a sequence can have.

    Returns:
        int64 [rows], the choices, and bool [rows], which of them count
    """
    counts = _counts_behind(inputs, drafts, state, most) if variant.adjusts else None
    chosen = pick(logits, inputs, counts, state.bias, variant)
    counting = is_good(chosen, drafts)
    if variant.adjusts:
        places = inputs.rows * logits.shape[-1] + chosen
        state.counts.view(-1).scatter_add_(0, places, counting.to(state.counts.dtype))
    return chosen, counting


def is_good(chosen: Tensor, drafts: DraftInputs) -> Tensor:
    """Say which choices were made behind nothing but right drafts: bool [rows]."""
    is_draft = drafts.first < torch.arange(len(chosen), device=chosen.device)
    wrong = (is_draft & (chosen.roll(1) != drafts.token_ids)).cumsum(0)
    return wrong == wrong.index_select(0, drafts.first)


def keep_newest(tokens: Tensor, chosen: Tensor, counting: Tensor, inputs: SamplingInputs, drafts: DraftInputs) -> None:
    """Write each sequence's last choice that counts to its place in ``tokens``, whose last place is nobody's."""
    next_is_draft = drafts.first.roll(-1) <= torch.arange(len(chosen), device=chosen.device)
    # Behind the last row stands the first, which is no draft of it.
    next_is_draft[-1:].zero_()  # An assignment would copy from the host, which a CUDA graph cannot have.
    is_last = counting & ~(next_is_draft & counting.roll(-1))
    tokens.index_copy_(0, torch.where(is_last, inputs.rows, len(tokens) - 1), chosen)


def _counts_behind(inputs: SamplingInputs, drafts: DraftInputs, state: SamplingState, most: int) -> Tensor:
    """Return what each row's sequence has generated, the drafts up to the row included: [rows, vocab_size]."""
    counts = state.counts.index_select(0, inputs.rows)
    rows = torch.arange(len(drafts.first), device=counts.device)
    before = drafts.first[:, None] + 1 + torch.arange(most, device=counts.device)
    ids = drafts.token_ids[before.clamp(max=len(rows) - 1)]
    return counts.scatter_add_(1, ids, (before <= rows[:, None]).to(counts.dtype))
