"""Which variant of a kernel runs, and with which block sizes: measured once a device, stored, and only looked up.

``foveate/kernels/tuned/<device>.json`` holds, for each kernel ("int8", "int8_silu", ...), each shape of a weight
("out x in") and each bucket of rows, the fields of a :class:`Config` that differ from their defaults. What no file
knows gets :func:`default`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["gemv", "tile", "slab", "scaled", "library"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096)
"""Rows are looked up under the next of these, or the last one."""

UPCOMING_PROGRAMS = 528
"""How many of a kernel's programs, its last ones, bring it: four for each multiprocessor of an H100."""

DECODE_ROWS = 64
"""Up to here memory decides and weights are read once; beyond, it is a prefill."""

TUNED = Path(__file__).parents[1] / "tuned"
_HOPPER = "nvidia_h100_80gb_hbm3.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """A variant and its block sizes.

    Attributes:
        kind: "gemv" (one row, on the general cores), "tile" (a product whose weights become bfloat16 in registers),
            "slab" (some rows of the weight at a time are unpacked into memory that is used again, for the library's
            product), "scaled" (8-bit floats on both sides), "library" (plain floats: PyTorch's own, which is cuBLAS).
        block_m: rows of the activations of a tile.
        block_n: rows of the weight of a tile, or of a slab.
        block_k: columns of a step, of each group.
        groups: groups of warps that split a step's columns; of a gemv, steps that are unrolled.
        split: blocks that split the columns.
        stages: steps whose loads are on their way at a time.
        warps: of a block.
        prefetch: bytes of each of a block's rows to fetch while the kernel before still runs.
        supers: tiles along the activations that follow each other for the same weights.
        swap: have the activations as the product's first operand.
        direct: of a gemv, each thread loads the activations that it needs.
        pdl: whether it may start before the kernel before has ended.
        ahead: bytes of an upcoming weight to bring into the L2 cache.
    """

    kind: Kind = "tile"
    block_m: int = 16
    block_n: int = 32
    block_k: int = 128
    groups: int = 1
    split: int = 1
    stages: int = 4
    warps: int = 4
    prefetch: int = 0
    supers: int = 8
    swap: bool = False
    direct: bool = False
    pdl: bool = True
    ahead: int = 0

    def changes(self) -> dict[str, Any]:
        """Return the fields that are not at their defaults, as they are stored."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }


Table = Mapping[str, Mapping[str, Mapping[str, Config]]]
"""Configs by kernel, shape and bucket."""


def bucket(rows: int) -> int:
    """Return the bucket under which a number of rows is looked up."""
    return next((size for size in BUCKETS if rows <= size), BUCKETS[-1])


def shape_key(out_features: int, in_features: int) -> str:
    """Name a weight's shape, as the tables do."""
    return f"{out_features}x{in_features}"


def device_key(name: str) -> str:
    """Make a file's name of a device's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def read_table(path: Path) -> Table:
    """Read a stored table; a file that is not there is an empty one."""
    if not path.is_file():
        return {}
    kernels = json.loads(path.read_text())["kernels"]
    return {
        kernel: {
            shape: {rows: Config(**fields) for rows, fields in buckets.items()} for shape, buckets in shapes.items()
        }
        for kernel, shapes in kernels.items()
    }


def write_table(path: Path, device: str, table: Table) -> None:
    """Store a table, in a form whose changes can be read: one line a config."""
    kernels = []
    for kernel, shapes in sorted(table.items()):
        lines = []
        for shape, buckets in sorted(shapes.items()):
            entries = (
                f"        {json.dumps(rows)}: {json.dumps(config.changes())}"
                for rows, config in sorted(buckets.items(), key=lambda item: int(item[0]))
            )
            lines.append(f"      {json.dumps(shape)}: {{\n" + ",\n".join(entries) + "\n      }")
        kernels.append(f"    {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n    }")
    body = ",\n".join(kernels)
    path.write_text(f'{{\n  "device": {json.dumps(device)},\n  "kernels": {{\n{body}\n  }}\n}}\n')


def merge(older: Table, newer: Table) -> Table:
    """Return what both tables have; where they differ, the newer one's."""
    return {
        kernel: {
            shape: {**older.get(kernel, {}).get(shape, {}), **newer.get(kernel, {}).get(shape, {})}
            for shape in {**older.get(kernel, {}), **newer.get(kernel, {})}
        }
        for kernel in {**older, **newer}
    }


@lru_cache(maxsize=16)
def table_of(device: int) -> Table:
    """Return the table of a CUDA device, by its name; for others like an H100, its table; else an empty one."""
    found = read_table(TUNED / f"{device_key(torch.cuda.get_device_name(device))}.json")
    if not found and torch.cuda.get_device_capability(device) == (9, 0):
        found = read_table(TUNED / _HOPPER)
    return found


@lru_cache(maxsize=4096)
def choose(kernel: str, out_features: int, in_features: int, rows: int, device: int | None) -> Config:
    """Return what to run for a weight and a number of rows; ``device`` is a CUDA device's index, or None."""
    size = bucket(rows)
    table = {} if device is None else table_of(device)
    stored = table.get(kernel, {}).get(shape_key(out_features, in_features), {})
    # What was not measured gets what is best for a few more rows, on the same side of where a prefill begins.
    near = (str(more) for more in BUCKETS if more >= size and (more <= DECODE_ROWS) == (size <= DECODE_ROWS))
    return next((stored[rows] for rows in near if rows in stored), None) or default(kernel, out_features, size)


def default(kernel: str, out_features: int, rows: int) -> Config:
    """Guess for what was not measured: it fits everywhere, and is not far from the best on Hopper."""
    if kernel.startswith("int4"):
        return _default_int4(rows)
    if not kernel.startswith(("int8", "fp8")):
        return _default_plain(kernel, rows)
    if rows == 1:
        return Config("gemv", 1, 4, 1024, stages=1)
    if rows <= 16:
        return Config("tile", max(rows, 8), 16, 128, groups=4, stages=3)
    if rows <= DECODE_ROWS:
        return Config("tile", rows, 64, 128, split=1 if out_features > 8192 else 2, stages=3)
    if rows <= 256:
        return Config("tile", 128, 64, 64, stages=4)
    return Config("slab", block_n=4096)


def _default_plain(kernel: str, rows: int) -> Config:
    """Return what is safe for weights of 16 bits: cuBLAS is never far from the best but for the fewest rows."""
    if rows > 8 or kernel.startswith("other"):
        return Config("library")
    if rows == 1:
        return Config("gemv", 1, 4, 512, stages=1)
    return Config("tile", 8, 16, 128, groups=4, stages=3)


def _default_int4(rows: int) -> Config:
    if rows > DECODE_ROWS:
        return Config("slab", block_n=4096)
    if rows > 32:
        return Config("tile", rows, 16, 0, groups=2, stages=2, warps=2)
    return Config("tile", max(rows, 8), 32 if rows <= 16 else 16, 0, groups=4, stages=3 if rows <= 16 else 2)
