"""Each variant of the quantized products against exact arithmetic; on a CPU they are interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kernels.interpreted import DEVICE, MARKS
from torch import Tensor

from foveate.bench.sizes import language_config, products
from foveate.kernels.triton import linear, linear_launch, linear_slab, tuning
from foveate.kernels.triton.tuning import Config, default
from foveate.kernels.triton.tuning_search import Bench
from foveate.quantization.fp8 import Fp8Linear
from foveate.quantization.int4 import Int4Linear
from foveate.quantization.int8 import Int8Linear
from foveate.quantization.scheme import Quantization

pytestmark = MARKS

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# Of a result's norm. Weights are exact in every type; bfloat16 results are rounded once, to nothing (towards zero by
# the interpreter), and slabs are rounded as well.
TOLERANCE = {BFLOAT16: 6e-3, FLOAT16: 1e-3, FLOAT32: 1e-5}
SLAB_TOLERANCE = {BFLOAT16: 2e-2, FLOAT16: 2e-3, FLOAT32: 1e-5}
TILES = [
    Config("tile", 8, 16, 32, groups=2, stages=2, prefetch=512),
    Config("tile", 8, 16, 16, groups=4, split=3, stages=2),
    Config("tile", 16, 32, 32, stages=2),
    Config("tile", 16, 32, 32, split=2, stages=2, supers=1),
    Config("tile", 16, 32, 32, stages=2, swap=True),
]
GEMVS = [
    Config("gemv", 1, 8, 64, stages=1, direct=True, groups=2),
    Config("gemv", 1, 4, 32, stages=1, warps=1),
    Config("gemv", 1, 16, 64, stages=3),
]
SLABS = [Config("slab", block_n=20)]
PACKERS = {"int8": Int8Linear, "fp8": Fp8Linear, "int4": Int4Linear}


def packed(
    method: str, rows: int, columns: int, group_size: int = 32, dtype: torch.dtype = BFLOAT16
) -> dict[str, Tensor]:
    weight = torch.randn(rows, columns) * torch.rand(rows, 1) / columns**0.5
    if method == "bf16":
        return {"qweight": weight.to(dtype).to(DEVICE)}
    parts = PACKERS[method].pack(weight, Quantization(method=method, group_size=group_size))
    return {name: part.to(DEVICE) for name, part in parts.items()}


def exact(
    method: str, x: Tensor, parts: dict[str, Tensor], bias: Tensor | None, residual: Tensor | None, fused: bool
) -> Tensor:
    weight = (parts["qweight"] if method == "bf16" else PACKERS[method].unpack(parts, x.shape[-1])).double()
    y = F.linear(x.double(), weight, None if bias is None else bias.double())
    if fused:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual.double()


def assert_near(y: Tensor, expected: Tensor, tolerance: float) -> None:
    assert y.shape == expected.shape
    assert torch.linalg.vector_norm(y.double() - expected) <= tolerance * torch.linalg.vector_norm(expected)
    # No single element is wrong either, which in a large result the norm would hide.
    assert (y.double() - expected).abs().max() <= 8 * tolerance * expected.abs().max()


def check(
    config: Config,
    method: str,
    dtype: torch.dtype,
    rows: int,
    out: int,
    columns: int,
    fused: bool,
    group_size: int = 32,
) -> None:
    parts = packed(method, out, columns, group_size, dtype)
    # Rows that are part of wider ones, as a view of a fused projection's result has them.
    x = torch.randn(rows, columns + 16, device=DEVICE).to(dtype)[:, :columns]
    bias = torch.randn(out, device=DEVICE).to(dtype)
    residual = None if fused else torch.randn(rows, out, device=DEVICE).to(dtype)
    scale, zero = parts.get("scale"), parts.get("zero")
    y = linear.run(config, x, parts["qweight"], scale, bias, residual, fused=fused, zero=zero)
    assert y.dtype == dtype
    expected = exact(method, x, parts, bias, residual, fused)
    tolerance = (SLAB_TOLERANCE if config.kind == "slab" else TOLERANCE)[dtype]
    assert_near(y, expected, tolerance * (2 if fused else 1))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("config", [*TILES, *SLABS], ids=str)
@pytest.mark.parametrize(("rows", "out", "columns"), [(5, 70, 200), (17, 48, 96)])
def test_products_of_several_rows(config: Config, method: str, rows: int, out: int, columns: int, fused: bool) -> None:
    check(config, method, BFLOAT16, rows, out, columns, fused)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("config", GEMVS, ids=str)
@pytest.mark.parametrize(("out", "columns"), [(70, 56), (48, 64)])
def test_products_of_one_row(config: Config, method: str, out: int, columns: int, fused: bool) -> None:
    check(config, method, BFLOAT16, 1, out, columns, fused)


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32])
@pytest.mark.parametrize("config", [TILES[0], TILES[1], GEMVS[1], SLABS[0]], ids=str)
def test_other_types_of_activations(config: Config, dtype: torch.dtype) -> None:
    check(config, "int8", dtype, 1, 40, 200, False)


@pytest.mark.parametrize("config", [TILES[0], TILES[1], GEMVS[1], Config("library")], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_plain_weights_of_half_precision(config: Config, fused: bool) -> None:
    check(config, "bf16", FLOAT16, 1, 40, 200, fused)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_plain_weights(rows: int) -> None:
    parts = packed("bf16", 48, 200)
    weight, bias = parts["qweight"], torch.randn(48, device=DEVICE).to(BFLOAT16)
    x, residual = (torch.randn(2, rows, size, device=DEVICE).to(BFLOAT16) for size in (200, 48))
    y = linear.linear(x, weight, bias, residual)
    assert_near(y, exact("bf16", x, parts, bias, residual, False), TOLERANCE[BFLOAT16])
    y = linear.gate_up_silu(x, weight, bias)
    assert_near(y, exact("bf16", x, parts, bias, None, True), SLAB_TOLERANCE[BFLOAT16])


@pytest.mark.parametrize("layout", ["columns", "every other", "float32"])
def test_plain_weights_that_only_pytorch_takes(layout: str) -> None:
    # A weight that is stored by columns must not be read as if it were by rows.
    parts = packed("bf16", 48, 64, dtype=FLOAT32 if layout == "float32" else BFLOAT16)
    if layout == "columns":
        parts["qweight"] = parts["qweight"].t().contiguous().t()
    elif layout == "every other":
        parts["qweight"] = parts["qweight"][::2]
    x = torch.randn(1, 64, device=DEVICE).to(parts["qweight"].dtype)
    out = len(parts["qweight"])
    for config in (TILES[0], GEMVS[1]):
        y = linear.run(config, x, parts["qweight"], None)
        assert_near(y, exact("bf16", x, parts, None, None, False), SLAB_TOLERANCE[x.dtype])
    y = linear.gate_up_silu(x, parts["qweight"])
    assert y.shape == (1, out // 2)
    assert_near(y, exact("bf16", x, parts, None, None, True), SLAB_TOLERANCE[x.dtype])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 96])
@pytest.mark.parametrize(
    "config", [Config("tile", 8, 16, 0, 2, stages=2), Config("tile", 8, 16, 0, 4, split=2, stages=2), *SLABS], ids=str
)
def test_four_bits(config: Config, group_size: int, fused: bool) -> None:
    # Groups of 96 are no power of two, which tiles must be: they are unpacked instead.
    kind = "slab" if group_size == 96 else config.kind
    parts = packed("int4", 34, 200, group_size)
    x = torch.randn(3, 200, device=DEVICE).to(BFLOAT16)
    bias = torch.randn(34, device=DEVICE).to(BFLOAT16)
    y = linear.run(config, x, parts["qweight"], parts["scale"], bias, fused=fused, zero=parts["zero"])
    tolerance = (SLAB_TOLERANCE if kind == "slab" else TOLERANCE)[BFLOAT16]
    assert_near(y, exact("int4", x, parts, bias, None, fused), tolerance * (2 if fused else 1))


def test_what_fills_up_the_last_group_counts_nothing() -> None:
    parts = packed("int4", 16, 40, 32)
    x = torch.randn(2, 40, device=DEVICE).to(BFLOAT16)
    config = Config("tile", 8, 16, 0, 2, stages=2)
    before = linear.run(config, x, parts["qweight"], parts["scale"], zero=parts["zero"])
    # Columns 40 to 63: in the second group's bytes, the low four bits from byte 8 on, and all high ones.
    tail = parts["qweight"][:, 16:]
    tail[:, 8:] |= 0xFF
    tail[:, :8] |= 0xF0
    after = linear.run(config, x, parts["qweight"], parts["scale"], zero=parts["zero"])
    assert torch.equal(before, after)


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_every_weight_is_converted_exactly(method: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    if method == "int8":
        qweight, values = codes.view(torch.int8), codes.view(torch.int8).double()
    else:
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        qweight, values = codes.view(torch.float8_e4m3fn), codes.view(torch.float8_e4m3fn).double()
    qweight = qweight.repeat(16, 1)
    # Each input is one column's unit vector, so that each result is one weight.
    x = torch.eye(256, device=DEVICE).to(BFLOAT16)
    ones = torch.ones(16, device=DEVICE)
    tiles = linear.run(Config("tile", 16, 16, 64, stages=2), x, qweight, ones)
    assert torch.equal(tiles.double(), values[:, None].expand(256, 16))
    picked = [linear.run(Config("gemv", 1, 4, 64, stages=1), row[None], qweight, ones) for row in x[::5]]
    assert torch.equal(torch.cat(picked).double(), values[::5, None].expand(-1, 16))


@pytest.mark.parametrize("config", [*TILES, *GEMVS, *SLABS], ids=str)
def test_no_rows(config: Config) -> None:
    parts = packed("int8", 24, 64)
    x = torch.empty(2, 0, 64, dtype=BFLOAT16, device=DEVICE)
    assert linear.run(config, x, parts["qweight"], parts["scale"]).shape == (2, 0, 24)
    assert linear.run(config, x, parts["qweight"], parts["scale"], fused=True).shape == (2, 0, 12)


def test_leading_dimensions_are_kept() -> None:
    parts = packed("int8", 24, 64)
    x = torch.randn(2, 3, 64, device=DEVICE).to(BFLOAT16)
    residual = torch.randn(2, 3, 24, device=DEVICE).to(BFLOAT16)
    y = linear.int8_linear(x, parts["qweight"], parts["scale"], None, residual)
    assert_near(y, exact("int8", x, parts, None, residual, False), TOLERANCE[BFLOAT16])


@pytest.mark.parametrize("rows", [1, 3])
def test_functions_of_each_method(rows: int) -> None:
    x = torch.randn(rows, 64, device=DEVICE).to(BFLOAT16)
    for method, plain, fused in (
        ("int8", linear.int8_linear, linear.gate_up_silu_int8),
        ("fp8", linear.fp8_linear, linear.gate_up_silu_fp8),
        ("int4", linear.int4_linear, linear.gate_up_silu_int4),
    ):
        parts = packed(method, 32, 64)
        weights = [parts[name] for name in ("qweight", "scale", "zero") if name in parts]
        assert_near(plain(x, *weights, None), exact(method, x, parts, None, None, False), TOLERANCE[BFLOAT16])
        assert_near(fused(x, *weights), exact(method, x, parts, None, None, True), 2 * TOLERANCE[BFLOAT16])


@pytest.mark.parametrize("config", [TILES[1], GEMVS[1]], ids=str)
@pytest.mark.parametrize("ahead", [4096, -4096])
def test_what_is_brought_ahead_makes_no_difference(config: Config, ahead: int) -> None:
    parts = packed("int8", 64, 96)
    x = torch.randn(1, 96, device=DEVICE).to(BFLOAT16)
    expected = linear.run(config, x, parts["qweight"], parts["scale"])
    eager = replace(config, ahead=ahead, pdl=False)
    assert torch.equal(linear.run(eager, x, parts["qweight"], parts["scale"], upcoming=parts["qweight"]), expected)


def test_counters_are_zero_again_after_a_split_product() -> None:
    parts = packed("int8", 64, 96)
    x = torch.randn(4, 96, device=DEVICE).to(BFLOAT16)
    config = Config("tile", 8, 16, 32, split=3, stages=2)
    first = linear.run(config, x, parts["qweight"], parts["scale"])
    assert not linear_launch.counters(x.device).any()
    assert torch.equal(linear.run(config, x, parts["qweight"], parts["scale"]), first)


def test_default_variants_run_for_every_bucket() -> None:
    for method in ("int8", "fp8_silu", "int4"):
        for rows in (1, 2, 16, 64, 65, 512):
            config = default(method, 4608, rows)
            assert (config.kind == "gemv") <= (rows == 1)
            assert config.kind != "tile" or config.block_m >= min(rows, 64)


def test_activations_are_scaled_to_the_largest_of_eight_bits() -> None:
    x = torch.randn(5, 200, device=DEVICE).to(BFLOAT16)
    x[3] = 0
    rounded, scale = linear_slab.quantize_rows(x)
    expected = x.float().abs().amax(dim=1) / 448
    assert torch.allclose(scale[[0, 1, 2, 4]], expected[[0, 1, 2, 4]], rtol=1e-6)
    # A row of zeros keeps a scale that is not zero.
    assert scale[3] > 0
    assert not rounded[3].float().any()


@pytest.mark.gpu
def test_activations_are_rounded_to_eight_bits() -> None:
    # The interpreter gets the carry of a rounded mantissa wrong.
    x = torch.randn(5, 200, device="cuda").to(BFLOAT16)
    rounded, scale = linear_slab.quantize_rows(x)
    # Three bits of mantissa: half of the last one's place is 2^-4 of a number at most; tiny ones have fewer.
    error = (rounded.float() * scale[:, None] - x.float()).abs()
    assert (error <= 2**-4 * x.float().abs() * 1.001 + scale[:, None] * 2**-9).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        Config("tile", 256, 128, 64, stages=4, warps=8),
        Config("tile", 128, 64, 64, split=2, stages=4),
        Config("tile", 128, 256, 64, stages=3, warps=8, swap=True),
        Config("tile", 64, 64, 128, stages=4),
        Config("slab", block_n=512),
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [False, True])
def test_wide_tiles_do_not_depend_on_timing(config: Config, fused: bool) -> None:
    # Operands that are written again while the tensor cores read them showed in one run of several, and never in small.
    parts = packed("int8", 4608, 3584)
    x = torch.randn(377, 3584, device="cuda").to(BFLOAT16)
    runs = [linear.run(config, x, parts["qweight"], parts["scale"], fused=fused) for _ in range(5)]
    assert_near(runs[0], exact("int8", x, parts, None, None, fused), SLAB_TOLERANCE[BFLOAT16])
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.gpu
def test_a_captured_product_can_be_replayed() -> None:
    parts = packed("int8", 512, 1024)
    x = torch.randn(8, 1024, device="cuda").to(BFLOAT16)
    config = Config("tile", 8, 32, 64, split=4, stages=3)
    linear.reserve(x.device)
    expected = linear.run(config, x, parts["qweight"], parts["scale"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear.run(config, x, parts["qweight"], parts["scale"])
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_products_of_eight_bit_floats_on_both_sides() -> None:
    parts = packed("fp8", 512, 1024)
    x = torch.randn(128, 1024, device="cuda").to(BFLOAT16)
    if not linear.can_scale(x, parts["qweight"]):
        pytest.skip("the device has no such product")
    bias, residual = torch.randn(512, device="cuda").to(BFLOAT16), torch.randn(128, 512, device="cuda").to(BFLOAT16)
    y = linear.run(Config("scaled"), x, parts["qweight"], parts["scale"], bias, residual)
    assert_near(y, exact("fp8", x, parts, bias, residual, False), 4e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["int8", "fp8", "int4", "bf16"])
def test_what_was_tuned_for_this_device_is_right(method: str) -> None:
    for what in products(language_config("minicpm-v-2_6"), method).values():
        if what.out_features > 100_000:  # The head's columns are many, and its tiles those of the others.
            continue
        bench = Bench(what)
        for rows in (1, 7, 16, 42, 64, 100, 200, 377, 500, 1000, 2000):
            config = tuning.choose(what.kernel, what.out_features, what.in_features, rows, torch.cuda.current_device())
            assert bench.is_right(config, rows), (str(what), rows, config)
