"""The whole engine against the published reference's greedy answers, alone, together, in chunks, with prefix hits."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
import torch
from golden_data import CASES, TINY, picture_names, pixels, tensors
from replays import Repeater

from foveate.checkpoint.load import load_model
from foveate.config import EngineSettings
from foveate.engine.core import EngineCore
from foveate.engine.messages import AddEmbeddings, Chunk, Generate, ImageSlot, SamplingParams
from foveate.engine.runner import ModelRunner
from foveate.engine.scheduler import Scheduler
from foveate.models.minicpmv import MiniCPMV
from foveate.transport.local import LocalArena
from foveate.transport.sources import Sources
from foveate.vision.encoder import VisionEncoder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
QUERY_NUM = 64
NUMBERS = itertools.count()


@pytest.fixture(scope="module", params=DEVICES)
def model(request: pytest.FixtureRequest) -> MiniCPMV:
    return load_model(TINY, torch.device(request.param), torch.float32)


@pytest.fixture(scope="module")
def embeddings(model: MiniCPMV) -> dict[str, list[torch.Tensor]]:
    encoder = VisionEncoder(model.vision, mean=[0.5] * 3, std=[0.5] * 3, batch_size=16)
    return {case: encoder.encode([pixels(name) for name in names]) for case in CASES if (names := picture_names(case))}


class Engine:
    """An engine without its process: requests in, whole answers out."""

    def __init__(
        self, model: MiniCPMV, embeddings: dict[str, list[torch.Tensor]], depth: int, graphs: bool, **settings: Any
    ) -> None:
        defaults = {"max_seq_len": 1024, "num_kv_blocks": 512, "block_size": 16, "cuda_graphs": graphs}
        chosen = EngineSettings(**defaults | settings)
        assert chosen.max_seq_len is not None
        self.arena = LocalArena("test")
        runner = ModelRunner(model.language, chosen, chosen.max_seq_len)
        if graphs and runner.device.type == "cpu":
            runner.use_graphs(Repeater())
        scheduler = Scheduler(
            chosen,
            num_blocks=runner.num_blocks,
            block_size=runner.block_size,
            max_seq_len=chosen.max_seq_len,
            depth=depth,
        )
        self.core = EngineCore(
            runner,
            scheduler,
            Sources(runner.device, self.arena),
            eos_token_ids=frozenset({700, 702}),
            max_seq_len=chosen.max_seq_len,
        )
        self.embeddings = embeddings

    def request(self, case: str, n: int = 1, **sampling: Any) -> Generate:
        golden = tensors(case)
        images, bounds = [], iter(golden["image_bound"].tolist()) if "image_bound" in golden else iter(())
        for number, rows in enumerate(self.embeddings.get(case, [])):
            ranges = [(start, end - start) for start, end in itertools.islice(bounds, len(rows) // QUERY_NUM)]
            digest = f"{case}/{number}".encode()
            images.append(ImageSlot(ranges=ranges, embeddings=self.arena.publish(rows, digest)))
        params = SamplingParams(**{"max_tokens": 32, "temperature": 0.0, "ignore_eos": True} | sampling)
        return Generate(
            request_id=f"{case}-{next(NUMBERS)}", prompt_token_ids=golden["input_ids"].tolist(),
            sampling=params, images=images, n=n,
        )  # fmt: skip

    def answer(self, *requests: Generate) -> list[list[list[Chunk]]]:
        """For each request, for each of its sequences, the chunks."""
        for request in requests:
            assert self.core.handle(request) == []
        chunks: dict[tuple[str, int], list[Chunk]] = defaultdict(list)
        while self.core.scheduler.has_work:
            step = self.core.step()
            assert not step.failures
            for chunk in step.chunks:
                chunks[chunk.request_id, chunk.index].append(chunk)
            self.core.scheduler.check()
        assert self.arena.num_leases == 0
        return [[chunks[request.request_id, index] for index in range(request.n)] for request in requests]

    def tokens(self, *requests: Generate) -> list[list[int]]:
        """For each request, the tokens of its only sequence."""
        return [[token for chunk in answer[0] for token in chunk.token_ids] for answer in self.answer(*requests)]


Make = Callable[..., Engine]


@pytest.fixture(params=[(0, False), (1, False), (1, True)], ids=["synchronous", "overlapped", "graphs"])
def make(request: pytest.FixtureRequest, model: MiniCPMV, embeddings: dict[str, list[torch.Tensor]]) -> Make:
    """Makes engines that take steps one by one, or a step ahead, or replay those that only decode."""
    return partial(Engine, model, embeddings, *request.param)


def golden_ids(case: str, kind: str) -> list[int]:
    golden = tensors(case)
    return golden.get(f"{kind}_fullmask", golden[kind]).tolist()


@pytest.mark.parametrize("case", CASES)
def test_greedy(case: str, make: Make) -> None:
    engine = make()
    assert engine.tokens(engine.request(case)) == [golden_ids(case, "greedy_ids")]


@pytest.mark.parametrize("case", CASES)
def test_greedy_with_repetition_penalty(case: str, make: Make) -> None:
    engine = make()
    tokens = engine.tokens(engine.request(case, repetition_penalty=1.05))
    assert tokens == [golden_ids(case, "greedy_rp1.05_ids")]


@pytest.mark.parametrize("case", CASES)
def test_ends_where_the_reference_ends(case: str, make: Make) -> None:
    engine = make()
    [[chunks]] = engine.answer(engine.request(case, ignore_eos=False))
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    reference = golden_ids(case, "generate_ids")
    if case == "bang_text":  # Its "!" are masked by the reference's generate(), and must not be by a server.
        reference = golden_ids(case, "greedy_ids")
        assert not {700, 702} & set(reference)
    stop = [] if chunks[-1].stop_token is None else [chunks[-1].stop_token]
    assert tokens + stop == reference
    assert chunks[-1].finish_reason == ("stop" if stop else "length")


@pytest.mark.parametrize("max_num_tokens", [2048, 512, 100, 37, 8])
@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization"])
def test_answers_do_not_depend_on_company_or_chunks(policy: str, max_num_tokens: int, make: Make) -> None:
    # 70 blocks hold about two of these sequences: some wait, and under max_utilization some are preempted.
    engine = make(num_kv_blocks=70, max_num_tokens=max_num_tokens, scheduler_policy=policy)
    cases = [*CASES, "image1", "bang_text"]
    expected = [golden_ids(case, "greedy_ids") for case in cases]
    assert engine.tokens(*[engine.request(case) for case in cases]) == expected
    again = [engine.request(case) for case in reversed(cases)]
    assert engine.tokens(*again) == expected[::-1]


def test_preemption_happens_and_changes_nothing(make: Make) -> None:
    engine = make(num_kv_blocks=30, block_size=4, scheduler_policy="max_utilization", max_seq_len=112)
    answers = engine.tokens(*[engine.request("bang_text") for _ in range(2)])
    assert answers == [golden_ids("bang_text", "greedy_ids")] * 2
    engine = make(
        num_kv_blocks=34, block_size=4, scheduler_policy="max_utilization", max_seq_len=136,
        enable_prefix_caching=False,
    )  # fmt: skip
    answers = engine.tokens(*[engine.request("bang_text") for _ in range(2)])
    assert answers == [golden_ids("bang_text", "greedy_ids")] * 2
    assert engine.core.scheduler.stats().preemptions > 0


@pytest.mark.parametrize("num_kv_blocks", [28, 29])
def test_one_that_is_preempted_and_comes_back_at_once(num_kv_blocks: int, make: Make) -> None:
    """Both have computed the same blocks, so the one that gives up its own finds the other's and needs fewer."""
    engine = make(num_kv_blocks=num_kv_blocks, block_size=4, scheduler_policy="max_utilization", max_seq_len=112)
    scheduler = engine.core.scheduler
    [answers] = engine.answer(engine.request("bang_text", n=2))
    expected = golden_ids("bang_text", "greedy_ids")
    assert [[token for chunk in chunks for token in chunk.token_ids] for chunks in answers] == [expected] * 2
    # Only with so many blocks does one of them lack one.
    assert scheduler.stats().preemptions == (num_kv_blocks == 28)


