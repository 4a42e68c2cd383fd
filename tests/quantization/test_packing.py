"""Every packer against the definition of its format: what is stored, how far off it is, and what it computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foveate.errors import ConfigError
from foveate.quantization import linear as linear_module
from foveate.quantization.fp8 import Fp8Linear
from foveate.quantization.int4 import Int4Linear
from foveate.quantization.int8 import Int8Linear
from foveate.quantization.layers import LINEARS
from foveate.quantization.linear import QuantizedLinear, row_blocks
from foveate.quantization.scheme import Quantization

torch.set_num_threads(1)

QUANTIZATIONS = [
    Quantization(method="int8"),
    Quantization(method="fp8"),
    Quantization(method="int4"),
    Quantization(method="int4", group_size=32),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 300))
weights = st.builds(
    lambda shape, seed, size: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**size,
    SHAPES,
    st.integers(0, 2**31),
    st.floats(-3, 3),
)
quantizations = st.sampled_from(QUANTIZATIONS)


def kind_of(quantization: Quantization) -> type[QuantizedLinear]:
    return LINEARS[quantization.method]


def round_trip(weight: Tensor, quantization: Quantization) -> Tensor:
    kind = kind_of(quantization)
    return kind.unpack(kind.pack(weight, quantization), weight.shape[1])


@settings(deadline=None)
@given(weights)
def test_int8_is_at_most_half_a_step_away(weight: Tensor) -> None:
    packed = Int8Linear.pack(weight, Quantization(method="int8"))
    largest = weight.abs().amax(dim=1)
    torch.testing.assert_close(packed["scale"], largest / 127)
    error = (Int8Linear.unpack(packed, weight.shape[1]) - weight).abs().amax(dim=1)
    assert (error <= packed["scale"] / 2 * (1 + 1e-5)).all()
    assert (packed["qweight"].abs().amax(dim=1) == 127).all()


@settings(deadline=None)
@given(weights)
def test_fp8_is_at_most_a_sixteenth_away(weight: Tensor) -> None:
    packed = Fp8Linear.pack(weight, Quantization(method="fp8"))
    torch.testing.assert_close(packed["scale"], weight.abs().amax(dim=1) / 448)
    error = (Fp8Linear.unpack(packed, weight.shape[1]) - weight).abs()
    # Three bits of mantissa; below 2^-6 steps of 2^-9.
    bound = torch.maximum(weight.abs() / 16, packed["scale"][:, None] * 2**-10)
    assert (error <= bound * (1 + 1e-5)).all()


@settings(deadline=None)
@given(weights, st.sampled_from([32, 64, 128]))
def test_int4_is_at_most_half_a_step_of_its_group_away(weight: Tensor, group_size: int) -> None:
    packed = Int4Linear.pack(weight, Quantization(method="int4", group_size=group_size))
    error = (Int4Linear.unpack(packed, weight.shape[1]) - weight).abs()
    for group, columns in enumerate(weight.split(group_size, dim=1)):
        reach = columns.amax(dim=1).clamp(min=0) - columns.amin(dim=1).clamp(max=0)
        scale = packed["scale"][:, group].float()
        # A step more than the group's ends need is only what rounding up to float16 adds.
        assert (scale >= reach / 15).all()
        assert (scale <= reach / 15 * (1 + 2**-10) + 2**-24).all()
        part = error[:, group * group_size : (group + 1) * group_size]
        assert (part <= scale[:, None] / 2 * (1 + 1e-4)).all()


@settings(deadline=None)
@given(SHAPES, st.integers(0, 2**31), quantizations)
def test_what_the_format_holds_comes_back_as_it_was(shape: tuple[int, int], seed: int, how: Quantization) -> None:
    generator = torch.Generator().manual_seed(seed)
    kind = kind_of(how)
    layer = kind(shape[1], shape[0], bias=False, dtype=torch.float32, quantization=how)
    if how.method == "int4":
        weight = torch.randint(-7, 9, shape, generator=generator).float()
        # Both ends are there in every group, so that its scale is 1.
        for start in range(0, shape[1], how.group_size):
            weight[:, start] = -7
            weight[:, min(start + how.group_size, shape[1]) - 1] = 8
            if min(start + how.group_size, shape[1]) - start == 1:
                weight[:, start] = 15
    else:
        layer.randomize(generator, 0.02)
        layer.get_buffer("scale").fill_(0.25)
        weight = layer.dequantize()
        weight[:, 0] = 0.25 * (127 if how.method == "int8" else 448)
    assert torch.equal(round_trip(weight, how), weight)


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_rows_of_zeros_stay_zero(how: Quantization) -> None:
    weight = torch.randn(4, 96)
    weight[1] = 0
    weight[3, 32:64] = 0
    stored = round_trip(weight, how)
    assert stored.isfinite().all()
    assert not stored[1].any()
    assert not stored[3, 32:64].any()


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_the_least_numbers_there_are(how: Quantization) -> None:
    # Their scales are so few units of the last place that they are rounded by up to a half.
    weight = torch.arange(1, 3000).float()[:, None] * torch.tensor([1.0, -1.0, 0.5]) * 2**-149
    stored = round_trip(weight, how)
    assert stored.isfinite().all()
    # The least scale of int4 is 2^-24.
    assert (stored.abs() <= 2**-20).all()


@pytest.mark.parametrize("how", QUANTIZATIONS)
@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_what_is_not_finite_shows_in_the_scale(how: Quantization, broken: float) -> None:
    weight = torch.ones(3, 64)
    weight[2, 40] = broken
    scale = kind_of(how).pack(weight, how)["scale"]
    assert scale[:2].isfinite().all()
    assert not scale[2].isfinite().all()


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_the_rows_do_not_depend_on_how_many_are_packed_at_a_time(
    how: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(50, 96)
    together = kind_of(how).pack(weight, how)
    monkeypatch.setattr(linear_module, "_BLOCK", 7 * 96)
    assert len(list(row_blocks(50, 96))) == 8
    apart = kind_of(how).pack(weight, how)
    assert all(torch.equal(together[name], apart[name]) for name in kind_of(how).parts)


@given(weights, quantizations, st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_layer_computes_with_what_is_stored(
    weight: Tensor, how: Quantization, rows: int, dtype: torch.dtype, bias: bool
) -> None:
    out, columns = weight.shape
    layer = kind_of(how)(columns, out, bias=bias, dtype=dtype, quantization=how)
    for name, tensor in kind_of(how).pack(weight, how).items():
        layer.get_buffer(name).copy_(tensor)
    if layer.bias is not None:
        layer.bias.data.normal_()
    x = torch.randn(rows, columns).to(dtype)
    stored = layer.dequantize().double()
    expected = F.linear(x.double(), stored, None if layer.bias is None else layer.bias.double())
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (rows, out)
    # The sum of all terms' sizes: what rounding any of them can make.
    terms = F.linear(x.double().abs(), stored.abs()) + (0 if layer.bias is None else layer.bias.double().abs())
    assert ((y - expected).abs() <= terms * (1e-5 if dtype == torch.float32 else 2**-6)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_a_gpu_packs_as_a_cpu_does(how: Quantization) -> None:
    weight = torch.randn(300, 416).bfloat16()
    here, there = kind_of(how).pack(weight, how), kind_of(how).pack(weight.cuda(), how)
    for name in kind_of(how).parts:
        assert there[name].is_cuda
        # Divisions may be rounded differently, so a weight in the middle of two steps may go either way.
        same = here[name].float() == there[name].cpu().float()
        assert same.double().mean() > 0.999


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_random_weights_have_the_deviation_that_was_asked_for(how: Quantization, device: str) -> None:
    layers = []
    for _ in range(2):
        with torch.device(device):
            layer = kind_of(how)(500, 400, bias=True, dtype=torch.bfloat16, quantization=how)
        layer.randomize(torch.Generator(device).manual_seed(3), 0.02)
        layers.append(layer.dequantize())
    assert torch.equal(*layers)
    assert layers[0].isfinite().all()
    assert abs(layers[0].std().item() - 0.02) < 5e-4
    assert abs(layers[0].mean().item()) < 0.0025


def test_a_layer_takes_the_place_of_a_linear_one() -> None:
    with torch.device("meta"):
        plain = nn.Linear(300, 20, dtype=torch.bfloat16)
    layer = Int4Linear.like(plain, Quantization(method="int4", group_size=64))
    assert {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()} == {
        "bias": ((20,), torch.bfloat16),
        "qweight": ((20, 160), torch.uint8),
        "scale": ((20, 5), torch.float16),
        "zero": ((20, 5), torch.uint8),
    }
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


@pytest.mark.parametrize("group_size", [1, 16, 48, 100])
def test_impossible_groups(group_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"quantization_group_size: got {group_size}, expected a multiple of 32"):
        Int4Linear.pack(torch.ones(2, 64), Quantization(method="int4", group_size=group_size))


def test_where_the_four_bits_are() -> None:
    weight = torch.arange(64).remainder(16).float()[None]
    weight[0, 32:] = 15 - weight[0, 32:]
    packed = Int4Linear.pack(weight, Quantization(method="int4", group_size=64))
    assert packed["scale"].tolist() == [[1.0]]
    assert packed["zero"].tolist() == [[0]]
    # Byte j: column j below, column 32 + j above.
    assert packed["qweight"][0].tolist() == [j % 16 | (15 - j % 16) << 4 for j in range(32)]
