"""Choosing the next token of every sequence of a step, on the device, each by its own rules.

Randomness is a hash of (seed, position, token), not a stream: what a sequence draws does not depend on who else is in
the batch, on how the step was cut, or on a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.engine.messages import SamplingParams, TokenLogprob
from foveate.engine.sequence import Sequence
from foveate.engine.state import SequenceState, state_of


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen tokens, and for those who want them the log-probabilities, in the order of the sequences."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


def prepare(seq: Sequence, state: SequenceState, vocab_size: int, device: torch.device) -> None:
    """Make the tensors that a sequence's parameters need."""
    params = seq.sampling
    if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
        state.counts = torch.zeros(vocab_size, device=device)
    if params.logit_bias:
        ids, values = zip(*params.logit_bias.items(), strict=True)
        state.bias = (
            torch.tensor(ids, device=device),
            torch.tensor(values, device=device, dtype=torch.float32),
        )
    if params.min_tokens and seq.stop_ids:
        state.ends = torch.tensor(sorted(seq.stop_ids), device=device)


@torch.inference_mode()
def sample(logits: Tensor, seqs: Listing[Sequence]) -> Sampled:
    """Choose the next token of each sequence.

    Args:
        logits: float32 [sequences, vocab_size].
        seqs: one for each row; each one's ``payload`` is a prepared :class:`SequenceState`.
    """
    logprobs = _logprobs_wanted(logits, seqs)
    processed = _processed(logits, seqs)
    chosen = processed.argmax(dim=-1)
    drawing = [row for row, seq in enumerate(seqs) if seq.sampling.temperature > 0]
    if drawing:
        everyone = len(drawing) == len(seqs)
        rows = torch.tensor(drawing, device=logits.device)
        drawn = _draw(processed if everyone else processed[rows], [seqs[row] for row in drawing])
        chosen = drawn if everyone else chosen.index_copy(0, rows, drawn)
    for row, seq in enumerate(seqs):
        counts = state_of(seq).counts
        if counts is not None:
            counts[chosen[row]] += 1
    token_ids: list[int] = chosen.tolist()
    return Sampled(token_ids, _logprobs_of(logprobs, token_ids, seqs))


def _processed(logits: Tensor, seqs: Listing[Sequence]) -> Tensor:
    """Apply penalties, bias and minimum length; the input stays as it is."""
    states = [state_of(seq) for seq in seqs]
    touched = [
        row
        for row, (seq, state) in enumerate(zip(seqs, states, strict=True))
        if state.counts is not None or state.bias is not None or _below_minimum(seq, state)
    ]
    if not touched:
        return logits
    logits = logits.clone()
    _penalize(logits, [row for row in touched if states[row].counts is not None], seqs)
    for row in touched:
        state = states[row]
        if state.bias is not None:
            logits[row].index_add_(0, *state.bias)
        if _below_minimum(seqs[row], state):
            logits[row, state.ends] = -torch.inf
    return logits


def _below_minimum(seq: Sequence, state: SequenceState) -> bool:
    return state.ends is not None and seq.num_output_tokens < seq.sampling.min_tokens


def _penalize(logits: Tensor, rows: list[int], seqs: Listing[Sequence]) -> None:
    if not rows:
        return
    params = [seqs[row].sampling for row in rows]
    counts = torch.stack([counts for row in rows if (counts := state_of(seqs[row]).counts) is not None])
    repetition, presence, frequency = _columns(
        [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params], logits.device
    )
    index = torch.tensor(rows, device=logits.device)
    scores, seen = logits[index], counts > 0
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(seen, repeated, scores) - frequency * counts - presence * seen
    logits.index_copy_(0, index, scores)


def _columns(values: list[tuple[float, ...]], device: torch.device) -> list[Tensor]:
    """One tensor [rows, 1] for each parameter."""
    return list(torch.tensor(values, device=device, dtype=torch.float32).unsqueeze(-1).unbind(1))


def _draw(logits: Tensor, seqs: Listing[Sequence]) -> Tensor:
    """Draw from the tempered distribution cut down to top_k, then top_p, then min_p: [rows]."""
    params = [seq.sampling for seq in seqs]
    temperature, top_p, min_p = _columns([(p.temperature, p.top_p, p.min_p) for p in params], logits.device)
    scores, ids = _candidates(logits / temperature, params)
    # A draw is the arg-max after adding Gumbel noise to the log-probabilities.
    scores = _cut(scores, params, top_p, min_p)
    seeds = torch.tensor([state_of(seq).seed for seq in seqs], device=logits.device)
    positions = torch.tensor([seq.num_tokens for seq in seqs], device=logits.device)
    noise = -torch.log(-torch.log(uniform(seeds, positions, ids)))
    best = (scores.double() + noise).argmax(dim=-1, keepdim=True)
    return ids.gather(1, best).squeeze(1)


def _candidates(scores: Tensor, params: list[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Scores in descending order with their token ids; only as many as some row can use."""
    vocab_size = scores.shape[-1]
    if not any(p.top_k or p.top_p < 1 or p.min_p for p in params):
        return scores, torch.arange(vocab_size, device=scores.device).expand_as(scores)
    widest = max(p.top_k or vocab_size for p in params)
    values, ids = scores.topk(min(widest, vocab_size), dim=-1)
    return values, ids


def _cut(scores: Tensor, params: list[SamplingParams], top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set what top_k, top_p and min_p exclude to -inf; the most likely token always stays."""
    limits = [p.top_k or scores.shape[-1] for p in params]
    if min(limits) < scores.shape[-1]:
        ranks = torch.arange(scores.shape[-1], device=scores.device)
        excluded = ranks >= torch.tensor(limits, device=scores.device)[:, None]
        scores = scores.masked_fill(excluded, -torch.inf)
    if any(p.top_p < 1 or p.min_p for p in params):
        probabilities = scores.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        excluded = (before >= top_p) & (top_p < 1)
        excluded |= probabilities < min_p * probabilities[:, :1]
        excluded[:, 0] = False
        scores = scores.masked_fill(excluded, -torch.inf)
    return scores


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


def _logprobs_wanted(logits: Tensor, seqs: Listing[Sequence]) -> Tensor | None:
    if not any(seq.sampling.logprobs for seq in seqs):
        return None
    return logits.log_softmax(dim=-1)


def _logprobs_of(logprobs: Tensor | None, token_ids: list[int], seqs: Listing[Sequence]) -> list[TokenLogprob | None]:
    if logprobs is None:
        return [None] * len(seqs)
    found: list[TokenLogprob | None] = []
    for row, (token_id, seq) in enumerate(zip(token_ids, seqs, strict=True)):
        if not seq.sampling.logprobs:
            found.append(None)
            continue
        top: list[tuple[int, float]] = []
        if seq.sampling.top_logprobs:
            values, ids = logprobs[row].topk(seq.sampling.top_logprobs)
            top = list(zip(ids.tolist(), values.tolist(), strict=True))
        found.append(TokenLogprob(token_id, logprobs[row, token_id].item(), top))
    return found
