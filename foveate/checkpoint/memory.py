"""What a model takes of a machine's memory, worked out before anything is loaded. Nothing here needs torch.

The steps are estimates (:mod:`foveate.checkpoint.activations`). They decide whether there is any use in loading; the
engine and the encoder then measure their largest steps, and keys and values get their share of what is really left.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping

import msgspec
import psutil

from foveate.checkpoint.activations import (
    ENCODED_BYTES,
    RESIZER_BYTES,
    ROW_BYTES,
    encoder_bytes,
    graphs_bytes,
    kv_token_bytes,
    language_step_bytes,
    tables_bytes,
)
from foveate.config import Settings
from foveate.errors import ConfigError
from foveate.models.config import ModelConfig
from foveate.quantization.scheme import Quantization

CPU_CACHE_BYTES = 4 * 2**30
CPU_CACHE_BATCHES, GPU_CACHE_BATCHES = 4, 16
"""Bounds for keys and values: bytes on a CPU, and full batches.

More would be of no use. On a CPU it would only displace other programs' memory; on a GPU a small model would get
millions of blocks, and keeping account of them takes time.
"""
LONGEST = 32768
"""The longest sequence if the settings leave it open and the model was trained for more."""
LEAST_TOKENS = 1024
"""What keys and values must hold if no length was asked for: about a large picture and an answer."""
CONTEXT_BYTES = 512 * 2**20
"""What a process takes of a GPU before its first tensor: context, kernels, the libraries' own."""
_REMEDIES = (
    "What helps: smaller weights (--quantization int8, fp8 or int4), a shorter --max-seq-len, a smaller "
    "--max-batch-size, --max-num-tokens or --vision-batch-size, keys and values in 8 bits (--kv-cache-dtype fp8), a "
    "larger --kv-cache-free-mem-fraction, an encoder on another device (--vision-device), or ending what else uses "
    "this one."
)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where the model would run: ``memory_bytes`` in all, ``free_bytes`` now."""

    device: str
    memory_bytes: int
    free_bytes: int
    is_gpu: bool


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What the settings ask for; sizes in tokens, slices and bytes.

    Attributes:
        max_batch_size, max_seq_len, max_num_tokens, block_size, vision_batch_size: see the settings.
        memory_fraction: ``kv_cache_free_mem_fraction``.
        num_kv_blocks: an exact number of blocks instead of that share.
        must_hold: tokens that keys and values have to have room for.
        verified_rows: tokens of a step with guesses; 0 without speculation.
        packed_cache: whether keys and values have 8 bits.
        packed, packed_vision: whether weights are quantized, of the language model and of the encoder.
        kernels: whether there are kernels of our own; plain PyTorch needs more.
        graphs: whether steps are CUDA graphs.
        handed_over: bytes in which the encoder leaves embeddings on this device.
        cached: bytes of embeddings that it keeps there.
        contexts: processes that are still to begin using the GPU.
    """

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    vision_batch_size: int
    block_size: int
    memory_fraction: float
    num_kv_blocks: int | None = None
    must_hold: int = LEAST_TOKENS
    verified_rows: int = 0
    packed_cache: bool = False
    packed: bool = False
    packed_vision: bool = False
    kernels: bool = True
    graphs: bool = True
    handed_over: int = 0
    cached: int = 0
    contexts: int = 2


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory goes, in bytes.

    Attributes:
        machine: where.
        dtype: of weights that are not quantized.
        weights: by part.
        vision_step: the encoder's largest step, estimated; 0 without an encoder.
        language_step: the language model's largest step, estimated.
        graphs: CUDA graphs, estimated.
        tables: what is kept of each sequence, and for all positions.
        pictures: embeddings on their way from the encoder to the model, and what resizing needs.
        overhead: taken by the processes themselves.
        block_size: tokens of a block of keys and values.
        kv_block: its bytes.
        kv_blocks: how many there will be.
        kv_tokens: tokens that they hold.
        must_hold: tokens that they have to hold.
        fits: whether they do, with everything else.
    """

    machine: Machine
    dtype: str
    weights: dict[str, int]
    vision_step: int
    language_step: int
    graphs: int
    tables: int
    pictures: int
    overhead: int
    block_size: int
    kv_block: int
    kv_blocks: int
    kv_tokens: int
    must_hold: int
    fits: bool

    @property
    def fixed_bytes(self) -> int:
        """Everything but keys and values."""
        return sum(size for _, size in self.parts())

    def parts(self) -> Iterator[tuple[str, int]]:
        """Yield what takes how many bytes, keys and values left out."""
        for part, size in self.weights.items():
            yield f"weights, {part}", size
        yield "largest step, vision (estimate)", self.vision_step
        yield "largest step, language (estimate)", self.language_step
        yield "CUDA graphs (estimate)", self.graphs
        yield "sequences' state and tables", self.tables
        yield "pictures on their way", self.pictures
        yield "the processes themselves", self.overhead


def this_machine() -> list[Machine]:
    """Describe the first GPU, if NVIDIA's driver shows one, and the CPU's memory."""
    return [*_gpu(), cpu_machine()]


def cpu_machine() -> Machine:
    """Describe the CPU's memory."""
    memory = psutil.virtual_memory()
    return Machine(device="cpu", memory_bytes=memory.total, free_bytes=memory.available, is_gpu=False)


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


