"""The whole engine with guesses: token for token what it answers without them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from golden_data import TINY
from replays import Repeater

from foveate.checkpoint.load import load_model
from foveate.config import EngineSettings
from foveate.engine.core import EngineCore
from foveate.engine.messages import Abort, Chunk, Generate, ImageSlot, SamplingParams, TokenLogprob
from foveate.engine.runner import ModelRunner
from foveate.engine.scheduler import Scheduler
from foveate.models.qwen2 import Qwen2
from foveate.transport.local import LocalArena
from foveate.transport.sources import Sources

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTH = 512
SENTENCE = [33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43]
LOOP = SENTENCE * 3
OTHER = [9 + 13 * place % 600 for place in range(40)]
UNPREDICTABLE: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 4}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.05, "presence_penalty": 0.01, "frequency_penalty": 0.02},
    "drawn": UNPREDICTABLE,
    "drawn from few": {"temperature": 0.3, "top_k": 3, "seed": 9},
    "drawn, with penalties": UNPREDICTABLE | {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "temperature": 0.4},
    "bias": {"logit_bias": dict.fromkeys(SENTENCE[:4], 14.0), "frequency_penalty": 0.8},
    "minimum": {"min_tokens": 17, "stop_token_ids": SENTENCE},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "logprobs of drawn ones": UNPREDICTABLE | {"logprobs": True, "temperature": 0.3},
}


@dataclass
class Answer:
    """What became of one sequence."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None
    stop_token: int | None


class Engine:
    """An engine without its process."""

    def __init__(
        self, model: Qwen2, depth: int, graphs: bool, *, speculation: str = "prompt_lookup", **settings: Any
    ) -> None:
        defaults = {"max_seq_len": LENGTH, "num_kv_blocks": 256, "cuda_graphs": graphs, "speculation": speculation}
        self.settings = EngineSettings(**defaults | settings)
        length = self.settings.max_seq_len or LENGTH
        runner = ModelRunner(model, self.settings, length)
        if graphs and runner.device.type == "cpu":
            runner.use_graphs(Repeater())
        self.arena = LocalArena("test")
        self.core = EngineCore(
            runner,
            Scheduler(
                self.settings,
                num_blocks=runner.num_blocks,
                block_size=runner.block_size,
                max_seq_len=length,
                depth=depth,
            ),
            Sources(runner.device, self.arena),
            eos_token_ids=frozenset({700, 702}),
            max_seq_len=length,
        )
        self.chunks: dict[tuple[str, int], list[Chunk]] = defaultdict(list)
        self.number = 0

    def add(self, prompt: list[int], *, n: int = 1, images: list[ImageSlot] | None = None, **sampling: Any) -> str:
        self.number += 1
        name = f"r{self.number}"
        params = SamplingParams(**{"max_tokens": 60, "temperature": 0.0, "ignore_eos": True} | sampling)
        request = Generate(request_id=name, prompt_token_ids=prompt, sampling=params, n=n, images=images or [])
        assert self.core.handle(request) == []
        return name

    def step(self) -> None:
        step = self.core.step()
        assert not step.failures
        for chunk in step.chunks:
            self.chunks[chunk.request_id, chunk.index].append(chunk)
        self.core.scheduler.check()

    def finish(self) -> list[Answer]:
        """The answers of all that were added since the last time, in order."""
        while self.core.scheduler.has_work:
            self.step()
        chunks, self.chunks = self.chunks, defaultdict(list)
        return [
            Answer(
                [token for chunk in chunks[key] for token in chunk.token_ids],
                [logprob for chunk in chunks[key] for logprob in chunk.logprobs or ()],
                chunks[key][-1].finish_reason,
                chunks[key][-1].stop_token,
            )
            for key in sorted(chunks, key=lambda key: (int(key[0][1:]), key[1]))
        ]

    @property
    def drafts(self) -> tuple[int, int]:
        stats = self.core.scheduler.stats()
        return stats.draft_tokens, stats.accepted_tokens


Make = Callable[..., Engine]


