"""``foveate bench kernels``: how long each operation takes on this GPU, and how close that is to what it allows.

The floor of an operation is the larger of its bytes over the memory's bandwidth and its operations over the tensor
cores' rate, both measured first. Calls are replayed from a CUDA graph, so that no launch is timed, and take their
inputs from different memory in turn, so that no cache answers for the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from foveate.bench.sizes import language_config, products
from foveate.config import EngineSettings
from foveate.kernels.kv_cache import FP8, KeyOffset
from foveate.kernels.triton import activation, decode_attention, norm, prefill_attention, rope
from foveate.kernels.triton.tuning import DECODE_ROWS
from foveate.kernels.triton.tuning_search import Bench, time_graph
from foveate.models.config import LanguageConfig

_BLOCK_SIZE = EngineSettings().tokens_per_block(on_gpu=True)
_COPIES = 8
_BFLOAT16 = torch.bfloat16
_CACHES = {"": _BFLOAT16, ", fp8 cache": FP8}
"""Types of keys and values, by what they add to an operation's name."""


@dataclass(frozen=True)
class Ceiling:
    """What the device was seen to do: bytes read a second, and operations of a bfloat16 product a second."""

    bandwidth: float
    rate: float

    @classmethod
    def measure(cls) -> Ceiling:
        """Measure with PyTorch's own sum of 2 GiB and product of 8,192 x 8,192 matrices."""
        data = torch.randint(-(2**31), 2**31 - 1, (2**29,), dtype=torch.int32, device="cuda").view(torch.float32)
        data.nan_to_num_()
        bandwidth = data.nbytes / time_graph([data.amax] * 4)
        del data
        x, y = (torch.randn(8192, 8192, device="cuda").to(_BFLOAT16) for _ in range(2))
        return cls(bandwidth, 2 * 8192**3 / time_graph([lambda: x @ y] * 4))


@dataclass(frozen=True)
class Timing:
    """One operation of one size.

    Attributes:
        operation: its name.
        shape: of what, for people.
        rows: tokens.
        seconds: on the device.
        bytes_moved: the fewest that it can read and write.
        operations: multiplications and additions of matrix products.
        floor: the seconds that these two take at least.
    """

    operation: str
    shape: str
    rows: int
    seconds: float
    bytes_moved: int
    operations: int
    floor: float

    @property
    def fraction(self) -> float:
        """Return the part of the time that no version could do without."""
        return self.floor / self.seconds


