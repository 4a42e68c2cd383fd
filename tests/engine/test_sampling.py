"""Choosing tokens: what each parameter promises."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.engine.messages import SamplingParams
from foveate.engine.rows import Rows
from foveate.engine.sampling import GREEDY, Logprobs, SamplingInputs, Variant, choose, uniform
from foveate.engine.sequence import Sequence
from foveate.engine.state import SequenceState, state_of
from foveate.engine.step import ScheduledSeq

torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 50
EOS = 7


def sequence(seed: int = 0, **sampling: Any) -> Sequence:
    params = SamplingParams(**{"max_tokens": 1000} | sampling)
    seq = Sequence(
        request_id="r", prompt_token_ids=[1, 2, 3], sampling=params, eos_token_ids=frozenset({EOS}), max_seq_len=5000
    )
    seq.payload = SequenceState(seed=seed)
    return seq


class Sampler:
    """Rows for sequences, and steps that do nothing but sample."""

    def __init__(self, size: int, vocab_size: int = VOCAB) -> None:
        self.rows = Rows(size, 1, vocab_size, CPU)
        self.variant = GREEDY

    def sample(self, logits: Tensor, seqs: list[Sequence], variant: Variant | None = None) -> list[int]:
        items = [ScheduledSeq(seq, seq.num_tokens - 1, 1, True) for seq in seqs]
        rows = self.rows.assign(items)
        for item, row in zip(items, rows, strict=True):
            self.rows.mask_ends(item, row)
        indices = np.array([row.index for row in rows])
        inputs = SamplingInputs(
            rows=torch.from_numpy(indices),
            positions=torch.tensor([seq.num_tokens for seq in seqs]),
            **{name: torch.from_numpy(values) for name, values in self.rows.parameters(indices).items()},
        )
        self.variant = self.rows.variant(rows)
        return choose(logits, inputs, self.rows.state, variant or self.variant).tolist()


def sample(logits: Tensor, seqs: list[Sequence]) -> list[int]:
    return Sampler(len(seqs)).sample(logits, seqs)


def draw(logits: Tensor, count: int, **sampling: Any) -> list[int]:
    """The tokens that ``count`` sequences with different seeds draw."""
    return sample(logits.expand(count, -1).clone(), [sequence(seed, **sampling) for seed in range(count)])


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
    tokens = sample(logits.expand(400, -1).clone(), seqs)
    assert set(tokens[1::2]) == {best}
    assert len(set(tokens[::2])) > 10


@pytest.mark.parametrize("top_p", [1e-50, 0.01, 0.5, 0.9])
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
    alone = [sample(logits.clone(), [sequence(seed)])[0] for seed in range(20)]
    assert sample(logits.expand(20, -1).clone(), [sequence(seed) for seed in range(20)]) == alone
    later = sequence(0)
    drawn = set()
    for token in range(30):
        drawn.add(sample(logits.clone(), [later])[0])
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
    sampler = Sampler(1)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 11], logits[0, 1] = 4.0, 3.0, 2.5
    # 10 wins, then is 4 / 2 - 0.75 = 1.25; 11 wins, then is 0.75; 1, which is in the prompt, was never penalized.
    chosen = [sampler.sample(logits, [seq])[0] for _ in range(3)]
    assert chosen == [10, 11, 1]
    assert sampler.rows.state.counts.sum(dim=0).nonzero().flatten().tolist() == [1, 10, 11]


def test_the_frequency_penalty_counts() -> None:
    seq = sequence(temperature=0.0, frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 11], logits[0, 12] = 4.0, 3.5, 2.2
    sampler = Sampler(1)
    assert [sampler.sample(logits, [seq])[0] for _ in range(5)] == [10, 11, 10, 11, 12]


def test_negative_scores_are_multiplied_by_the_penalty() -> None:
    seq = sequence(temperature=0.0, repetition_penalty=2.0)
    logits = torch.full((1, VOCAB), -10.0)
    logits[0, 5], logits[0, 6] = -1.0, -1.5
    sampler = Sampler(1)
    assert [sampler.sample(logits, [seq])[0] for _ in range(2)] == [5, 6]


def test_logit_bias_forces_and_forbids(logits: torch.Tensor) -> None:
    assert draw(logits, 50, logit_bias={33: 100.0}) == [33] * 50
    best = int(logits.argmax())
    assert best not in draw(logits, 500, logit_bias={best: -100.0})


def test_no_end_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 20], logits[0, 21] = 9.0, 8.0, 7.0
    seq = sequence(temperature=0.0, min_tokens=2, stop_token_ids=[20])
    chosen = []
    sampler = Sampler(1)
    for _ in range(3):
        chosen += sampler.sample(logits, [seq])
        seq.append(chosen[-1])
    assert chosen == [21, 21, EOS]


def test_logprobs_are_the_models_own(logits: Tensor) -> None:
    expected = logits[0].log_softmax(0)
    chosen = torch.tensor([4, 5, 6])
    found = Logprobs(logits.expand(3, -1), chosen, torch.tensor([0, 2]), 3)
    first, third = found.read(0, 4, 3), found.read(1, 6, 0)
    assert (first.token_id, third.token_id) == (4, 6)
    assert first.logprob == pytest.approx(float(expected[4]))
    assert third.logprob == pytest.approx(float(expected[6]))
    assert [token for token, _ in first.top] == expected.topk(3).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(expected.topk(3).values.tolist())
    assert third.top == []


def test_the_input_is_left_alone(logits: Tensor) -> None:
    before = logits.clone()
    sample(logits, [sequence(repetition_penalty=1.5, logit_bias={1: 5.0}, top_k=5)])
    assert torch.equal(logits, before)


# All parameters together, and the same whatever the company.


def parameters(random: Random) -> dict[str, Any]:
    """What a request may ask for; each thing may be left out."""
    everything = {
        "temperature": random.choice([0.0, 0.5, 1.0, 2.0]), "top_k": random.choice([0, 1, 20, 128, 500, 5000]),
        "top_p": random.choice([1.0, 0.9, 0.3]), "min_p": random.choice([0.0, 0.01, 0.2]),
        "repetition_penalty": random.choice([1.0, 1.3]), "presence_penalty": random.choice([0.0, 1.0]),
        "frequency_penalty": random.choice([0.0, 0.7]), "logit_bias": {random.randrange(2000): 3.0},
        "min_tokens": random.choice([0, 2]),
    }  # fmt: skip
    return {name: value for name, value in everything.items() if random.random() < 0.5}


def plainly(logits: Tensor, seq: Sequence, generated: list[int]) -> int:
    """One row's token, step by step as the parameters are described."""
    params, scores = seq.sampling, logits.clone()
    for token in set(generated):
        score = scores[token]
        score = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
        scores[token] = score - params.frequency_penalty * generated.count(token) - params.presence_penalty
    for token, value in params.logit_bias.items():
        scores[token] += value
    if seq.num_output_tokens < params.min_tokens:
        scores[EOS] = -torch.inf
    if params.temperature == 0:
        return int(scores.argmax())
    values, ids = (scores / params.temperature).sort(descending=True)
    kept = values[: params.top_k] if params.top_k else values
    shares = kept.softmax(0)
    before = shares.cumsum(0) - shares
    stays = ((before < params.top_p) | (params.top_p == 1)) & (shares >= params.min_p * shares[0])
    stays[0] = True
    ids, kept = ids[: len(kept)][stays], kept[stays]
    noise = uniform(torch.tensor([state_of(seq).seed]), torch.tensor([seq.num_tokens]), ids[None])[0]
    return int(ids[(kept.double() - (-noise.log()).log()).argmax()])


