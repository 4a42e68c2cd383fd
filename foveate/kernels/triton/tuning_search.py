"""Find the fastest variant of every product on the present device, by measuring."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise, product

import torch
from torch import Tensor

from foveate.kernels import reference
from foveate.kernels.triton import linear, tuning
from foveate.kernels.triton.tuning import DECODE_ROWS, Config
from foveate.kernels.triton.tuning_candidates import candidates, refinements

GROUP_SIZE = 128
"""Of weights of 4-bit integers, as they are measured."""

_ROTATED_BYTES = 3 * 2**26
"""Of weights that are read in turn: a few times as much as any L2 cache keeps."""

_REPEATS = 8
_ERROR, _ROUNDED_ERROR = 6e-3, 0.06
"""Of a right result, relative to float32; the second where activations are rounded to 8 bits, too."""


@dataclass(frozen=True)
class Product:
    """A product of activations with a weight, quantized or not.

    Attributes:
        kernel: its name in the tables.
        out_features: rows of the weight, gate and up both counted.
        in_features: columns of the weight.
    """

    kernel: str
    out_features: int
    in_features: int

    @property
    def fused(self) -> bool:
        """Say whether silu(gate) * up is part of it."""
        return self.kernel.endswith("_silu")

    @property
    def method(self) -> str:
        """Return how the weight is quantized, or "bf16"."""
        return self.kernel.removesuffix("_silu")

    @property
    def columns(self) -> int:
        """Return the columns of the result."""
        return self.out_features // 2 if self.fused else self.out_features

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the weight and its scales."""
        if self.method == "int4":
            return self.out_features * (self.in_features // 2 + 3 * -(-self.in_features // GROUP_SIZE))
        if self.method == "bf16":
            return self.out_features * self.in_features * 2
        return self.out_features * (self.in_features + 4)

    def weight(self) -> tuple[Tensor, ...]:
        """Make a random weight, on the current CUDA device: what :func:`multiply` takes.

        With inputs of standard deviation 1, so is the result's.
        """
        out, columns = self.out_features, self.in_features
        if self.method == "int4":
            groups = -(-columns // GROUP_SIZE)
            packed = torch.randint(256, (out, groups * GROUP_SIZE // 2), dtype=torch.uint8, device="cuda")
            scale = torch.full((out, groups), 1 / (4.6 * columns**0.5), dtype=torch.float16, device="cuda")
            return packed, scale, torch.full((out, groups), 8, dtype=torch.uint8, device="cuda")
        if self.method == "bf16":
            return (torch.randn(out, columns, device="cuda").div_(columns**0.5).to(torch.bfloat16),)
        values = torch.randint(-127, 128, (out, columns), dtype=torch.int8, device="cuda")
        scale = torch.full((out,), 1 / (73.6 * columns**0.5), device="cuda")
        return (values if self.method == "int8" else values.to(torch.float8_e4m3fn)), scale

    def multiply(
        self,
        x: Tensor,
        weight: tuple[Tensor, ...],
        residual: Tensor | None = None,
        config: Config | None = None,
        upcoming: Tensor | None = None,
    ) -> Tensor:
        """Multiply [rows, in] by a weight, with a given variant or the one that the tables choose."""
        qweight, *rest = weight
        scale, zero = [*rest, None, None][:2]
        if config is None:
            config = tuning.choose(self.kernel, self.out_features, self.in_features, x.shape[0], x.get_device())
        return linear.run(config, x, qweight, scale, None, residual, fused=self.fused, zero=zero, upcoming=upcoming)

    def exactly(self, x: Tensor, weight: tuple[Tensor, ...]) -> Tensor:
        """Multiply [rows, in] by a weight in float32, without these kernels."""
        if self.method == "int4":
            qweight, scale, zero = weight
            y = reference.int4_linear(x.float(), qweight, scale, zero, None)
        elif self.method == "bf16":
            y = x.float() @ weight[0].float().T
        else:
            qweight, scale = weight
            y = reference.int8_linear(x.float(), qweight, scale, None)
        return reference.silu_mul(y) if self.fused else y

    def __str__(self) -> str:
        return f"{self.kernel} {tuning.shape_key(self.out_features, self.in_features)}"


def time_graph(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Return the seconds that one of some calls takes on the device, as the median of replays of one CUDA graph.

    The calls should use different memory, so that what one leaves in a cache is no help to the next.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in pairwise(events)]
    return statistics.median(times) / 1e3 / len(calls)


class Bench:
    """A product with weights to rotate, on the current CUDA device."""

    def __init__(self, what: Product) -> None:
        self.what = what
        copies = max(-(-_ROTATED_BYTES // what.weight_bytes), 2)
        self.weights = [what.weight() for _ in range(copies)]

    def time(self, config: Config | None, rows: int) -> float:
        """Return the seconds of one product, by default with the variant that the tables choose.

        Raises what the kernel does where it cannot run.
        """
        x = torch.randn(rows, self.what.in_features, device="cuda").to(torch.bfloat16)
        count = max(len(self.weights), 8 if rows <= DECODE_ROWS else 3)
        chosen = [self.weights[i % len(self.weights)] for i in range(count)]

        def call(weight: tuple[Tensor, ...]) -> Callable[[], object]:
            return lambda: self.what.multiply(x, weight, config=config)

        return time_graph([call(weight) for weight in chosen])

    def is_right(self, config: Config | None, rows: int) -> bool:
        """Say whether a variant gives what plain PyTorch does in float32, and the same bits every time.

        Compilers make mistakes, too, and some of them only now and then.
        """
        x = torch.randn(rows, self.what.in_features, device="cuda").to(torch.bfloat16)
        expected = self.what.exactly(x, self.weights[0])
        first = self.what.multiply(x, self.weights[0], config=config)
        error = ((first.float() - expected).norm() / expected.norm()).item()
        same = all(torch.equal(first, self.what.multiply(x, self.weights[0], config=config)) for _ in range(_REPEATS))
        rounds_inputs = config is not None and config.kind == "scaled"
        # Not the other way around: NaN is never right.
        return same and error < (_ROUNDED_ERROR if rounds_inputs else _ERROR)

    def rank(self, configs: Iterable[Config], rows: int) -> list[tuple[float, Config]]:
        """Return the variants that run and are right, the fastest first, with their seconds."""
        times = []
        for config in configs:
            try:
                if self.is_right(config, rows):
                    times.append((self.time(config, rows), config))
            except Exception as error:
                # Too much shared memory, or what the compiler does not know how to do: of no use here.
                if "CUDA error" in str(error):
                    raise
        return sorted(times, key=lambda entry: entry[0])


def search(what: Product, rows: Sequence[int]) -> dict[str, list[tuple[float, Config]]]:
    """Measure a product for some numbers of rows; what each bucket's variants took, the fastest first."""
    bench = Bench(what)
    found = {}
    for size in rows:
        ranked = bench.rank(candidates(what.kernel, what.in_features, size), size)
        finer = [finer for _, config in ranked[:2] for finer in refinements(config)]
        found[str(size)] = sorted([*ranked, *bench.rank(finer, size)], key=lambda entry: entry[0])
    return found


def compile_all(products: Sequence[Product], rows: Sequence[int], workers: int | None = None) -> None:
    """Compile every variant in processes of their own, which leave the results in Triton's cache."""
    workers = workers or min(os.cpu_count() or 1, 12)
    jobs = {
        # What a kernel is compiled for, apart from its block sizes: columns, type and fusion, but no number of rows.
        (what.kernel, what.in_features, config): (what, config, size)
        for what, size in product(products, rows)
        for config in candidates(what.kernel, what.in_features, size)
        if config.kind in ("gemv", "tile")
    }
    listed = list(jobs.values())
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, [list(islice(listed, i, None, workers)) for i in range(workers)]))


def _compile(jobs: list[tuple[Product, Config, int]]) -> None:
    for what, config, rows in jobs:
        x = torch.zeros(rows, what.in_features, dtype=torch.bfloat16, device="cuda")
        try:
            what.multiply(x, what.weight(), config=config)
        except Exception as error:
            if "CUDA error" in str(error):
                raise


def tune(
    products: Sequence[Product], rows: Sequence[int] = tuning.BUCKETS, report: Callable[[str], None] = print
) -> tuning.Table:
    """Measure products on the current CUDA device.

    Args:
        products: to be tuned.
        rows: buckets.
        report: gets a line for each product and bucket.

    Returns:
        the fastest variants
    """
    compile_all(products, rows)
    table: dict[str, dict[str, dict[str, Config]]] = {}
    for what in products:
        shape = tuning.shape_key(what.out_features, what.in_features)
        for size, ranked in search(what, rows).items():
            seconds, config = ranked[0]
            table.setdefault(what.kernel, {}).setdefault(shape, {})[size] = config
            report(f"{what}, {size} rows: {seconds * 1e6:.1f} us, {config.changes()}")
    return table
