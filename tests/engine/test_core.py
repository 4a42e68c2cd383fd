"""What the engine refuses, and what it survives."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from golden_data import TINY

from foveate.checkpoint.load import load_model
from foveate.config import EngineSettings
from foveate.engine.core import EngineCore
from foveate.engine.messages import (
    Abort,
    AddEmbeddings,
    Chunk,
    Failure,
    Generate,
    GetStats,
    ImageSlot,
    SamplingParams,
    Stats,
    Step,
)
from foveate.engine.runner import ModelRunner
from foveate.engine.scheduler import Scheduler
from foveate.models.minicpmv import MiniCPMV
from foveate.transport.local import LocalArena
from foveate.transport.sources import Sources


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return load_model(TINY, torch.device("cpu"), torch.float32)


@pytest.fixture
def arena() -> LocalArena:
    return LocalArena("test")


@pytest.fixture(params=[0, 1], ids=["synchronous", "overlapped"])
def core(request: pytest.FixtureRequest, model: MiniCPMV, arena: LocalArena) -> EngineCore:
    settings = EngineSettings(max_seq_len=200, num_kv_blocks=64, max_queue_size=2)
    runner = ModelRunner(model.language, settings, 200)
    scheduler = Scheduler(
        settings, num_blocks=runner.num_blocks, block_size=runner.block_size, max_seq_len=200, depth=request.param
    )
    sources = Sources(torch.device("cpu"), arena)
    return EngineCore(runner, scheduler, sources, eos_token_ids=frozenset({702}), max_seq_len=200)


def generate(request_id: str = "r", prompt: list[int] | None = None, n: int = 1, **sampling: Any) -> Generate:
    params = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, "ignore_eos": True} | sampling)
    return Generate(request_id=request_id, prompt_token_ids=prompt or [5, 6, 7], sampling=params, n=n)


def refusal(core: EngineCore, request: Generate) -> Failure:
    [reply] = core.handle(request)
    assert isinstance(reply, Step)
    [failure] = reply.failures
    assert not core.scheduler.has_work
    return failure


def finish(core: EngineCore) -> tuple[list[Chunk], list[Failure]]:
    steps = []
    while core.scheduler.has_work:
        steps.append(core.step())
    core.scheduler.check()
    return [chunk for step in steps for chunk in step.chunks], [failure for step in steps for failure in step.failures]


def test_prompt_too_long(core: EngineCore) -> None:
    failure = refusal(core, generate(prompt=[1] * 200))
    assert (failure.code, failure.status) == ("context_length_exceeded", 400)
    assert "200" in failure.message
    assert "199" in failure.message


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (generate(prompt=[1, 723]), "the prompt has token id 723"),
        (generate(prompt=[-1]), "token id -1"),
        (generate(logit_bias={9999: 1.0}), "logit_bias has token id 9999"),
        (generate(stop_token_ids=[800]), "stop_token_ids has token id 800"),
    ],
)
def test_ids_outside_the_vocabulary(core: EngineCore, request_: Generate, name: str) -> None:
    failure = refusal(core, request_)
    assert failure.status == 400
    assert name in failure.message


def test_full_queue(core: EngineCore) -> None:
    failure = refusal(core, generate(n=3))
    assert (failure.code, failure.status) == ("overloaded", 503)
    assert failure.retry_after
    assert core.handle(generate("second", n=2)) == []


def test_embeddings_of_the_wrong_shape_are_refused_and_released(core: EngineCore, arena: LocalArena) -> None:
    handle = arena.publish(torch.zeros(3, 256), b"d")
    request = msgspec.structs.replace(generate(), images=[ImageSlot(ranges=[(0, 2)], embeddings=handle)])
    assert "[3, 256]" in refusal(core, request).message
    assert arena.num_leases == 0


def test_a_handle_whose_lease_is_over_is_an_error(core: EngineCore, arena: LocalArena) -> None:
    handle = arena.publish(torch.zeros(2, 256), b"d")
    arena.release(handle)
    request = msgspec.structs.replace(generate(), images=[ImageSlot(ranges=[(0, 2)], embeddings=handle)])
    assert refusal(core, request).code == "unavailable"


def early(core: EngineCore, arena: LocalArena) -> None:
    """Send a prompt whose second picture follows, and have it computed as far as that."""
    first = ImageSlot(ranges=[(1, 1)], embeddings=arena.publish(torch.zeros(1, 256), b"d"))
    images = [first, ImageSlot(ranges=[(3, 2)])]
    assert core.handle(msgspec.structs.replace(generate(prompt=[5] * 6), images=images)) == []
    assert finish(core) == ([], [])
    assert core.scheduler.stats().num_running == 1


def test_a_picture_that_follows_has_its_time(core: EngineCore, arena: LocalArena) -> None:
    early(core, arena)
    assert core.handle(AddEmbeddings("r", 1, arena.publish(torch.ones(2, 256), b"e"))) == []
    assert arena.num_leases == 0
    chunks, failures = finish(core)
    assert not failures
    times = [chunk.times for chunk in chunks if chunk.times is not None]
    assert len(times) == 1
    assert min(times[0].read, times[0].wait, times[0].prefill) > 0


def test_a_picture_that_follows_and_does_not_fit_ends_its_request(core: EngineCore, arena: LocalArena) -> None:
    early(core, arena)
    [reply] = core.handle(AddEmbeddings("r", 1, arena.publish(torch.ones(3, 256), b"e")))
    assert isinstance(reply, Step)
    assert [(failure.request_id, failure.status) for failure in reply.failures] == [("r", 400)]
    assert arena.num_leases == 0
    assert core.scheduler.stats().free_blocks == core.runner.num_blocks


@pytest.mark.parametrize("image", [0, 1, 7])
def test_pictures_that_nobody_waits_for_are_released(core: EngineCore, arena: LocalArena, image: int) -> None:
    early(core, arena)
    if image == 1:
        core.handle(Abort("r"))
    assert core.handle(AddEmbeddings("r", image, arena.publish(torch.ones(9, 256), b"e"))) == []
    assert arena.num_leases == 0
    core.handle(Abort("r"))


def test_abort_frees_at_once(core: EngineCore) -> None:
    core.handle(generate(max_tokens=100))
    core.step()
    [running] = core.handle(GetStats())
    assert isinstance(running, Stats)
    assert running.num_running == 1
    assert running.free_blocks < running.total_blocks
    core.handle(Abort("r"))
    [stats] = core.handle(GetStats())
    assert isinstance(stats, Stats)
    assert (stats.num_running, stats.num_waiting, stats.free_blocks) == (0, 0, stats.total_blocks)
    core.handle(Abort("never there"))


def test_abort_of_one_of_several(core: EngineCore) -> None:
    core.handle(generate(n=2))
    core.handle(Abort("r", 0))
    chunks, failures = finish(core)
    assert not failures
    assert {chunk.index for chunk in chunks} == {1}
    assert chunks[-1].finish_reason == "length"


def test_a_failing_step_ends_its_requests_and_no_others(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = core.handle(generate("before")), finish(core)
    assert before == []
    core.handle(generate("broken", n=2))

    def explode(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(core.runner, "_run", explode)
        chunks, failures = finish(core)
    assert not chunks
    assert [(failure.request_id, failure.code, failure.status) for failure in failures] == [
        ("broken", "engine_error", 500)
    ]
    assert "luck" not in failures[0].message
    core.handle(generate("after"))
    chunks, failures = finish(core)
    assert not failures
    assert sum(len(chunk.token_ids) for chunk in chunks) == 4


@pytest.mark.parametrize("place", ["_run", "collect"])
def test_a_step_without_enough_memory_ends_its_requests_only(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    core.handle(generate("large"))

    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(core.runner, place, run_out)
        chunks, failures = finish(core)
    assert not chunks
    assert [(failure.request_id, failure.code, failure.status) for failure in failures] == [
        ("large", "overloaded", 503)
    ]
    assert failures[0].retry_after
    core.handle(generate("after"))
    chunks, failures = finish(core)
    assert not failures
    assert sum(len(chunk.token_ids) for chunk in chunks) == 4


def test_pictures_without_enough_memory_end_their_request_only(
    core: EngineCore, arena: LocalArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    request = msgspec.structs.replace(
        generate(), images=[ImageSlot(ranges=[(0, 2)], embeddings=arena.publish(torch.zeros(2, 256), b"d"))]
    )
    with monkeypatch.context() as patch:
        patch.setattr(core.sources, "read", run_out)
        failure = refusal(core, request)
    assert (failure.code, failure.status) == ("overloaded", 503)
    assert arena.num_leases == 0


def test_a_picture_that_follows_without_enough_memory_ends_its_request_only(
    core: EngineCore, arena: LocalArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    early(core, arena)
    with monkeypatch.context() as patch:
        patch.setattr(core.sources, "read", run_out)
        [reply] = core.handle(AddEmbeddings("r", 1, arena.publish(torch.ones(2, 256), b"e")))
    assert isinstance(reply, Step)
    assert [(failure.request_id, failure.code) for failure in reply.failures] == [("r", "overloaded")]
    assert arena.num_leases == 0
    assert core.scheduler.stats().free_blocks == core.runner.num_blocks


def test_results_that_cannot_be_read_end_the_steps_behind_them(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.handle(generate("first"))
    first = core.step()
    core.handle(generate("second"))

    def explode(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(core.runner, "collect", explode)
        chunks, failures = finish(core)
    assert not chunks
    assert sorted(failure.request_id for failure in failures) == ["first", "second"]
    assert len(first.chunks) == 1 - core.scheduler.depth
    core.handle(generate("after"))
    chunks, failures = finish(core)
    assert not failures
    assert sum(len(chunk.token_ids) for chunk in chunks) == 4


def test_a_lost_device_ends_the_process(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise torch.AcceleratorError("gone")

    core.handle(generate())
    monkeypatch.setattr(core.runner, "launch", lose)
    with pytest.raises(torch.AcceleratorError):
        core.step()


def test_logprobs_come_with_their_tokens(core: EngineCore) -> None:
    core.handle(generate("with", logprobs=True, top_logprobs=2, max_tokens=6))
    core.handle(generate("few", logprobs=True, max_tokens=6, prompt=[9, 8]))
    first = core.step().chunks
    core.handle(generate("without", max_tokens=6, prompt=[3, 4, 5, 6]))
    chunks = first + finish(core)[0]
    alone: dict[str, list[int]] = {}
    for chunk in chunks:
        [token] = chunk.token_ids
        alone.setdefault(chunk.request_id, []).append(token)
        if chunk.request_id == "without":
            assert chunk.logprobs is None
            continue
        assert chunk.logprobs is not None
        [logprob] = chunk.logprobs
        assert logprob.token_id == token
        assert logprob.logprob < 0
        if chunk.request_id == "with":
            assert [logprob.top[0]] == [(token, logprob.logprob)]  # Greedy: the token is the likeliest.
            assert len(logprob.top) == 2
        else:
            assert logprob.top == []
    assert {name: len(tokens) for name, tokens in alone.items()} == {"with": 6, "few": 6, "without": 6}


def test_an_end_token_has_no_logprob(core: EngineCore) -> None:
    core.handle(generate(ignore_eos=False, logit_bias={702: 100.0}, logprobs=True))
    [chunk], _ = finish(core)
    assert (chunk.finish_reason, chunk.logprobs) == ("stop", None)


def test_seeds_of_n_sequences_differ(core: EngineCore) -> None:
    def tokens(index: int, seed: int) -> list[int]:
        core.handle(generate(n=2, seed=seed, temperature=5.0, max_tokens=20))
        chunks, _ = finish(core)
        return [token for chunk in chunks if chunk.index == index for token in chunk.token_ids]

    assert tokens(0, 11) == tokens(0, 11)
    assert tokens(1, 11) == tokens(0, 12)
    assert tokens(0, 11) != tokens(1, 11)


def test_an_end_token_is_no_part_of_the_answer(core: EngineCore) -> None:
    core.handle(generate(ignore_eos=False, logit_bias={702: 100.0}))
    [chunk], _ = finish(core)
    assert (chunk.token_ids, chunk.finish_reason, chunk.stop_token) == ([], "stop", 702)
