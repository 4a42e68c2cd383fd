"""The plan of the memory: what it says for given sizes, whom it refuses, and that a GPU takes no more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ENVIRONMENT
from golden_data import TINY
from serving import ROOT

from foveate.checkpoint import plan as planning
from foveate.checkpoint.activations import GRAPH_BYTES, GRAPH_TOKENS, ROW_BYTES, graphs_bytes, language_step_bytes
from foveate.checkpoint.load import dummy_model
from foveate.checkpoint.memory import (
    CPU_CACHE_BYTES,
    GPU_CACHE_BATCHES,
    Machine,
    MemoryPlan,
    affordable_blocks,
    check,
    demand_of,
    plan_memory,
)
from foveate.checkpoint.plan import check_encoder, first_look, machine_of, plan_service, weight_bytes
from foveate.config import Settings
from foveate.engine import graphs
from foveate.errors import ConfigError
from foveate.models.config import ModelConfig
from foveate.quantization.scheme import Method, Quantization

CPU = torch.device("cpu")
GIB = 2**30
PRESET = ROOT / "foveate" / "models" / "presets" / "minicpm-v-2_6"
REAL = ModelConfig.from_folder(PRESET)


def settings_of(folder: Path = TINY, **sections: Any) -> Settings:
    model = {"model": str(folder), "device": "cpu", "load_format": "dummy", **sections.pop("model", {})}
    return Settings.model_validate({"model": model, **sections})


def on_gpu(free: int, *, method: Method = "none", **sections: Any) -> MemoryPlan:
    """Plan the published size for a GPU with so many bytes free, although there is none."""
    quantization = Quantization(method=method)
    settings = settings_of(PRESET, **sections)
    demand = demand_of(settings, settings.engine.max_seq_len or 32768, quantization, is_gpu=True, contexts=1)
    gpu = Machine(device="a GPU", memory_bytes=80 * GIB, free_bytes=free, is_gpu=True)
    return plan_memory(REAL, weight_bytes(REAL, quantization, torch.bfloat16), 2, demand, gpu)


@pytest.mark.parametrize("method", ["none", "int8", "fp8", "int4"])
def test_weights_are_what_a_model_has(method: Method) -> None:
    config, quantization = ModelConfig.from_folder(TINY), Quantization(method=method)
    model = dummy_model(config, CPU, torch.float32, quantization=quantization)
    for part, planned in weight_bytes(config, quantization, torch.float32).items():
        module = model.get_submodule(part)
        tensors = {id(tensor): tensor.nbytes for tensor in (*module.parameters(), *module.buffers())}
        assert planned == sum(tensors.values())


def test_the_share_is_of_what_everything_else_leaves() -> None:
    for share in (0.25, 0.9, 1.0):
        plan = on_gpu(40 * GIB, method="int8", engine={"kv_cache_free_mem_fraction": share})
        left = 40 * GIB - plan.fixed_bytes
        assert plan.kv_blocks == int(left * share) // plan.kv_block
        assert plan.fixed_bytes + plan.kv_blocks * plan.kv_block <= 40 * GIB
    assert plan.kv_block == 64 * 28 * 2 * 4 * 128 * 2
    assert plan.fixed_bytes > sum(plan.weights.values()) + plan.vision_step + plan.language_step + ROW_BYTES


def test_bounds_of_keys_and_values() -> None:
    def blocks(left: int, *, is_gpu: bool) -> int:
        return affordable_blocks(left, 100, 10, 0.5, is_gpu=is_gpu)

    assert blocks(-1, is_gpu=True) == 0
    assert blocks(1000, is_gpu=True) == blocks(1000, is_gpu=False) == 5
    assert blocks(GIB, is_gpu=True) == GPU_CACHE_BATCHES * 10
    assert blocks(GIB, is_gpu=False) == 4 * 10
    assert affordable_blocks(64 * GIB, 1, 2**40, 0.9, is_gpu=False) == CPU_CACHE_BYTES


def test_keys_and_values_of_8_bits_take_half() -> None:
    usual, small = (on_gpu(40 * GIB, engine={"kv_cache_dtype": name}) for name in ("auto", "fp8"))
    assert 2 * small.kv_block == usual.kv_block
    assert small.kv_tokens == pytest.approx(2 * usual.kv_tokens, rel=0.01)


def test_more_of_everything_takes_more() -> None:
    usual = dict(on_gpu(40 * GIB, method="int8").parts())
    batch = dict(on_gpu(40 * GIB, method="int8", engine={"max_batch_size": 64}).parts())
    tokens = dict(on_gpu(40 * GIB, method="int8", engine={"max_num_tokens": 8192}).parts())
    slices = dict(on_gpu(40 * GIB, method="int8", vision={"vision_batch_size": 32}).parts())
    guesses = dict(on_gpu(40 * GIB, method="int8", engine={"speculation": "prompt_lookup"}).parts())
    small = dict(on_gpu(40 * GIB, method="int8", engine={"kv_cache_dtype": "fp8"}).parts())
    plain = dict(on_gpu(40 * GIB, model={"kernels": "reference"}, method="int8").parts())
    changed = {
        name: {key for key in usual if found[key] != usual[key]}
        for name, found in (
            ("batch", batch),
            ("tokens", tokens),
            ("slices", slices),
            ("guesses", guesses),
            ("small", small),
            ("plain", plain),
        )
    }
    language, vision = "largest step, language (estimate)", "largest step, vision (estimate)"
    graph, tables = "CUDA graphs (estimate)", "sequences' state and tables"
    assert changed == {
        "batch": {language, graph, tables}, "tokens": {language}, "slices": {vision},
        "guesses": {language, graph, tables}, "small": {tables}, "plain": {language, vision, graph},
    }  # fmt: skip
    assert batch[language] > usual[language]
    assert tokens[language] > 3 * usual[language]
    # A step of twice the slices takes nearly twice as much; what the encoder's graphs keep beside it does not grow.
    assert 1.5 < slices[vision] / usual[vision] < 2
    assert plain[graph] == 0


def test_embeddings_are_planned_where_they_wait() -> None:
    def pictures(**sections: Any) -> int:
        return on_gpu(40 * GIB, **sections).pictures

    arena = 256 * 2**20
    alone = pictures(transport={"transport": "arena"})
    assert pictures() == pictures(transport={"transport": "cuda-ipc"}) == alone + arena
    assert pictures(vision={"encoder": "engine"}) == alone
    cpu = demand_of(settings_of(), 1024, Quantization(), is_gpu=False)
    assert (cpu.handed_over, cpu.cached) == (arena, arena)


@pytest.mark.parametrize("speculation", ["none", "prompt_lookup"])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 12, 16, 64])
def test_all_graphs_are_counted(rows: int, speculation: str) -> None:
    settings = settings_of(engine={"max_batch_size": rows, "speculation": speculation})
    demand = demand_of(settings, 1024, Quantization(), is_gpu=True)
    sizes = [*graphs.decode_sizes(rows), *graphs.verify_sizes(settings.engine.verified_rows())]
    # Whether adjusted or not, each row greedy, or drawn from one of four widths.
    number = 2 * 5 * len(sizes) + len(graphs.forward_sizes(rows, GRAPH_TOKENS))
    assert graphs.MOST_TOKENS == GRAPH_TOKENS
    assert number * GRAPH_BYTES < graphs_bytes(REAL.language, demand, 2) < (number + 44) * GRAPH_BYTES + 2 * GIB


def test_who_does_not_fit_is_told_what_takes_how_much() -> None:
    check(on_gpu(24 * GIB, method="int8"))
    plan = on_gpu(12 * GIB)
    with pytest.raises(ConfigError) as refused:
        check(plan)
    first, *lines, remedies = refused.value.message.splitlines()
    assert first == "the model does not fit the memory of a GPU (80.0 GiB):"
    rows = dict(re.split(r"  +", line.strip()) for line in lines)
    assert rows["weights, language"] == "14.2 GiB"
    assert rows["keys and values of 1,024 tokens"] == "56.0 MiB"
    assert rows["free"] == "12.0 GiB"
    assert float(rows["in all"].split()[0]) == pytest.approx((plan.fixed_bytes + 56 * 2**20) / GIB, abs=0.1)
    assert "--quantization int8" in remedies


def test_a_length_that_was_asked_for_has_to_fit() -> None:
    free = on_gpu(40 * GIB, method="int8").fixed_bytes + GIB
    check(on_gpu(free, method="int8"))
    with pytest.raises(ConfigError, match="keys and values of 32,768 tokens"):
        check(on_gpu(free, method="int8", engine={"max_seq_len": 32768}))
    check(on_gpu(free, method="int8", engine={"max_seq_len": 8192}))
    check(on_gpu(free, method="int8", engine={"num_kv_blocks": 4}))
    with pytest.raises(ConfigError, match="keys and values of 32,768 tokens"):
        check(on_gpu(free, method="int8", engine={"num_kv_blocks": 512}))


def test_an_encoder_elsewhere_takes_nothing(tmp_path: Path) -> None:
    machine = first_look(tmp_path, CPU)
    beside = plan_service(settings_of(), CPU, machine)
    alone = plan_service(settings_of(vision={"encoder": "none"}), CPU, machine)
    assert set(beside.weights) == {"language", "vision"}
    assert set(alone.weights) == {"language"}
    assert (alone.vision_step, alone.pictures) == (0, 0)


def test_the_first_look_is_everybody_s(tmp_path: Path) -> None:
    first = first_look(tmp_path, CPU)
    ballast = bytearray(64 * 2**20)
    assert first_look(tmp_path, CPU) == first
    assert len(list(tmp_path.iterdir())) == 1
    assert ballast[0] == 0


def test_an_encoder_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_encoder(settings_of()) > 0
    little = Machine(device="cpu", memory_bytes=GIB, free_bytes=GIB // 64, is_gpu=False)
    monkeypatch.setattr(planning, "machine_of", lambda _: little)
    with pytest.raises(ConfigError, match=r"the vision encoder does not fit.*\n  weights, vision") as refused:
        check_encoder(settings_of())
    assert "--vision-batch-size" in refused.value.message


def test_the_engine_ends_before_it_loads(tmp_path: Path) -> None:
    """Whatever this machine has, a length of this size is too much for it."""
    settings = settings_of(engine={"num_kv_blocks": 2**30})
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    result = subprocess.run(
        [sys.executable, "-m", "foveate.worker", str(tmp_path)], env=ENVIRONMENT, check=False, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: the model does not fit the memory of cpu")
    assert "weights, vision" in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["none", "int8"])
@pytest.mark.parametrize(("rows", "speculation"), [(8, "none"), (8, "prompt_lookup"), (64, "none")])
def test_a_gpu_s_largest_steps_are_planned(method: Method, rows: int, speculation: str) -> None:
    from foveate.worker import _activation_bytes

    device, quantization = torch.device("cuda"), Quantization(method=method)
    settings = settings_of(PRESET, engine={"max_batch_size": rows, "speculation": speculation})
    model = dummy_model(REAL, device, torch.bfloat16, part="language", quantization=quantization).language
    measured = _activation_bytes(model, settings.engine)
    demand = demand_of(settings, 32768, quantization, is_gpu=True)
    planned = language_step_bytes(REAL.language, demand, 2)
    print(f"{method}, {rows} rows: measured {measured / 2**20:.0f} MiB, planned {planned / 2**20:.0f} MiB")
    assert measured <= planned <= 1.25 * measured


@pytest.mark.gpu
@pytest.mark.parametrize("slices", [4, 16])
def test_a_gpu_s_largest_encoder_step_is_planned(slices: int) -> None:
    from foveate.chat.assets import ModelFacts
    from foveate.vision.encoder import VisionEncoder
    from foveate.vision.service import measure

    device = torch.device("cuda")
    settings = settings_of(PRESET, model={"device": "cuda"}, vision={"vision_batch_size": slices})
    encoder = VisionEncoder(
        dummy_model(REAL, device, torch.bfloat16, part="vision").vision, mean=[0.5] * 3, std=[0.5] * 3,
        batch_size=slices,
    )  # fmt: skip
    measured = measure(encoder, ModelFacts.from_folder(PRESET).pictures, slices)
    planned = check_encoder(settings)
    print(f"{slices} slices: measured {measured / 2**20:.0f} MiB, planned {planned / 2**20:.0f} MiB")
    assert measured <= planned <= 1.25 * measured


@pytest.mark.gpu
def test_keys_and_values_of_a_gpu_get_their_share() -> None:
    from foveate.engine.runner import ModelRunner

    device = torch.device("cuda")
    model = dummy_model(REAL, device, torch.bfloat16, part="language", quantization=Quantization(method="int8"))
    settings = settings_of(PRESET, engine={"kv_cache_free_mem_fraction": 0.25, "cuda_graphs": False}).engine
    torch.cuda.empty_cache()
    before, reserved = machine_of(device).free_bytes, 4 * GIB
    runner = ModelRunner(model.language, settings, 4096, reserved_bytes=reserved)
    assert runner.kv_cache.nbytes == pytest.approx((before - reserved) * 0.25, rel=0.02)
    assert before - machine_of(device).free_bytes == pytest.approx(runner.kv_cache.nbytes, rel=0.02)