class Suite:
    """All operations of a decoder, with a quantization, on the current CUDA device."""

    def __init__(self, config: LanguageConfig, quantization: str, ceiling: Ceiling, context: int) -> None:
        self.config, self.quantization, self.ceiling, self.context = config, quantization, ceiling, context
        self.products = products(config, quantization)

    def run(self, decode_rows: Sequence[int], prefill_rows: Sequence[int]) -> Iterator[Timing]:
        """Time everything for these numbers of tokens."""
        for name, what in self.products.items():
            bench = Bench(what)
            for rows in [*decode_rows, *(prefill_rows if name != "lm_head" else ())]:
                moved = what.weight_bytes + 2 * rows * (what.in_features + what.columns)
                operations = 2 * rows * what.out_features * what.in_features
                yield self._timing(name, str(what), rows, bench.time(None, rows), moved, operations)
            del bench
            torch.cuda.empty_cache()
        for rows in [*decode_rows, *prefill_rows]:
            yield from self._small(rows)
        for kind in _CACHES:
            for rows in decode_rows:
                yield self._decode_attention(rows, kind)
            for rows in prefill_rows:
                yield self._prefill_attention(rows, kind)
        layers = [self._layer() for _ in range(self.config.num_hidden_layers)]
        head = self.products["lm_head"].weight()
        for rows in decode_rows:
            yield self._chain(rows, layers, head)

    def _timing(self, name: str, shape: str, rows: int, seconds: float, moved: int, operations: int) -> Timing:
        floor = max(moved / self.ceiling.bandwidth, operations / self.ceiling.rate)
        return Timing(name, shape, rows, seconds, moved, operations, floor)

    def _random(self, *shape: int) -> list[Tensor]:
        return [torch.randn(shape, device="cuda").to(_BFLOAT16) for _ in range(_COPIES)]

    def _small(self, rows: int) -> Iterator[Timing]:
        hidden, size = self.config.hidden_size, self.config.intermediate_size
        weight = torch.randn(hidden, device="cuda").to(_BFLOAT16)
        x, gate_up = self._random(rows, hidden), self._random(rows, 2 * size)
        tokens = 2 * rows * hidden

        def norms(value: Tensor) -> Callable[[], object]:
            return lambda: norm.rms_norm(value, weight, 1e-6)

        def sums(value: Tensor) -> Callable[[], object]:
            return lambda: norm.add_rms_norm(value, x[0], weight, 1e-6)

        def gates(value: Tensor) -> Callable[[], object]:
            return lambda: activation.silu_mul(value)

        shape = str(hidden)
        yield self._timing("rms_norm", shape, rows, time_graph([norms(value) for value in x]), 2 * tokens, 0)
        yield self._timing("add_rms_norm", shape, rows, time_graph([sums(value) for value in x]), 4 * tokens, 0)
        seconds = time_graph([gates(value) for value in gate_up])
        yield self._timing("silu_mul", str(2 * size), rows, seconds, 6 * rows * size, 0)
        for kind in _CACHES:
            yield self._rotary(rows, kind)

    def _caches(self, blocks: int, kind: str) -> list[tuple[Tensor, Tensor]]:
        shape = (blocks, _BLOCK_SIZE, self.config.num_key_value_heads, self.config.head_dim)
        keys, values = ([cache.to(_CACHES[kind]) for cache in self._random(*shape)] for _ in range(2))
        return list(zip(keys, values, strict=True))

    def _offset(self, positions: int, kind: str) -> KeyOffset | None:
        """Return what keys in 8 bits are without, as the engine's."""
        if _CACHES[kind] != FP8:
            return None
        _, kv_heads, head_dim = self._heads()
        bias, angles = torch.randn(kv_heads * head_dim, device="cuda"), torch.randn(positions, head_dim, device="cuda")
        return KeyOffset(bias.to(_BFLOAT16), angles.to(_BFLOAT16))

    def _rotary(self, rows: int, kind: str) -> Timing:
        heads, kv_heads, head_dim = self._heads()
        caches, offset = self._caches(-(-rows // _BLOCK_SIZE), kind), self._offset(1, kind)
        table = torch.randn(self.context + rows, head_dim, device="cuda")
        positions = torch.arange(rows, device="cuda")
        inputs = self._random(rows, (heads + 2 * kv_heads) * head_dim)

        def call(qkv: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
            return lambda: rope.rotary_write(qkv, table, positions, positions, key, value, heads, offset)

        seconds = time_graph([call(qkv, *cache) for qkv, cache in zip(inputs, caches, strict=True)])
        # All is read, queries are written, keys and values stored; and cosines and sines, in float32.
        stored = 2 * kv_heads * _CACHES[kind].itemsize
        moved = rows * head_dim * (2 * (heads + 2 * kv_heads) + 2 * heads + stored + 4)
        return self._timing(f"rotary_write{kind}", f"{heads}+2x{kv_heads}x{head_dim}", rows, seconds, moved, 0)

    def _decode_attention(self, rows: int, kind: str) -> Timing:
        heads, kv_heads, head_dim = self._heads()
        blocks = -(-self.context // _BLOCK_SIZE)
        caches, queries = self._caches(rows * blocks, kind), self._random(rows, heads, head_dim)
        offset = self._offset(blocks * _BLOCK_SIZE, kind)
        tables = torch.arange(rows * blocks, dtype=torch.int32, device="cuda").view(rows, blocks)
        lengths = torch.full((rows,), self.context, dtype=torch.int32, device="cuda")

        def call(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
            return lambda: decode_attention.paged_decode_attention(query, key, value, tables, lengths, offset)

        seconds = time_graph([call(query, *cache) for query, cache in zip(queries, caches, strict=True)])
        moved = 2 * rows * head_dim * (self.context * kv_heads * _CACHES[kind].itemsize + 2 * heads)
        return self._timing(f"decode_attention{kind}", f"{self.context} keys", rows, seconds, moved, 0)

    def _prefill_attention(self, rows: int, kind: str) -> Timing:
        heads, kv_heads, head_dim = self._heads()
        blocks = -(-rows // _BLOCK_SIZE)
        caches, queries = self._caches(blocks, kind), self._random(rows, heads, head_dim)
        offset = self._offset(blocks * _BLOCK_SIZE, kind)
        tables = torch.arange(blocks, dtype=torch.int32, device="cuda")[None]
        offsets = torch.tensor([0, rows], dtype=torch.int32, device="cuda")

        def call(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
            attend = prefill_attention.paged_prefill_attention
            return lambda: attend(query, key, value, tables, offsets, offsets[1:], rows, offset)

        seconds = time_graph([call(query, *cache) for query, cache in zip(queries, caches, strict=True)])
        moved = 2 * rows * head_dim * (kv_heads * _CACHES[kind].itemsize + 2 * heads)
        # Two products, of which the causal mask leaves half.
        operations = 2 * rows * rows * heads * head_dim
        return self._timing(f"prefill_attention{kind}", "causal", rows, seconds, moved, operations)

    def _heads(self) -> tuple[int, int, int]:
        return self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim

    def _layer(self) -> dict[str, tuple[Tensor, ...]]:
        return {name: what.weight() for name, what in self.products.items() if name != "lm_head"}

    def _chain(self, rows: int, layers: list[dict[str, tuple[Tensor, ...]]], head: tuple[Tensor, ...]) -> Timing:
        """Time one decode step's products, one after another, each layer with weights of its own."""
        first = torch.randn(rows, self.config.hidden_size, device="cuda").to(_BFLOAT16)
        attended = self.config.num_attention_heads * self.config.head_dim

        def step() -> Tensor:
            x = first
            for layer in layers:
                qkv = self.products["qkv"].multiply(x, layer["qkv"])
                x = self.products["o"].multiply(qkv[:, :attended], layer["o"], x)
                gated = self.products["gate_up_silu"].multiply(x, layer["gate_up_silu"])
                x = self.products["down"].multiply(gated, layer["down"], x)
            return self.products["lm_head"].multiply(x, head)

        moved = self.products["lm_head"].weight_bytes + len(layers) * sum(
            what.weight_bytes for name, what in self.products.items() if name != "lm_head"
        )
        return self._timing("a step's products", f"{len(layers)} layers", rows, time_graph([step], 9), moved, 0)


def print_table(title: str, timings: Sequence[Timing]) -> None:
    """Print a line for each operation and number of tokens."""
    console = Console()
    table = Table(title=title, title_justify="left")
    for heading in ("operation", "shape"):
        table.add_column(heading)
    for heading in ("tokens", "us", "GB/s", "TFLOP/s", "of the floor"):
        table.add_column(heading, justify="right")
    for timing in timings:
        table.add_row(
            timing.operation,
            timing.shape,
            str(timing.rows),
            f"{timing.seconds * 1e6:.1f}",
            f"{timing.bytes_moved / timing.seconds / 1e9:.0f}",
            f"{timing.operations / timing.seconds / 1e12:.0f}" if timing.rows > DECODE_ROWS else "",
            f"{timing.fraction:.0%}",
        )
    console.print(table)


def measure(
    config: str, quantization: str, decode_rows: Sequence[int], prefill_rows: Sequence[int], context: int
) -> dict[str, object]:
    """Measure every operation of a decoder, print a table, and return the numbers.

    Args:
        config: a preset, or a folder with a config.json.
        quantization: type of the weights.
        decode_rows: tokens of decode steps.
        prefill_rows: tokens of prompts.
        context: keys that each token of a decode step attends to.

    Raises:
        ConfigError: there is no such decoder.
    """
    decoder = language_config(config)
    ceiling = Ceiling.measure()
    with torch.inference_mode():
        timings = list(Suite(decoder, quantization, ceiling, context).run(decode_rows, prefill_rows))
    device = torch.cuda.get_device_name()
    seen = f"reads {ceiling.bandwidth / 1e12:.2f} TB/s, products {ceiling.rate / 1e12:.0f} TFLOP/s"
    print_table(f"{config}, {quantization}, {device}: {seen}", timings)
    entries = [asdict(timing) | {"fraction": timing.fraction} for timing in timings]
    versions = {"device": device, "torch": torch.__version__, "config": config, "quantization": quantization}
    return {**versions, "ceiling": asdict(ceiling), "timings": entries}