def demand_of(
    settings: Settings,
    max_seq_len: int,
    quantization: Quantization,
    *,
    is_gpu: bool,
    has_encoder: bool = True,
    contexts: int = 2,
) -> Demand:
    """Say what settings ask for.

    Args:
        settings: the whole service's.
        max_seq_len: tokens of the longest sequence.
        quantization: how weights will be in memory.
        is_gpu: whether it is about a GPU.
        has_encoder: whether the encoder shares the device.
        contexts: see :class:`Demand`.
    """
    engine, vision, transport = settings.engine, settings.vision, settings.transport
    block_size = engine.tokens_per_block(on_gpu=is_gpu)
    kernels = is_gpu and settings.model.kernels != "reference"
    # On a GPU only engines that share it take embeddings from its memory; on a CPU there is no other memory.
    hands_over = has_encoder and (
        not is_gpu or (vision.encoder == "own" and transport.transport in ("auto", "cuda-ipc"))
    )
    asked = engine.max_seq_len or min(max_seq_len, LEAST_TOKENS, (engine.num_kv_blocks or max_seq_len) * block_size)
    return Demand(
        max_batch_size=engine.max_batch_size, max_seq_len=max_seq_len, max_num_tokens=engine.max_num_tokens,
        vision_batch_size=vision.vision_batch_size, block_size=block_size,
        memory_fraction=engine.kv_cache_free_mem_fraction, num_kv_blocks=engine.num_kv_blocks, must_hold=asked,
        verified_rows=engine.verified_rows(), packed_cache=engine.kv_cache_dtype == "fp8",
        packed=quantization.method != "none", packed_vision=quantization.vision, kernels=kernels,
        graphs=kernels and engine.cuda_graphs, handed_over=transport.arena_bytes if hands_over else 0,
        cached=vision.embedding_cache_bytes if has_encoder and not is_gpu else 0, contexts=contexts,
    )  # fmt: skip