@pytest.fixture(scope="module", params=DEVICES)
def model(request: pytest.FixtureRequest) -> Qwen2:
    """A model that often goes on in circles of eleven tokens, unless what it has read is too much against it."""
    model = load_model(TINY, torch.device(request.param), torch.float32, part="language").language
    tokens = torch.arange(model.config.vocab_size)
    following = torch.where(tokens % 11 == 10, tokens - 10, tokens + 1).clamp(max=len(tokens) - 1)
    table = model.embed_tokens.weight.data
    # Embeddings that weigh about as much as what the layers add to them.
    table *= 2.3
    model.lm_head.weight.data[following] += 2 * table / table.std() * model.lm_head.weight.data.std()
    return model


@pytest.fixture(params=[(0, False), (1, False), (1, True)], ids=["synchronous", "overlapped", "graphs"])
def make(request: pytest.FixtureRequest, model: Qwen2) -> Make:
    """Makes engines that take steps one by one, or a step ahead, or replay those that only decode."""
    return partial(Engine, model, *request.param)


def same(found: list[Answer], expected: list[Answer]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.finish_reason, one.stop_token) == (other.finish_reason, other.stop_token)
        assert [logprob.token_id for logprob in one.logprobs] == [logprob.token_id for logprob in other.logprobs]
        for logprob, wanted in zip(one.logprobs, other.logprobs, strict=True):
            assert logprob.logprob == pytest.approx(wanted.logprob, abs=1e-3)
            assert [value for _, value in logprob.top] == pytest.approx([v for _, v in wanted.top], abs=1e-3)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_alone(sampling: dict[str, Any], make: Make) -> None:
    plain, guessing = make(speculation="none"), make()
    for engine in (plain, guessing):
        engine.add(LOOP, **sampling)
    expected = plain.finish()
    assert len(expected[0].token_ids) == 60 or expected[0].finish_reason == "stop"
    same(guessing.finish(), expected)
    assert plain.drafts == (0, 0)
    assert guessing.drafts[0] > 0


def test_with_keys_and_values_of_8_bits(make: Make) -> None:
    plain, guessing = (make(speculation=name, kv_cache_dtype="fp8") for name in ("none", "prompt_lookup"))
    for engine in (plain, guessing):
        engine.add(LOOP)
        engine.add(OTHER)
    same(guessing.finish(), plain.finish())
    assert guessing.drafts[1] > 0


def test_repeated_text_is_accepted_and_takes_fewer_steps(make: Make) -> None:
    engine = make()
    engine.add(LOOP, max_tokens=200)
    [answer] = engine.finish()
    assert len(answer.token_ids) == 200
    drafts, accepted = engine.drafts
    assert accepted > 0.5 * drafts > 0
    assert engine.core.scheduler.stats().steps < 120


@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization"])
@pytest.mark.parametrize("max_num_tokens", [2048, 50, 13])
def test_together_and_in_chunks(policy: str, max_num_tokens: int, make: Make) -> None:
    plain = make(speculation="none")
    requests = [([*LOOP, number], sampling) for number, sampling in enumerate(SAMPLINGS.values())]
    requests += [(OTHER, {}), (LOOP[:9], {"max_tokens": 1}), ([5], {"max_tokens": 40})]
    for prompt, sampling in requests:
        plain.add(prompt, **sampling)
    expected = plain.finish()
    guessing = make(scheduler_policy=policy, max_num_tokens=max_num_tokens, num_kv_blocks=60, speculative_tokens=5)
    for prompt, sampling in requests:
        guessing.add(prompt, **sampling)
        guessing.step()
        guessing.step()
    same(guessing.finish(), expected)
    drafts, accepted = guessing.drafts
    assert drafts > accepted > 0