def test_prefix_hit_gives_the_same_answer(make: Make) -> None:
    engine = make()
    expected = golden_ids("two_images", "greedy_ids")
    assert engine.tokens(engine.request("two_images")) == [expected]
    [[chunks]] = engine.answer(engine.request("two_images"))
    assert [token for chunk in chunks for token in chunk.token_ids] == expected
    prompt_length = len(tensors("two_images")["input_ids"])
    assert chunks[-1].num_cached_tokens == (prompt_length - 1) // 16 * 16


@pytest.mark.parametrize("digest", [b"two_images/1", b""], ids=["known", "unknown"])
def test_pictures_that_follow_the_prompt(digest: bytes, make: Make) -> None:
    engine = make()
    expected = golden_ids("two_images", "greedy_ids")
    for n in (2, 1):  # The second time from the prefix cache.
        request = engine.request("two_images", n=n)
        first, second = request.images
        assert second.embeddings is not None
        early = msgspec.structs.replace(request, images=[first, ImageSlot(ranges=second.ranges, digest=digest)])
        assert engine.core.handle(early) == []
        chunks = []
        while engine.core.scheduler.has_work:
            chunks += engine.core.step().chunks
        assert bool(chunks) == (n == 1 and digest != b"")
        assert engine.core.handle(AddEmbeddings(request.request_id, 1, second.embeddings)) == []
        assert engine.arena.num_leases == 0
        while engine.core.scheduler.has_work:
            chunks += engine.core.step().chunks
        engine.core.scheduler.check()
        for index in range(n):
            assert [token for one in chunks if one.index == index for token in one.token_ids] == expected


