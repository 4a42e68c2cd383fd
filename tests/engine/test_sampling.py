"""Choosing tokens: what each parameter promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.engine.messages import SamplingParams
from foveate.engine.sampling import prepare, sample, uniform
from foveate.engine.sequence import Sequence
from foveate.engine.state import SequenceState

VOCAB = 50
EOS = 7


def sequence(seed: int = 0, **sampling: Any) -> Sequence:
    params = SamplingParams(**{"max_tokens": 1000} | sampling)
    seq = Sequence(
        request_id="r", prompt_token_ids=[1, 2, 3], sampling=params, eos_token_ids=frozenset({EOS}), max_seq_len=5000
    )
    state = SequenceState(seed=seed)
    prepare(seq, state, VOCAB, torch.device("cpu"))
    seq.payload = state
    return seq


def draw(logits: torch.Tensor, count: int, **sampling: Any) -> list[int]:
    """The tokens that ``count`` sequences with different seeds draw."""
    seqs = [sequence(seed, **sampling) for seed in range(count)]
    return sample(logits.expand(count, -1).clone(), seqs).token_ids


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def test_temperature_zero_is_the_arg_max(logits: torch.Tensor) -> None:
    assert draw(logits, 5, temperature=0.0, top_k=3, top_p=0.1) == [int(logits.argmax())] * 5


def test_frequencies_follow_the_probabilities(logits: torch.Tensor) -> None:
    tokens = torch.tensor(draw(logits, 20_000, temperature=1.3))
    measured = tokens.bincount(minlength=VOCAB) / len(tokens)
    expected = (logits[0] / 1.3).softmax(0)
    # Five standard deviations of a binomial share.
    assert ((measured - expected).abs() <= 5 * (expected * (1 - expected) / len(tokens)).sqrt() + 1e-9).all()


def test_top_k(logits: torch.Tensor) -> None:
    allowed = set(logits[0].topk(4).indices.tolist())
    assert set(draw(logits, 2000, top_k=4)) == allowed


def test_top_k_differs_between_rows(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    seqs = [sequence(seed, top_k=1 if seed % 2 else 0) for seed in range(400)]
    tokens = sample(logits.expand(400, -1).clone(), seqs).token_ids
    assert set(tokens[1::2]) == {best}
    assert len(set(tokens[::2])) > 10


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9])
def test_top_p(logits: torch.Tensor, top_p: float) -> None:
    probabilities, ids = logits[0].softmax(0).sort(descending=True)
    count = int((probabilities.cumsum(0) < top_p).sum()) + 1
    drawn = set(draw(logits, 3000, top_p=top_p))
    assert drawn <= set(ids[:count].tolist())
    assert int(ids[0]) in drawn


def test_min_p(logits: torch.Tensor) -> None:
    probabilities = logits[0].softmax(0)
    allowed = set((probabilities >= 0.2 * probabilities.max()).nonzero().flatten().tolist())
    assert set(draw(logits, 3000, min_p=0.2)) == allowed


def test_a_draw_depends_on_seed_and_position_only(logits: torch.Tensor) -> None:
    alone = [sample(logits.clone(), [sequence(seed)]).token_ids[0] for seed in range(20)]
    assert sample(logits.expand(20, -1).clone(), [sequence(seed) for seed in range(20)]).token_ids == alone
    later = sequence(0)
    drawn = set()
    for token in range(30):
        drawn.add(sample(logits.clone(), [later]).token_ids[0])
        later.append(token)
    assert len(drawn) > 3


def test_uniform_is_uniform_and_in_between() -> None:
    numbers = uniform(torch.arange(100), torch.arange(100) * 3, torch.arange(1000).expand(100, -1))
    assert numbers.min() > 0
    assert numbers.max() < 1
    histogram = torch.histc(numbers, 10, 0, 1)
    assert ((histogram - 10_000).abs() < 500).all()
    assert len(numbers.unique()) == numbers.numel()


def test_negative_and_huge_seeds_are_seeds() -> None:
    numbers = uniform(torch.tensor([-1, 2**62, -(2**63)]), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1).long())
    assert len(numbers.unique()) == 3


def test_penalties_touch_generated_tokens_only() -> None:
    seq = sequence(temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    state = seq.payload
    assert isinstance(state, SequenceState)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 11], logits[0, 1] = 4.0, 3.0, 2.5
    # 10 wins, then is 4 / 2 - 0.75 = 1.25; 11 wins, then is 0.75; 1, which is in the prompt, was never penalized.
    chosen = [sample(logits.clone(), [seq]).token_ids[0] for _ in range(3)]
    assert chosen == [10, 11, 1]
    assert state.counts is not None
    assert state.counts.nonzero().flatten().tolist() == [1, 10, 11]


def test_the_frequency_penalty_counts() -> None:
    seq = sequence(temperature=0.0, frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 11], logits[0, 12] = 4.0, 3.5, 2.2
    assert [sample(logits.clone(), [seq]).token_ids[0] for _ in range(5)] == [10, 11, 10, 11, 12]


def test_negative_scores_are_multiplied_by_the_penalty() -> None:
    seq = sequence(temperature=0.0, repetition_penalty=2.0)
    logits = torch.full((1, VOCAB), -10.0)
    logits[0, 5], logits[0, 6] = -1.0, -1.5
    assert [sample(logits.clone(), [seq]).token_ids[0] for _ in range(2)] == [5, 6]


def test_logit_bias_forces_and_forbids(logits: torch.Tensor) -> None:
    assert draw(logits, 50, logit_bias={33: 100.0}) == [33] * 50
    best = int(logits.argmax())
    assert best not in draw(logits, 500, logit_bias={best: -100.0})


def test_no_end_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 20], logits[0, 21] = 9.0, 8.0, 7.0
    seq = sequence(temperature=0.0, min_tokens=2, stop_token_ids=[20])
    chosen = []
    for _ in range(3):
        chosen += sample(logits.clone(), [seq]).token_ids
        seq.append(chosen[-1])
    assert chosen == [21, 21, EOS]


def test_logprobs_are_the_models_own(logits: torch.Tensor) -> None:
    expected = logits[0].log_softmax(0)
    seqs = [
        sequence(temperature=0.0, logprobs=True, top_logprobs=3, logit_bias={4: 100.0}),
        sequence(temperature=0.0),
        sequence(temperature=0.0, logprobs=True),
    ]
    sampled = sample(logits.expand(3, -1).clone(), seqs)
    first, second, third = sampled.logprobs
    assert sampled.token_ids[0] == 4
    assert first is not None
    assert first.logprob == pytest.approx(float(expected[4]))
    assert [token for token, _ in first.top] == expected.topk(3).indices.tolist()
    assert second is None
    assert third is not None
    assert third.top == []


def test_the_input_is_left_alone(logits: torch.Tensor) -> None:
    before = logits.clone()
    sample(logits, [sequence(repetition_penalty=1.5, logit_bias={1: 5.0}, top_k=5)])
    assert torch.equal(logits, before)
