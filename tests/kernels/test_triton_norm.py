"""The normalization kernels, against the reference."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import DEVICE, MARKS

from foveate.kernels import reference
from foveate.kernels.triton.norm import add_rms_norm, rms_norm

pytestmark = MARKS
# The interpreter cuts a bfloat16 off instead of rounding it, twice here.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 3584), (3, 100), (2, 2, 64), (33,), (2, 1)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, device=DEVICE) * 3).to(dtype)
    weight = torch.randn(shape[-1], device=DEVICE).to(dtype)
    expected = reference.rms_norm(x, weight, 1e-5)
    normed = rms_norm(x, weight, 1e-5)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed, expected, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 3584), (5, 100)])
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=DEVICE).to(dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(total, x + residual, rtol=TOLERANCE[dtype], atol=1e-6)
    # Of what was returned: it is the rounded sum that is normalized.
    torch.testing.assert_close(normed, reference.rms_norm(total, weight, 1e-6), rtol=TOLERANCE[dtype], atol=1e-6)


def test_rows_that_are_not_neighbours() -> None:
    x = torch.randn(4, 2, 48, device=DEVICE)[:, 1]
    weight = torch.randn(48, device=DEVICE)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_eps_counts() -> None:
    x, weight = torch.full((1, 16), 1e-3, device=DEVICE), torch.ones(16, device=DEVICE)
    torch.testing.assert_close(rms_norm(x, weight, 1e-2), reference.rms_norm(x, weight, 1e-2))


def test_no_rows() -> None:
    assert rms_norm(torch.empty(0, 64, device=DEVICE), torch.ones(64, device=DEVICE), 1e-6).shape == (0, 64)