@pytest.mark.parametrize("case", range(30))
def test_everything_together_alone_and_in_company(case: int) -> None:
    random, vocab = Random(case), 2000
    seqs = [sequence(seed, **parameters(random)) for seed in range(4)]
    generator = torch.Generator().manual_seed(case)
    together, alone = Sampler(4, vocab), [Sampler(1, vocab) for _ in seqs]
    most = Variant(adjusts=True, draws=True, width=vocab)
    wide = Sampler(4, vocab)
    for _ in range(4):
        logits = torch.randn(4, vocab, generator=generator) * 2
        expected = [
            plainly(row, seq, seq.output_token_ids) for row, seq in zip(logits, seqs, strict=True)
        ]  # What is generated is what was chosen, end tokens among it.
        assert together.sample(logits, seqs) == expected
        assert [own.sample(row[None], [seq])[0] for own, row, seq in zip(alone, logits, seqs, strict=True)] == expected
        assert wide.sample(logits, seqs, most) == expected
        for seq, token in zip(seqs, expected, strict=True):
            seq.append(token)


@pytest.mark.parametrize(
    ("sampling", "variant"),
    [
        ([{"temperature": 0.0, "top_k": 5}], GREEDY),
        ([{"temperature": 0.0, "frequency_penalty": 0.1}], Variant(adjusts=True)),
        ([{}], Variant(draws=True)),
        ([{"temperature": 0.0}, {"top_k": 100}], Variant(draws=True, width=128)),
        ([{"top_k": 100, "top_p": 0.8, "repetition_penalty": 1.05}], Variant(adjusts=True, draws=True, width=128)),
        ([{"top_k": 129}], Variant(draws=True, width=1024)),
        ([{"top_k": 4000}], Variant(draws=True, width=2000)),
        ([{"top_p": 0.8}], Variant(draws=True, width=2000)),
        ([{"top_k": 3}, {}], Variant(draws=True, width=2000)),
    ],
)
def test_no_step_does_more_than_its_rows_need(sampling: list[dict[str, Any]], variant: Variant) -> None:
    sampler = Sampler(len(sampling), 2000)
    sampler.sample(torch.zeros(len(sampling), 2000), [sequence(**params) for params in sampling])
    assert sampler.variant == variant


def test_a_row_forgets_who_had_it_before(logits: Tensor) -> None:
    sampler = Sampler(1)
    best = int(logits.argmax())
    demanding = {"temperature": 0.0, "repetition_penalty": 9.0, "min_tokens": 5, "stop_token_ids": [best]}
    first = sequence(**demanding, logit_bias={3: 100.0})
    assert sampler.sample(logits, [first]) == [3]
    assert sampler.sample(logits, [first]) == [3]
    assert sampler.sample(logits, [sequence(temperature=0.0, presence_penalty=1.0)]) == [best]


def test_counts_are_made_again_after_a_preemption() -> None:
    seq = sequence(temperature=0.0, frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 11] = 4.0, 3.5
    sampler = Sampler(1)
    for expected in (10, 11, 10):
        assert sampler.sample(logits, [seq]) == [expected]
        seq.append(expected)
    other = sequence(temperature=0.0, frequency_penalty=1.0, logit_bias={11: 50.0})
    assert [sampler.sample(logits, [other]) for _ in range(3)] == [[11]] * 3
    assert sampler.sample(logits, [seq]) == [11]