def plan_memory(
    config: ModelConfig,
    weights: Mapping[str, int],
    item_bytes: int,
    demand: Demand,
    machine: Machine,
    *,
    vision_item_bytes: int | None = None,
) -> MemoryPlan:
    """Work out a plan.

    Args:
        config: the architecture.
        weights: bytes of each part's weights, ``language`` and ``vision``, as they will be in memory; a part that is
            not on this machine's device is missing.
        item_bytes: bytes of one element of activations, and of keys and values unless they have 8 bits.
        demand: limits that the model is to be served with.
        machine: where.
        vision_item_bytes: the encoder's, if they are others.
    """
    language = config.language
    of_vision = vision_item_bytes or item_bytes
    has_encoder = "vision" in weights
    kv_bytes = kv_token_bytes(language, 1 if demand.packed_cache else item_bytes)
    on_gpu = has_encoder * (RESIZER_BYTES + ENCODED_BYTES) + ROW_BYTES if machine.is_gpu else 0
    plan = MemoryPlan(
        machine=machine, dtype={2: "bfloat16", 4: "float32"}[item_bytes], weights=dict(weights),
        vision_step=has_encoder and encoder_bytes(config, demand, demand.vision_batch_size, of_vision),
        language_step=language_step_bytes(language, demand, item_bytes),
        graphs=graphs_bytes(language, demand, item_bytes) if demand.graphs and machine.is_gpu else 0,
        tables=tables_bytes(language, demand, item_bytes), pictures=on_gpu + demand.handed_over + demand.cached,
        overhead=demand.contexts * CONTEXT_BYTES if machine.is_gpu else 0,
        block_size=demand.block_size, kv_block=demand.block_size * kv_bytes,
        kv_blocks=0, kv_tokens=0, must_hold=demand.must_hold, fits=False,
    )  # fmt: skip
    left = machine.free_bytes - plan.fixed_bytes
    full_batch = demand.max_batch_size * -(-demand.max_seq_len // demand.block_size)
    blocks = demand.num_kv_blocks or affordable_blocks(
        left, plan.kv_block, full_batch, demand.memory_fraction, is_gpu=machine.is_gpu
    )
    tokens = blocks * demand.block_size
    fits = tokens >= demand.must_hold and blocks * plan.kv_block <= left
    return msgspec.structs.replace(plan, kv_blocks=blocks, kv_tokens=tokens, fits=fits)


def affordable_blocks(left: int, block_bytes: int, full_batch: int, share: float, *, is_gpu: bool) -> int:
    """Return how many blocks of keys and values a share of what is left pays for, up to what can be of use.

    Args:
        left: bytes that are free once everything else has its own.
        block_bytes: of one block.
        full_batch: blocks of as many sequences as run together, of the greatest length.
        share: ``kv_cache_free_mem_fraction``.
        is_gpu: whether the bounds are a GPU's.
    """
    affordable = int(max(left, 0) * share)
    if is_gpu:
        return min(affordable // block_bytes, GPU_CACHE_BATCHES * full_batch)
    return min(min(affordable, CPU_CACHE_BYTES) // block_bytes, CPU_CACHE_BATCHES * full_batch)


def check(plan: MemoryPlan) -> None:
    """See that a plan can work.

    Raises:
        ConfigError: it cannot; the message lists what takes how much, and what to change.
    """
    if plan.fits:
        return
    exact = plan.kv_tokens >= plan.must_hold
    least = plan.kv_blocks if exact else -(-plan.must_hold // plan.block_size)
    name = f"keys and values of {least * plan.block_size:,} tokens"
    raise refusal("the model", plan.machine, [*plan.parts(), (name, least * plan.kv_block)], _REMEDIES)


def refusal(what: str, machine: Machine, parts: Iterable[tuple[str, int]], remedies: str) -> ConfigError:
    """Return the error that says what does not fit, as a table.

    Args:
        what: does not.
        machine: where.
        parts: what takes how many bytes; what takes none is left out.
        remedies: what to change.
    """
    rows = [(name, size) for name, size in parts if size]
    needed = sum(size for _, size in rows)
    rows += [("in all", needed), ("free", machine.free_bytes)]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {binary(size):>10}" for name, size in rows]
    title = f"{what} does not fit the memory of {machine.device} ({binary(machine.memory_bytes)}):"
    return ConfigError("\n".join([title, *lines, remedies]))


def describe(plan: MemoryPlan) -> str:
    """Say it in one line."""
    parts = ", ".join(f"{name} {binary(size)}" for name, size in plan.parts() if size)
    cache = f"{plan.kv_blocks:,} blocks of keys and values, {binary(plan.kv_blocks * plan.kv_block)}"
    return f"{binary(plan.machine.free_bytes)} free on {plan.machine.device}: {parts}; {cache}"


def binary(count: int) -> str:
    """Write a number of bytes for people: 4.0 GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