def test_another_picture_is_no_hit(make: Make, embeddings: dict[str, list[torch.Tensor]]) -> None:
    engine = make()
    engine.tokens(engine.request("image1"))
    # The same prompt and the same shape of embeddings: only the digest tells the two pictures apart.
    request = engine.request("image1")
    [slot] = request.images
    other = engine.arena.publish(embeddings["image1"][0].flip(0), b"another picture")
    assert slot.embeddings is not None
    engine.arena.release(slot.embeddings)
    flipped = Generate(
        request_id="flipped", prompt_token_ids=request.prompt_token_ids, sampling=request.sampling,
        images=[ImageSlot(ranges=slot.ranges, embeddings=other)],
    )  # fmt: skip
    [[chunks]] = engine.answer(flipped)
    assert chunks[-1].num_cached_tokens < slot.ranges[0][0]
    assert [token for chunk in chunks for token in chunk.token_ids] != golden_ids("image1", "greedy_ids")


def test_a_prompt_of_one_token_behind_a_long_one(make: Make) -> None:
    # The runner puts it first, as a decode: its token must still come back as its own.
    engine = make()

    def short() -> Generate:
        return msgspec.structs.replace(engine.request("text_only"), prompt_token_ids=[5])

    [alone] = engine.tokens(short())
    long = golden_ids("text_only", "greedy_ids")
    assert alone != long
    assert engine.tokens(engine.request("text_only"), short(), engine.request("bang_text")) == [
        long,
        alone,
        golden_ids("bang_text", "greedy_ids"),
    ]


def test_n_sequences_share_their_prompt(make: Make) -> None:
    engine = make()
    [answers] = engine.answer(engine.request("image1", n=3))
    expected = golden_ids("image1", "greedy_ids")
    assert [[token for chunk in chunks for token in chunk.token_ids] for chunks in answers] == [expected] * 3
    stats = engine.core.scheduler.stats()
    assert stats.cached_tokens >= 2 * (402 - 1) // 16 * 16


def test_eight_bits_do_not_depend_on_company_chunks_or_hits(make: Make) -> None:
    engine = make(kv_cache_dtype="fp8")
    alone = {case: engine.answer(engine.request(case, logprobs=True, top_logprobs=2))[0][0] for case in CASES}

    def check(engine: Engine, *cases: str) -> None:
        for case, tokens in zip(cases, engine.tokens(*[engine.request(case) for case in cases]), strict=True):
            for token, chunk in zip(tokens, alone[case], strict=True):
                if [token] != chunk.token_ids:
                    # A sum in another order may be rounded to another number of 8 bits; that tips a close choice.
                    assert chunk.logprobs is not None
                    (_, best), (_, second) = chunk.logprobs[0].top
                    assert best - second < 0.02
                    break

    check(engine, *CASES)
    assert engine.core.scheduler.stats().cached_tokens > 0
    check(make(kv_cache_dtype="fp8", num_kv_blocks=70, max_num_tokens=100, scheduler_policy="max_utilization"), *CASES)
    engine = make(
        num_kv_blocks=34, block_size=4, scheduler_policy="max_utilization", max_seq_len=136,
        enable_prefix_caching=False, kv_cache_dtype="fp8",
    )  # fmt: skip
    check(engine, "bang_text", "bang_text")
    assert engine.core.scheduler.stats().preemptions > 0
