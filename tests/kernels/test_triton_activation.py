"""silu(gate) * up, against the reference."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import DEVICE, MARKS

from foveate.kernels import reference
from foveate.kernels.triton.activation import silu_mul

pytestmark = MARKS
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 2 * 1500), (3, 2 * 10), (2, 2, 2 * 7), (2 * 1024,)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = (torch.randn(shape, device=DEVICE) * 4).to(dtype)
    torch.testing.assert_close(silu_mul(gate_up), reference.silu_mul(gate_up), rtol=TOLERANCE[dtype], atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, of the interpreter.
def test_large_gates() -> None:
    gate_up = torch.tensor([[-500.0, 500.0, 0.0, 2.0, 3.0, 5.0]], device=DEVICE)
    assert silu_mul(gate_up).tolist() == [[0.0, 1500.0, 0.0]]


def test_no_rows() -> None:
    assert silu_mul(torch.empty(0, 64, device=DEVICE)).shape == (0, 32)