def test_what_was_verified_is_a_good_prefix(make: Make) -> None:
    plain, guessing = make(speculation="none"), make()
    for engine in (plain, guessing):
        engine.add(LOOP, max_tokens=80)
    expected = plain.finish()
    same(guessing.finish(), expected)
    following = LOOP + expected[0].token_ids + OTHER[:5]
    size = guessing.core.runner.block_size
    for engine in (plain, guessing):
        engine.add(following)
        before = engine.core.scheduler.stats().cached_tokens
        engine.step()
        assert engine.core.scheduler.stats().cached_tokens - before == (len(following) - 6) // size * size
    same(guessing.finish(), plain.finish())


def test_preemption(make: Make) -> None:
    options = {"num_kv_blocks": 60, "block_size": 4, "scheduler_policy": "max_utilization", "max_seq_len": 240}
    plain = make(speculation="none")
    guessing = make(enable_prefix_caching=False, **options)
    penalties = {"repetition_penalty": 1.02, "frequency_penalty": 0.01}
    for engine in (plain, guessing):
        for number in range(3):
            engine.add([*LOOP, number], max_tokens=70, **penalties)
    same(guessing.finish(), plain.finish())
    assert guessing.core.scheduler.stats().preemptions > 0
    assert guessing.drafts[1] > 0


def test_an_abort_between_steps_with_drafts(make: Make) -> None:
    plain, guessing = make(speculation="none"), make()
    plain.add([*LOOP, 2])
    expected = plain.finish()
    gone, _ = guessing.add([*LOOP, 1]), guessing.add([*LOOP, 2])
    while not guessing.drafts[0]:
        guessing.step()
    guessing.core.handle(Abort(gone))
    # Somebody else gets the row and the blocks of who has gone.
    guessing.add([*LOOP, 2])
    chunks = [answer for answer in guessing.finish() if answer.finish_reason]
    same(chunks, expected * 2)


def test_several_answers_to_one_prompt(make: Make) -> None:
    plain, guessing = make(speculation="none"), make()
    for engine in (plain, guessing):
        engine.add(LOOP, n=3, temperature=0.4, seed=3)
    expected = plain.finish()
    assert len({tuple(answer.token_ids) for answer in expected}) > 1
    same(guessing.finish(), expected)


def test_pictures(make: Make) -> None:
    rows = torch.randn(20, 256, generator=torch.Generator().manual_seed(2))
    prompt = [*SENTENCE, *[3] * 20, *SENTENCE]
    answers = []
    for speculation in ("none", "prompt_lookup"):
        engine = make(speculation=speculation)
        handle = engine.arena.publish(rows.to(engine.core.runner.device), b"picture")
        engine.add(prompt, images=[ImageSlot(ranges=[(11, 20)], embeddings=handle)], temperature=0.5, seed=1)
        answers.append(engine.finish())
    same(*answers)


def test_an_end_token_among_the_accepted(make: Make) -> None:
    plain = make(speculation="none")
    plain.add(LOOP, max_tokens=100)
    [whole] = plain.finish()
    # A token that comes late in text that repeats itself: its step has accepted others, and drafts behind it.
    stop = whole.token_ids[-1]
    first = whole.token_ids.index(stop)
    guessing = make()
    for minimum in (first, first + 3, 60):
        for engine in (plain, guessing):
            engine.add(LOOP, max_tokens=100, min_tokens=minimum, stop_token_ids=[stop], logprobs=True)
        expected = plain.finish()
        same(guessing.finish(), expected)
        assert len(expected[0].logprobs) == len(expected[0].token_ids)
    assert guessing.drafts[1] > 0


def test_counts_of_penalties_are_those_of_the_answer(make: Make) -> None:
    engine = make(max_batch_size=2)
    engine.add(LOOP, frequency_penalty=0.02, max_tokens=60)
    while engine.core.scheduler.has_work:
        engine.step()
        [seq] = engine.core.scheduler.running or [None]
        if seq is not None and not seq.num_pending:
            counts = engine.core.runner._rows.state.counts[engine.core.runner._rows._rows[seq].index]
            expected = torch.bincount(torch.tensor(seq.output_token_ids), minlength=counts.numel())
            assert torch.equal(counts.cpu().long(), expected)
    assert engine.drafts[1] > 0
