"""Products with packed weights, against the same in float64; in one block of rows, and in many."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.kernels import ops, reference

torch.set_num_threads(1)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OUT, IN, GROUP = 70, 160, 64


class Product:
    """A product with a random packed weight, by ``method``'s operation."""

    def __init__(self, method: str, *parts: Tensor) -> None:
        self.method, self.parts = method, parts

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        operation = getattr(ops, f"{self.method}_linear")
        result: Tensor = operation(x, *self.parts, bias, residual)
        return result

    def gated(self, x: Tensor) -> Tensor:
        operation = getattr(ops, f"gate_up_silu_{self.method}")
        result: Tensor = operation(x, *self.parts)
        return result


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def case(method: str, device: str) -> tuple[Product, Tensor]:
    """A product with a random packed weight, and the weight: float64 [OUT, IN]."""
    scale = torch.rand(OUT) * 0.01 + 0.001
    if method == "int8":
        qweight = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8)
        parts = (qweight.to(device), scale.to(device))
        return Product(method, *parts), qweight.double() * scale.double()[:, None]
    if method == "fp8":
        qweight = torch.randn(OUT, IN).mul(50).to(torch.float8_e4m3fn)
        parts = (qweight.to(device), scale.to(device))
        return Product(method, *parts), qweight.double() * scale.double()[:, None]
    groups = -(-IN // GROUP)
    integers = torch.randint(0, 16, (OUT, groups, GROUP), dtype=torch.uint8)
    packed = torch.empty(OUT, groups, GROUP // 2, dtype=torch.uint8)
    for column in range(GROUP // 2):
        packed[:, :, column] = integers[:, :, column] + 16 * integers[:, :, GROUP // 2 + column]
    zero = torch.randint(0, 17, (OUT, groups), dtype=torch.uint8)
    half = (torch.rand(OUT, groups) * 0.01 + 0.001).half()
    weight = ((integers.double() - zero.double()[..., None]) * half.double()[..., None]).flatten(1)[:, :IN]
    packed, half, zero = packed.flatten(1).to(device), half.to(device), zero.to(device)
    return Product(method, packed, half, zero), weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [None, 1, 7 * IN])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("method", ["int8", "fp8", "int4"])
def test_products(
    method: str, with_bias: bool, block: int | None, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:
        monkeypatch.setattr(reference, "_CPU_BLOCK", block)
        monkeypatch.setattr(reference, "_GPU_BLOCK", block)
    product, weight = case(method, device)
    bias = torch.randn(OUT).to(dtype) if with_bias else None
    for shape in ((IN,), (1, IN), (5, IN), (2, 3, IN)):
        x = torch.randn(shape).to(dtype)
        y = product(x.to(device), None if bias is None else bias.to(device))
        assert y.dtype == dtype
        expected = F.linear(x.double(), weight, None if bias is None else bias.double())
        terms = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.double().abs())
        assert ((y.cpu() - expected).abs() <= terms * (1e-6 if dtype == torch.float32 else 2**-7)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_gated_products(method: str, device: str) -> None:
    product, weight = case(method, device)
    x = torch.randn(2, 3, IN)
    gate, up = F.linear(x.double(), weight).chunk(2, dim=-1)
    y = product.gated(x.to(device))
    assert y.shape == (2, 3, OUT // 2)
    torch.testing.assert_close(y.cpu().double(), F.silu(gate) * up, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["int8", "fp8", "int4"])
def test_what_is_there_is_added(method: str, device: str) -> None:
    product, _ = case(method, device)
    x, residual = torch.randn(2, 3, IN, device=device), torch.randn(2, 3, OUT, device=device)
    torch.testing.assert_close(product(x, None, residual), product(x, None) + residual, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["int8", "fp8", "int4"])
def test_they_are_named(method: str) -> None:
    assert ops.implementations(torch.device("cpu"))[f"{method}_linear"] == "torch"
