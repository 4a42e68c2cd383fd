"""The variants of a product that are worth measuring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from foveate.kernels.triton.tuning import DECODE_ROWS, Config

_SHARED_BYTES = 227 * 1024
"""Of a multiprocessor of an H100; smaller ones leave out what does not fit."""


def candidates(kernel: str, in_features: int, rows: int) -> list[Config]:
    """Return the variants to measure for a number of rows."""
    if kernel.startswith("int4"):
        return list(_int4_candidates(rows))
    plain = kernel.startswith("bf16")
    found = [Config("library")] if plain else []
    if rows > DECODE_ROWS:
        return found if plain else list(_prefill_candidates(kernel))
    if rows == 1:
        # Gate and up are two rows.
        found += (config for config in _gemv_candidates() if config.block_n > kernel.endswith("_silu"))
    found += _tile_candidates(max(rows, 8), 1 + plain)
    found += _split_candidates(max(rows, 8), in_features, 1 + plain)
    return list(dict.fromkeys(found))


def refinements(config: Config) -> list[Config]:
    """Return the variants of a good one that differ in what it loads before its turn."""
    if config.kind in ("slab", "scaled", "library") or config.block_m > DECODE_ROWS:
        return []
    return [replace(config, prefetch=size) for size in (1024, 4096) if config.kind == "tile"]


def _gemv_candidates() -> Iterator[Config]:
    for block_n, warps, block_k, direct in (
        (2, 4, 4096, False), (4, 4, 4096, False), (4, 8, 4096, False), (8, 8, 4096, False), (2, 4, 2048, False),
        (4, 4, 2048, False), (8, 8, 2048, False), (2, 4, 4096, True), (4, 4, 4096, True), (4, 8, 4096, True),
        (2, 4, 2048, True), (4, 4, 2048, True), (8, 8, 2048, True),
    ):  # fmt: skip
        yield Config("gemv", 1, block_n, block_k, 1, stages=1, warps=warps, direct=direct)
    for block_n, warps, block_k, unroll in (
        (4, 4, 512, 2), (4, 4, 512, 4), (4, 4, 512, 8), (8, 4, 512, 2), (8, 4, 512, 4), (4, 4, 1024, 2),
        (4, 4, 1024, 4), (8, 8, 512, 4), (8, 8, 1024, 2), (8, 4, 1024, 2), (2, 2, 512, 4), (2, 2, 1024, 4),
        (1, 4, 2048, 4), (2, 4, 1024, 4), (1, 2, 1024, 4),
    ):  # fmt: skip
        yield Config("gemv", 1, block_n, block_k, unroll, stages=1, warps=warps, direct=True)
    for block_n, warps, block_k, stages in (
        (4, 4, 512, 1), (4, 4, 1024, 1), (16, 4, 512, 1), (8, 4, 512, 4), (16, 8, 512, 4), (4, 4, 2048, 3),
        (8, 4, 512, 1), (4, 2, 512, 4), (4, 4, 1024, 4),
    ):  # fmt: skip
        yield Config("gemv", 1, block_n, block_k, 1, stages=stages, warps=warps)


def _tile_candidates(block_m: int, weight_bytes: int) -> Iterator[Config]:
    shapes = ((128, 4, 4, 1), (256, 4, 4, 1), (64, 4, 4, 1), (128, 8, 8, 1), (256, 2, 2, 1), (128, 4, 4, 2))
    for block_n, (block, groups, warps, split), stages in product((16, 32, 64), shapes, (2, 3, 4)):
        block_k = block // weight_bytes
        stage = block_k * groups * (weight_bytes * block_n + 2 * block_m)
        # What a multiprocessor has on its way; with less, the memory would wait.
        on_its_way = _SHARED_BYTES // (stage * stages) * stage * (stages - 1)
        sums = block_m * block_n * groups // (32 * warps)
        if on_its_way >= 2**16 and sums <= 64:
            yield Config("tile", block_m, block_n, block_k, groups, split, stages, warps)
    for block_n, block, warps, stages, split in (
        (64, 128, 4, 4, 1), (64, 128, 4, 4, 2), (64, 128, 4, 4, 4), (64, 128, 4, 6, 7), (128, 128, 8, 4, 1),
        (128, 128, 8, 4, 2), (64, 256, 4, 3, 1), (64, 256, 4, 3, 2), (32, 128, 2, 6, 4), (64, 128, 4, 3, 3),
        (128, 128, 4, 4, 1), (64, 128, 4, 3, 1),
    ):  # fmt: skip
        yield Config("tile", block_m, block_n, block // weight_bytes, 1, split, stages, warps)


def _split_candidates(block_m: int, in_features: int, weight_bytes: int) -> Iterator[Config]:
    """Return variants for small products, whose blocks are few unless several share their columns without a rest.

    Wide tiles, since activations are loaded again for each tile: as many bytes as weights where a tile has 32 rows of
    one byte, and 16 rows of activations.
    """
    for (block_n, block, groups, warps), split in product(
        ((32, 128, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4), (64, 128, 1, 4), (128, 128, 1, 4), (128, 128, 1, 8)),
        (2, 4, 7, 14),
    ):
        block_k = block // weight_bytes
        steps, rest = divmod(in_features, block_k * groups * split)
        if not rest and block_m * block_n * groups <= 64 * 32 * warps:
            stages = min(max(steps, 2), 4)
            yield Config("tile", block_m, block_n, block_k, groups, split, stages, warps)


def _prefill_candidates(kernel: str) -> Iterator[Config]:
    for block_m, block_n, block_k, warps, stages, split in (
        (128, 64, 64, 4, 4, 1), (128, 128, 64, 8, 3, 1), (128, 128, 64, 4, 4, 1), (128, 128, 128, 8, 3, 1),
        (256, 128, 64, 8, 3, 1), (256, 128, 64, 8, 4, 1), (256, 64, 64, 4, 4, 1), (128, 128, 64, 8, 4, 2),
        (128, 128, 64, 8, 4, 4), (256, 128, 64, 8, 4, 2), (256, 128, 64, 8, 4, 4), (256, 64, 64, 4, 4, 2),
        (128, 64, 64, 4, 4, 2), (128, 64, 64, 4, 4, 4), (256, 128, 32, 8, 5, 1), (256, 128, 128, 8, 2, 1),
        # Two blocks or more on each multiprocessor: one converts weights while another one multiplies.
        (128, 64, 64, 4, 3, 1), (128, 64, 64, 4, 3, 2), (128, 64, 64, 4, 3, 4), (256, 64, 64, 4, 3, 1),
        (128, 128, 64, 4, 3, 1), (128, 128, 64, 4, 3, 2), (64, 128, 64, 4, 3, 1), (64, 128, 64, 4, 3, 2),
        # As much of the weights in a tile as of the activations, in bytes: the least that the L2 cache must deliver.
        (128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 3, 2), (128, 256, 32, 8, 5, 1), (64, 256, 64, 8, 3, 1),
    ):  # fmt: skip
        yield Config("tile", block_m, block_n, block_k, 1, split, stages, warps)
    # Activations first: converted weights go to the tensor cores by way of shared memory, with half the instructions.
    for block_m, block_n, warps, stages, split in (
        (128, 128, 4, 3, 1), (128, 128, 4, 3, 2), (128, 128, 4, 3, 4), (128, 256, 8, 3, 1), (128, 256, 8, 3, 2),
        (128, 256, 8, 3, 4), (256, 128, 8, 3, 1), (256, 128, 8, 3, 2), (64, 128, 4, 3, 1), (64, 128, 4, 3, 2),
        (64, 128, 4, 3, 4), (128, 64, 4, 3, 1), (128, 64, 4, 3, 2), (64, 256, 4, 3, 1), (64, 256, 4, 3, 2),
        (128, 128, 8, 3, 1), (128, 128, 8, 3, 2),
    ):  # fmt: skip
        yield Config("tile", block_m, block_n, 64, 1, split, stages, warps, swap=True)
    for rows in (2048, 4096, 8192, 16384):
        yield Config("slab", block_n=rows)
    if kernel.startswith("fp8"):
        yield Config("scaled")


def _int4_candidates(rows: int) -> Iterator[Config]:
    if rows > DECODE_ROWS:
        for slab in (2048, 4096, 8192, 16384):
            yield Config("slab", block_n=slab)
        return
    block_m = max(rows, 8)
    for block_n, groups, warps, stages, split in (
        (16, 4, 4, 4, 1), (32, 4, 4, 4, 1), (32, 4, 4, 3, 1), (16, 8, 8, 3, 1), (32, 8, 8, 3, 1), (64, 4, 4, 3, 1),
        (32, 4, 4, 2, 1), (32, 4, 4, 3, 2), (64, 4, 8, 2, 1), (16, 4, 4, 2, 1),
    ):  # fmt: skip
        yield Config("tile", block_m, block_n, 0, groups, split, stages, warps)
