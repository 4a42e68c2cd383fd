"""Keys and values in 8 bits: what that costs, and what it must never do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden_data import CASES, TINY, tensors
from torch import Tensor

from foveate.checkpoint.load import load_model
from foveate.config import EngineSettings
from foveate.engine.messages import SamplingParams
from foveate.engine.runner import ModelRunner
from foveate.engine.scheduler import Scheduler
from foveate.engine.sequence import Sequence
from foveate.engine.state import SequenceState
from foveate.kernels import ops, reference
from foveate.kernels.kv_cache import FP8, KeyOffset, raw
from foveate.models.qwen2 import Qwen2

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Half of the distance between two numbers of 8 bits: of one that has all its bits, and of the smallest.
RELATIVE, SMALLEST = 2**-4, 2**-10


@pytest.fixture(scope="module", params=DEVICES)
def tiny(request: pytest.FixtureRequest) -> Qwen2:
    return load_model(TINY, torch.device(request.param), torch.float32, part="language").language


def runner_of(model: Qwen2, **settings: Any) -> tuple[ModelRunner, EngineSettings]:
    chosen = EngineSettings(**{"num_kv_blocks": 64, "max_num_tokens": 64, "cuda_graphs": False} | settings)
    return ModelRunner(model, chosen, 1024), chosen


def last_logits(model: Qwen2, case: str, **settings: Any) -> Tensor:
    """The logits behind a prompt that is prefilled in chunks, and decoded one step further."""
    runner, chosen = runner_of(model, **settings)
    found = []
    choose = runner._choose

    def spied(logits: Tensor, *rest: Any) -> Tensor:
        found.append(logits.clone())
        return choose(logits, *rest)

    runner._choose = spied  # type: ignore
    scheduler = Scheduler(chosen, num_blocks=runner.num_blocks, block_size=runner.block_size, max_seq_len=1024)
    seq = Sequence(
        request_id="one",
        prompt_token_ids=tensors(case)["input_ids"].tolist(),
        sampling=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, logit_bias={7: 1e4}),
        eos_token_ids=frozenset(),
        max_seq_len=1024,
    )
    seq.payload = SequenceState(seed=0)
    scheduler.add(seq)
    while (batch := scheduler.schedule()) is not None:
        scheduler.update(batch, runner.run(batch).token_ids)
    return torch.stack((found[-2][0], found[-1][0]))


def test_block_sizes() -> None:
    assert EngineSettings().tokens_per_block(on_gpu=True) == 64
    assert EngineSettings().tokens_per_block(on_gpu=False) == 16
    assert {EngineSettings(block_size=7).tokens_per_block(on_gpu=on_gpu) for on_gpu in (True, False)} == {7}


def test_the_cache(tiny: Qwen2) -> None:
    runners = [runner_of(tiny, kv_cache_dtype=kind)[0] for kind in ("auto", "fp8")]
    own, eight = (runner.kv_cache for runner in runners)
    assert (own.dtype, eight.dtype) == (torch.float32, FP8)
    assert own.nbytes == 4 * eight.nbytes
    assert not raw(eight).any()
    assert {runner.block_size for runner in runners} == {64 if own.is_cuda else 16}
    size = 2 * tiny.config.num_hidden_layers * tiny.config.num_key_value_heads * tiny.config.head_dim
    assert eight.nbytes == 64 * runners[0].block_size * size


def test_eight_bits_take_a_part_of_the_memory(tiny: Qwen2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.checkpoint.memory.CPU_CACHE_BYTES", 2**22)
    if tiny.embed_tokens.weight.is_cuda:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**22, 2**40))
    own, eight = (runner_of(tiny, kv_cache_dtype=kind, num_kv_blocks=None)[0] for kind in ("auto", "fp8"))
    assert 0 <= eight.num_blocks - 4 * own.num_blocks < 4


def test_attention_is_off_by_no_more_than_the_format(tiny: Qwen2) -> None:
    config, device = tiny.config, tiny.embed_tokens.weight.device
    ids = tensors("image1")["input_ids"].to(device)
    tokens = torch.arange(len(ids), device=device)
    angles = tiny.rotary_table(len(ids))
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    table, ends = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.tensor([0, len(ids)], device=device).int()
    compared = 0

    def attended(qkv: Tensor, dtype: torch.dtype, offset: KeyOffset | None) -> tuple[Tensor, list[Tensor]]:
        caches = [raw(torch.zeros(1, len(ids), kv_heads, head_dim, device=device).to(dtype)).view(dtype) for _ in "kv"]
        query = ops.rotary_write(qkv, angles, tokens, tokens, caches[0], caches[1], heads, offset)
        found = ops.paged_prefill_attention(query, *caches, table, ends, ends[1:], len(ids), offset)
        return found, [query, *(cache[0] for cache in caches)]

    def compare(layer: int, qkv: Tensor) -> Tensor:
        nonlocal compared
        offset = KeyOffset(tiny.key_bias(layer), angles)
        exact, (query, key, value) = attended(qkv, torch.float32, None)
        found, _ = attended(qkv, FP8, offset)
        _, (_, small_key, _) = attended(qkv, torch.float32, offset)
        spread = [torch.clamp(tensor.abs() * RELATIVE, min=SMALLEST) for tensor in (small_key, value)]
        q, k, v, key_error, value_error = (
            tensor.repeat_interleave(heads // tensor.shape[1], 1).transpose(0, 1).double()
            for tensor in (query, key, value, *spread)
        )
        hidden = torch.ones(len(ids), len(ids), dtype=torch.bool, device=device).triu(1)
        weights = (q @ k.mT * head_dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        # A score is off by this much at most, and so a weight by this factor.
        score_error = (q.abs() @ key_error.mT * head_dim**-0.5).masked_fill(hidden, 0).amax(-1, keepdim=True)
        factor = (2 * score_error).exp()
        bound = (factor - 1) * (weights @ (v.abs() + value_error)) + weights @ value_error
        assert ((found - exact).abs() <= bound.transpose(0, 1) + 1e-5).all()
        assert 0.01 < (found - exact).norm() / exact.norm() < 0.1
        compared += 1
        return exact

    with torch.inference_mode():
        tiny.run(tiny.embed_tokens(ids), compare)
    assert compared == config.num_hidden_layers


@pytest.mark.parametrize("case", CASES)
def test_logits_stay_near(case: str, tiny: Qwen2) -> None:
    own, eight = (last_logits(tiny, case, kv_cache_dtype=kind) for kind in ("auto", "fp8"))
    # Three layers' attention is off by 6 per cent each; random weights as these pass that on undiminished.
    assert 0.01 < (eight - own).norm() / own.norm() < 0.4


def biased(model: Qwen2, first: int, size: float) -> Qwen2:
    """A copy in which keys or values have a large bias in some channels, which of a key turn slowly."""
    changed = copy.deepcopy(model)
    head_dim = model.config.head_dim
    for layer in range(model.config.num_hidden_layers):
        bias = changed.get_submodule(f"layers.{layer}.qkv_proj").bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias[first + head_dim - 2 : first + head_dim] = size
            bias[first + head_dim // 2 - 1] = -size
    return changed


@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_large_biases_of_keys_cost_nothing(size: float, tiny: Qwen2) -> None:
    model = biased(tiny, tiny.config.num_attention_heads * tiny.config.head_dim, size)
    own, eight = (last_logits(model, "text_only", kv_cache_dtype=kind) for kind in ("auto", "fp8"))
    assert 0.01 < (eight - own).norm() / own.norm() < 0.4


def test_values_that_are_too_large_stay_numbers(tiny: Qwen2) -> None:
    config = tiny.config
    model = biased(tiny, (config.num_attention_heads + config.num_key_value_heads) * config.head_dim, 1000.0)
    assert last_logits(model, "text_only", kv_cache_dtype="fp8").isfinite().all()


@pytest.mark.parametrize("number", [449.0, 1000.0, float("inf")])
def test_what_is_too_large_is_cut_off(number: float) -> None:
    caches = [torch.zeros(1, 2, 1, 2).to(FP8) for _ in range(2)]
    new = torch.tensor([[[number, -number]]])
    reference.write_kv(caches[0], caches[1], new, new, torch.tensor([1]))
    for cache in caches:
        assert cache.flatten().float().tolist() == [0.0, 0.0, 448.0, -448.0]
