"""Which variants of the quantized products run, and where that is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kernels.interpreted import MARKS

from foveate.kernels.triton import tuning
from foveate.kernels.triton.tuning import Config
from foveate.kernels.triton.tuning_candidates import candidates, refinements
from foveate.kernels.triton.tuning_search import Product

pytestmark = MARKS


METHODS = ("int8", "int8_silu", "fp8", "fp8_silu", "int4", "int4_silu", "bf16", "bf16_silu")


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (64, 64), (65, 128), (1025, 2048), (9999, 4096)]
)
def test_buckets(rows: int, expected: int) -> None:
    assert tuning.bucket(rows) == expected


def test_a_stored_table_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    table = {
        "int8": {"64x32": {"1": Config("gemv", 1, 4, 512, stages=1), "16": Config(split=2)}},
        "int4": {"8x8": {"8": Config("slab", block_n=2048)}},
    }
    tuning.write_table(path, "Some Card", table)
    assert tuning.read_table(path) == table
    assert json.loads(path.read_text())["device"] == "Some Card"
    # Only what differs from the defaults is stored.
    assert json.loads(path.read_text())["kernels"]["int8"]["64x32"]["16"] == {"split": 2}


def test_a_missing_table_is_empty(tmp_path: Path) -> None:
    assert tuning.read_table(tmp_path / "none.json") == {}


def test_tables_are_merged_and_the_newer_one_wins() -> None:
    older = {"int8": {"a": {"1": Config(split=2), "8": Config(split=3)}, "b": {"1": Config()}}}
    newer = {"int8": {"a": {"1": Config(split=4)}}, "fp8": {"a": {"1": Config(split=5)}}}
    assert tuning.merge(older, newer) == {
        "int8": {"a": {"1": Config(split=4), "8": Config(split=3)}, "b": {"1": Config()}},
        "fp8": {"a": {"1": Config(split=5)}},
    }


def test_the_stored_variant_is_chosen_for_its_shape_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, prefill = Config(split=7), Config("slab")
    monkeypatch.setattr(tuning, "table_of", lambda device: {"int8": {"64x32": {"4": stored, "512": prefill}}})
    tuning.choose.cache_clear()
    try:
        assert tuning.choose("int8", 64, 32, 3, 0) is stored
        # With fewer rows it is still right, with more it is not, and one for a prefill is not for a decode.
        assert tuning.choose("int8", 64, 32, 1, 0) is stored
        assert tuning.choose("int8", 64, 32, 5, 0) == tuning.default("int8", 64, 8)
        assert tuning.choose("int8", 64, 32, 100, 0) is prefill
        assert tuning.choose("int8", 32, 64, 3, 0) == tuning.default("int8", 32, 4)
        assert tuning.choose("fp8", 64, 32, 3, 0) == tuning.default("fp8", 64, 4)
        assert tuning.choose("int8", 64, 32, 3, None) == tuning.default("int8", 64, 4)
    finally:
        tuning.choose.cache_clear()


def test_names_of_files() -> None:
    assert tuning.device_key("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


@pytest.mark.parametrize("kernel", METHODS)
@pytest.mark.parametrize("rows", tuning.BUCKETS)
def test_candidates_fit_their_rows(kernel: str, rows: int) -> None:
    found = candidates(kernel, 3584, rows)
    assert len(set(found)) == len(found) > 0
    for config in [*found, *refinements(found[0]), tuning.default(kernel, 3584, rows)]:
        assert config.kind != "gemv" or rows == 1
        # More rows than a tile's would read the weights more than once, which is for prefills.
        assert config.kind != "tile" or rows > tuning.DECODE_ROWS or config.block_m >= rows
        assert config.kind != "scaled" or kernel.startswith("fp8")
        assert config.kind != "slab" or not kernel.startswith("bf16")
    # cuBLAS is always asked, and what is faster is used.
    assert (Config("library") in found) == kernel.startswith("bf16")


@pytest.mark.parametrize("kernel", METHODS)
@pytest.mark.parametrize("rows", tuning.BUCKETS)
def test_defaults_fit_small_devices(kernel: str, rows: int) -> None:
    config = tuning.default(kernel, 3584, rows)
    if config.kind == "tile":
        # Weights of one byte or two, or two of 4 bits in one, of groups of 128 columns; activations of two bytes.
        columns = config.groups * (128 if kernel.startswith("int4") else config.block_k)
        weight = config.block_n * columns * {"int4": 1, "bf16": 4}.get(kernel[:4], 2) // 2
        assert config.stages * (weight + 2 * columns * config.block_m) <= 99 * 1024


def test_shipped_tables_can_be_read() -> None:
    for path in tuning.TUNED.glob("*.json"):
        table = tuning.read_table(path)
        assert tuning.device_key(json.loads(path.read_text())["device"]) == path.stem
        for kernel, shapes in table.items():
            assert kernel in METHODS
            for buckets in shapes.values():
                assert all(int(rows) in tuning.BUCKETS for rows in buckets)


def test_bytes_of_a_weight() -> None:
    assert Product("int8", 10, 256).weight_bytes == 10 * (256 + 4)
    assert Product("bf16", 10, 256).weight_bytes == 10 * 512
    assert Product("int4_silu", 10, 256).weight_bytes == 10 * (128 + 2 * 3)
    assert Product("int8_silu", 10, 256).columns == 5
