"""What a model takes of a machine's memory, worked out before it is loaded. Nothing here needs torch.

The engine and the encoder measure their largest steps when they start, and plan with what is left then; the steps here
are estimates from the layers' sizes, and the plan says beforehand about how it will turn out.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

import msgspec
import psutil

from foveate.models.config import LanguageConfig, ModelConfig

CPU_CACHE_BYTES = 4 * 2**30
CPU_CACHE_BATCHES, GPU_CACHE_BATCHES = 4, 16
"""The engine's own bounds for keys and values: bytes on a CPU, and full batches."""
_CONTEXT_BYTES = 512 * 2**20
"""What a process takes of a GPU before its first tensor: context, kernels, the libraries' work space."""
_SLICE_PATCHES = 33 * 34
"""Patches of the largest usual slice of 448 by 448 pixels: both sides rounded up."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where the model would run: ``memory_bytes`` in all, ``free_bytes`` now."""

    device: str
    memory_bytes: int
    free_bytes: int
    is_gpu: bool


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What the settings ask for; sizes in tokens, slices and bytes."""

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    vision_batch_size: int
    block_size: int
    memory_fraction: float


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory goes, in bytes.

    Attributes:
        machine: where.
        dtype: of weights that are not quantized, and of keys and values.
        weights: by part.
        vision_step: the encoder's largest step, estimated.
        language_step: the language model's largest step, estimated.
        overhead: taken by the processes themselves.
        kv_block: one block of keys and values.
        kv_blocks: how many there will be.
        kv_tokens: tokens that they hold.
        fits: whether they hold a sequence of the greatest length.
    """

    machine: Machine
    dtype: str
    weights: dict[str, int]
    vision_step: int
    language_step: int
    overhead: int
    kv_block: int
    kv_blocks: int
    kv_tokens: int
    fits: bool


def this_machine() -> list[Machine]:
    """Describe the first GPU, if NVIDIA's driver shows one, and the CPU's memory."""
    memory = psutil.virtual_memory()
    cpu = Machine(device="cpu", memory_bytes=memory.total, free_bytes=memory.available, is_gpu=False)
    return [*_gpu(), cpu]


def gpu_of(memory_bytes: int) -> Machine:
    """Imagine a GPU of which nothing is in use."""
    return Machine(device="gpu", memory_bytes=memory_bytes, free_bytes=memory_bytes, is_gpu=True)


def _gpu() -> list[Machine]:
    # The driver's own tool: asking torch takes seconds, and a context on the device.
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        name, total, free = found.stdout.strip().rsplit(",", 2)
        return [Machine(device=name, memory_bytes=int(total) << 20, free_bytes=int(free) << 20, is_gpu=True)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []  # A tool without a driver: there is no GPU to plan for.


def plan_memory(
    config: ModelConfig, weights: Mapping[str, int], item_bytes: int, demand: Demand, machine: Machine
) -> MemoryPlan:
    """Work out a plan.

    Args:
        config: the model.
        weights: bytes of each part's weights, as they will be in memory.
        item_bytes: bytes of one element of keys, values and activations.
        demand: limits that the model is to be served with.
        machine: where.
    """
    language = config.language
    block = demand.block_size * kv_token_bytes(language, item_bytes)
    full_batch = demand.max_batch_size * -(-demand.max_seq_len // demand.block_size)
    vision_step, language_step = (
        vision_step_bytes(config, demand.vision_batch_size, item_bytes),
        language_step_bytes(language, demand, item_bytes),
    )
    overhead = 2 * _CONTEXT_BYTES if machine.is_gpu else 0
    left = machine.free_bytes - overhead - sum(weights.values())
    if machine.is_gpu:
        free = int((left - vision_step - language_step) * demand.memory_fraction)
        plenty = GPU_CACHE_BATCHES * full_batch
    else:
        free = min(int(left * demand.memory_fraction), CPU_CACHE_BYTES)
        plenty = CPU_CACHE_BATCHES * full_batch
    blocks = min(max(free, 0) // block, plenty)
    return MemoryPlan(
        machine=machine, dtype={2: "bfloat16", 4: "float32"}[item_bytes], weights=dict(weights),
        vision_step=vision_step, language_step=language_step, overhead=overhead, kv_block=block, kv_blocks=blocks,
        kv_tokens=blocks * demand.block_size, fits=blocks * demand.block_size >= demand.max_seq_len,
    )  # fmt: skip


def kv_token_bytes(config: LanguageConfig, item_bytes: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * item_bytes


def language_step_bytes(config: LanguageConfig, demand: Demand, item_bytes: int) -> int:
    """Estimate the largest step: what is alive in the middle of an MLP, and the logits."""
    per_token = 4 * config.hidden_size + 4 * config.intermediate_size
    logits = demand.max_batch_size * config.vocab_size * (4 + item_bytes)
    return demand.max_num_tokens * per_token * item_bytes + logits


def vision_step_bytes(config: ModelConfig, vision_batch_size: int, item_bytes: int) -> int:
    """Estimate the largest step: what is alive in the middle of the encoder's MLP, or in the resampler's attention."""
    vision, hidden = config.vision, config.language.hidden_size
    encoder = 4 * vision.hidden_size + 2 * vision.intermediate_size
    # The features; values and keys, before and after their projection, and one more while that happens.
    resampler = vision.hidden_size + 5 * hidden
    return vision_batch_size * _SLICE_PATCHES * max(encoder, resampler) * item_bytes
