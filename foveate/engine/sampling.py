"""Choosing the next token of every sequence of a step, on the device, each by its own rules.

Randomness is a hash of (seed, position, token), not a stream: what a sequence draws does not depend on who else is in
the batch, on how the step was cut, or on a preemption.

Nothing here needs the host: every parameter is a tensor with an element for each row, and neutral where a row does not
use it. What a step does not need at all is left out by its :class:`Variant`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.engine.messages import SamplingParams, TokenLogprob

WIDTHS = (128, 1024)
"""How many candidates are put in order, at most, if no row can use more; otherwise the whole vocabulary is."""


class Variant(NamedTuple):
    """What a step's sampling has to do: the same for many steps.

    Attributes:
        adjusts: some row has penalties, a bias, or ends that it may not choose yet.
        draws: some row does not just take the most likely token.
        width: candidates of each row that are put in order, to be cut down; 0: no row that draws needs that.
    """

    adjusts: bool = False
    draws: bool = False
    width: int = 0


GREEDY = Variant()


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """The parameters of a step's rows, each [rows]; see :class:`foveate.engine.messages.SamplingParams`.

    Attributes:
        rows: int64, each one's place in the tensors of a :class:`SamplingState`.
        positions: int64, where the chosen tokens will stand in their sequences.
        seeds: int64.
        top_k: int32, 0: off.
        temperature, top_p, min_p, repetition, presence, frequency: float32.
    """

    rows: Tensor
    positions: Tensor
    seeds: Tensor
    top_k: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, slots=True)
class SamplingState:
    """What rows keep from step to step.

    Attributes:
        counts: int32 [places, vocab_size], how often each token was generated; kept up only where penalties need it.
        bias: float32 [places, vocab_size], what is added to the logits.
    """

    counts: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen tokens, and for those who want them the log-probabilities, in the order of the sequences."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


def needs(params: SamplingParams, *, has_stop_ids: bool) -> Variant:
    """Return what one row needs, whatever the vocabulary; its ``width`` is its top_k, -1 for the whole vocabulary."""
    adjusts = (
        params.repetition_penalty != 1.0
        or bool(params.presence_penalty or params.frequency_penalty or params.logit_bias)
        or (params.min_tokens > 0 and has_stop_ids)
    )
    cuts = bool(params.top_k) or params.top_p < 1 or params.min_p > 0
    return Variant(adjusts, params.temperature > 0, (params.top_k or -1) if cuts else 0)


def together(each: list[Variant], vocab_size: int) -> Variant:
    """Return what does for all rows of a step, one that others can use too; see :func:`needs`."""
    adjusts = any(need.adjusts for need in each)
    widths = [need.width for need in each if need.draws]
    if not any(widths):
        return Variant(adjusts, bool(widths))
    widest = vocab_size if min(widths) <= 0 else max(widths)
    return Variant(adjusts, True, next((width for width in WIDTHS if widest <= width < vocab_size), vocab_size))


def choose(logits: Tensor, inputs: SamplingInputs, state: SamplingState, variant: Variant) -> Tensor:
    """Choose the next token of each row, and count it.

    Args:
        logits: float32 [rows, vocab_size]; left as they are.
        inputs: parameters of the rows.
        state: of all rows; ``counts`` is updated.
        variant: what :func:`together` returned for these rows, or anything that does more.

    Returns:
        int64 [rows]
    """
    counts = state.counts.index_select(0, inputs.rows) if variant.adjusts else None
    chosen = pick(logits, inputs, counts, state.bias, variant)
    if variant.adjusts:
        # The places in one dimension: adding at pairs of indices would sort them first.
        state.counts.view(-1).scatter_add_(
            0, inputs.rows * logits.shape[-1] + chosen, torch.ones_like(chosen, dtype=state.counts.dtype)
        )
    return chosen


def pick(logits: Tensor, inputs: SamplingInputs, counts: Tensor | None, bias: Tensor, variant: Variant) -> Tensor:
    """Choose the next token of each row; ``counts`` [rows, vocab_size] only where the variant adjusts: int64 [rows]."""
    scores = logits if counts is None else _adjusted(logits, inputs, counts, bias)
    chosen = scores.argmax(dim=-1)
    if variant.draws:
        chosen = torch.where(inputs.temperature > 0, _draw(scores, inputs, variant.width), chosen)
    return chosen


def _adjusted(logits: Tensor, inputs: SamplingInputs, counts: Tensor, bias: Tensor) -> Tensor:
    """Apply penalties and bias. Where they are neutral, nothing changes, not even in the last bit."""
    repetition, presence, frequency = (
        column.unsqueeze(1) for column in (inputs.repetition, inputs.presence, inputs.frequency)
    )
    seen = counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    scores = torch.where(seen, repeated, logits) - frequency * counts - presence * seen
    return scores + bias.index_select(0, inputs.rows)


def _draw(scores: Tensor, inputs: SamplingInputs, width: int) -> Tensor:
    """Draw from the tempered distribution cut down to top_k, then top_p, then min_p: [rows]."""
    temperature = torch.where(inputs.temperature > 0, inputs.temperature, 1.0)
    scores = scores / temperature.unsqueeze(1)
    if width:
        scores, ids = scores.topk(width, dim=-1)
        scores = _cut(scores, inputs)
    else:
        ids = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    # A draw is the arg-max after adding Gumbel noise to the log-probabilities.
    noise = -torch.log(-torch.log(uniform(inputs.seeds, inputs.positions, ids)))
    best = (scores.double() + noise).argmax(dim=-1, keepdim=True)
    return ids.gather(1, best).squeeze(1)


def _cut(scores: Tensor, inputs: SamplingInputs) -> Tensor:
    """Set what top_k, top_p and min_p exclude to -inf, in descending scores; the most likely token always stays."""
    top_k, top_p, min_p = (column.unsqueeze(1) for column in (inputs.top_k, inputs.top_p, inputs.min_p))
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill((ranks >= top_k) & (top_k > 0), -torch.inf)
    probabilities = scores.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    excluded = (before >= top_p) & (top_p < 1)
    excluded |= probabilities < min_p * probabilities[:, :1]
    return scores.masked_fill(excluded & (ranks > 0), -torch.inf)


def uniform(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Return a number in (0, 1) for each (seed, position, token), always the same for the same three.

    The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), applied to the three in turn.

    Args:
        seeds: int64 [rows].
        positions: int64 [rows].
        ids: int64 [rows, tokens].

    Returns:
        float64 [rows, tokens]
    """
    state = _mix(_mix(_mix(seeds) ^ positions)[:, None] ^ ids)
    return (_shifted(state, 11).double() + 0.5) * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    # Integer arithmetic wraps; the constants are those of the paper, as signed numbers.
    x = x + -7046029254386353131
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Logprobs:
    """The log-probabilities of some of a step's tokens, on their way from the device.

    Args:
        logits: float32 [rows, vocab_size], the model's own, before any penalty.
        chosen: int64 [rows].
        places: int64 [wanted], the rows whose log-probabilities are wanted.
        most: how many of the most likely tokens a row wants.
    """

    def __init__(self, logits: Tensor, chosen: Tensor, places: Tensor, most: int) -> None:
        logprobs = logits.index_select(0, places).log_softmax(dim=-1)
        self._own = to_host(logprobs.gather(1, chosen.index_select(0, places)[:, None]))
        self._top = tuple(to_host(part) for part in logprobs.topk(most, dim=-1)) if most else None

    def read(self, place: int, token_id: int, count: int) -> TokenLogprob:
        """Return those of the ``place``-th row that wants them, once the copies are over."""
        top: list[tuple[int, float]] = []
        if self._top is not None and count:
            values, ids = (part[place, :count].tolist() for part in self._top)
            top = list(zip(ids, values, strict=True))
        return TokenLogprob(token_id, self._own[place].item(), top)


def to_host(x: Tensor) -> Tensor:
    """Begin to copy a tensor to pinned memory; it is there when the stream has got so far."""
    return x.to("cpu", non_blocking=True, copy=True)
