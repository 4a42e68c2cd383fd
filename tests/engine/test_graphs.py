"""Steps that are replayed: the right size, once captured, and nothing but the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from golden_data import GOLDEN, TINY
from replays import Repeater

from foveate.checkpoint.load import dummy_model, load_model
from foveate.config import CacheDType, EngineSettings
from foveate.engine.graphs import MOST_TOKENS, decode_sizes, forward_sizes
from foveate.engine.messages import SamplingParams
from foveate.engine.runner import ModelRunner
from foveate.engine.scheduler import Scheduler
from foveate.engine.sequence import Sequence
from foveate.engine.state import SequenceState
from foveate.models.config import ModelConfig
from foveate.models.qwen2 import Qwen2
from foveate.quantization.scheme import Method, Quantization

PRESET = GOLDEN.parents[1] / "foveate/models/presets/minicpm-v-2_6"


def sequences(count: int, prompt: int, tokens: int, vocab_size: int, **sampling: Any) -> list[Sequence]:
    seqs = []
    for number in range(count):
        seq = Sequence(
            request_id=f"r{number}",
            prompt_token_ids=[(31 * number + 7 * place + 5) % vocab_size for place in range(prompt)],
            sampling=SamplingParams(**{"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True} | sampling),
            eos_token_ids=frozenset(),
            max_seq_len=1024,
        )
        seq.payload = SequenceState(seed=number)
        seqs.append(seq)
    return seqs


def answers(runner: ModelRunner, settings: EngineSettings, seqs: list[Sequence]) -> list[list[int]]:
    scheduler = Scheduler(
        settings, num_blocks=runner.num_blocks, block_size=runner.block_size, max_seq_len=runner.max_seq_len
    )
    scheduler.add(*seqs)
    while (batch := scheduler.schedule()) is not None:
        scheduler.update(batch, runner.run(batch).token_ids)
    return [seq.output_token_ids for seq in seqs]


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 16, 100, 256])
def test_sizes_of_decodes(most: int) -> None:
    sizes = decode_sizes(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    for number in range(1, most + 1):
        size = next(size for size in sizes if size >= number)
        assert size < max(2 * number, number + 8)


@pytest.mark.parametrize(("num_decodes", "most"), [(1, 9), (16, 80), (8, 1000), (16, 4000), (300, 4000), (2000, 4000)])
def test_sizes_of_steps_with_chunks(num_decodes: int, most: int) -> None:
    sizes = forward_sizes(num_decodes, most)
    assert sizes == sorted(set(sizes))
    assert all(num_decodes < size <= min(most, MOST_TOKENS) for size in sizes)
    assert (sizes[-1] if sizes else None) == (min(most, MOST_TOKENS) if num_decodes < MOST_TOKENS else None)


@pytest.fixture(scope="module")
def tiny() -> Qwen2:
    return load_model(TINY, torch.device("cpu"), torch.float32, part="language").language


def test_each_size_is_recorded_once(tiny: Qwen2) -> None:
    settings = EngineSettings(max_batch_size=4, num_kv_blocks=64, max_num_tokens=300, enable_prefix_caching=False)
    runner, recorder = ModelRunner(tiny, settings, 1024), Repeater()
    plain = answers(runner, settings, sequences(3, 20, 6, 700))
    runner.use_graphs(recorder)
    for _ in range(2):
        assert answers(runner, settings, sequences(3, 20, 6, 700)) == plain
        # One for the prompts' 60 tokens, one for 3 decodes.
        assert (recorder.recorded, recorder.repeated % 6) == (2, 0)
    assert recorder.repeated == 12
    # All of the usual ones: 64, 128, 256 and 304 tokens; 1, 2 and 4 decodes in two ways.
    runner.capture()
    assert recorder.recorded == 4 + 6
    runner.capture()
    assert recorder.recorded == 4 + 6


@pytest.mark.parametrize("graphs", [False, True])
def test_decodes_beside_chunks(tiny: Qwen2, graphs: bool) -> None:
    settings = EngineSettings(max_batch_size=4, num_kv_blocks=64, max_num_tokens=300, enable_prefix_caching=False)
    plain = answers(ModelRunner(tiny, settings, 1024), settings, sequences(3, 20, 6, 700))
    # Now the second and the third prompt are cut, and those before them have answers already.
    cut = settings.model_copy(update={"max_num_tokens": 24})
    runner = ModelRunner(tiny, cut, 1024)
    if graphs:
        runner.use_graphs(Repeater())
    assert answers(runner, cut, sequences(3, 20, 6, 700)) == plain


def test_a_rare_way_of_sampling_is_recorded_when_it_comes(tiny: Qwen2) -> None:
    settings = EngineSettings(max_batch_size=4, num_kv_blocks=64, max_num_tokens=300, enable_prefix_caching=False)
    runner, recorder = ModelRunner(tiny, settings, 1024), Repeater()

    def drawn() -> list[list[int]]:
        return answers(runner, settings, sequences(2, 20, 6, 700, temperature=1.0, top_p=0.5, frequency_penalty=0.3))

    plain = drawn()
    runner.use_graphs(recorder)
    runner.capture()
    before = recorder.recorded
    assert drawn() == plain
    assert recorder.recorded == before + 1


def test_steps_with_many_tokens_are_not_replayed(tiny: Qwen2) -> None:
    settings = EngineSettings(max_batch_size=2, num_kv_blocks=200, max_num_tokens=2000, enable_prefix_caching=False)
    runner, recorder = ModelRunner(tiny, settings, 1024), Repeater()
    plain = answers(runner, settings, sequences(2, 600, 3, 700))
    runner.use_graphs(recorder)
    assert answers(runner, settings, sequences(2, 600, 3, 700)) == plain
    assert (recorder.recorded, recorder.repeated) == (1, 2)


def test_warming_up_changes_nothing(tiny: Qwen2) -> None:
    settings = EngineSettings(max_batch_size=4, num_kv_blocks=64, max_num_tokens=300)
    runner, recorder = ModelRunner(tiny, settings, 1024), Repeater()
    plain = answers(runner, settings, sequences(3, 20, 6, 700))
    runner.use_graphs(recorder)
    cache = runner.kv_cache.clone()
    runner.warm_up()
    assert recorder.recorded == 0
    assert torch.equal(runner.kv_cache, cache)
    assert runner.capture() > 0
    assert torch.equal(runner.kv_cache, cache)
    assert answers(runner, settings, sequences(3, 20, 6, 700)) == plain


# On a GPU.

METHODS: list[tuple[Method, CacheDType]]
METHODS = [("none", "auto"), ("int8", "auto"), ("fp8", "auto"), ("int4", "auto"), ("none", "fp8"), ("int8", "fp8")]


def wide_model(method: Method, dtype: torch.dtype) -> Qwen2:
    """Two layers of the real size."""
    config = ModelConfig.from_folder(PRESET)
    language = dataclasses.replace(config.language, num_hidden_layers=2, vocab_size=20000)
    config = dataclasses.replace(config, language=language)
    quantization = Quantization(method=method)
    return dummy_model(config, torch.device("cuda"), dtype, part="language", quantization=quantization).language


def logits_of(runner: ModelRunner, settings: EngineSettings, count: int, prompt: int) -> list[torch.Tensor]:
    """The logits of every step, of the sequences that there are."""
    scheduler = Scheduler(
        settings, num_blocks=runner.num_blocks, block_size=runner.block_size, max_seq_len=runner.max_seq_len
    )
    scheduler.add(*sequences(count, prompt, 25, 20000))
    found = []
    choose = runner._choose

    def spied(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(logits.clone())
        return choose(logits, *rest)

    while (batch := scheduler.schedule()) is not None:
        before = len(found)
        runner._choose = spied if batch.num_tokens > count or runner._graphs is None else choose  # type: ignore
        scheduler.update(batch, runner.run(batch).token_ids)
        if len(found) == before:
            found.append(runner._logits[:count].clone())
    runner._choose = choose  # type: ignore
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 8, 16])
@pytest.mark.parametrize(("method", "cached"), METHODS)
def test_every_repetition_has_the_same_bits(method: Method, cached: CacheDType, count: int) -> None:
    settings = EngineSettings(max_batch_size=16, num_kv_blocks=512, enable_prefix_caching=False, kv_cache_dtype=cached)
    runner = ModelRunner(wide_model(method, torch.bfloat16), settings, 1024)
    first = logits_of(runner, settings, count, 60)
    for _ in range(3):
        again = logits_of(runner, settings, count, 60)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 8, 16])
@pytest.mark.parametrize(("method", "cached"), METHODS)
def test_graphs_have_the_same_bits_as_their_kernels(method: Method, cached: CacheDType, count: int) -> None:
    model = wide_model(method, torch.bfloat16)
    found = []
    for graphs in (False, True):
        settings = EngineSettings(
            max_batch_size=16, num_kv_blocks=512, enable_prefix_caching=False, cuda_graphs=graphs, kv_cache_dtype=cached
        )
        runner = ModelRunner(model, settings, 1024)
        if runner._graphs is not None:
            runner._graphs._forward_sizes = []  # Prompts of another length are rounded in another way.
        found.append(logits_of(runner, settings, count, 60))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
