"""The activation between the two products of a gated MLP."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foveate.kernels.triton import pdl

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up for ``gate_up`` [..., 2 * size], gate first.

    silu(gate) is rounded to the type of ``gate_up`` before it is multiplied, as in the reference.

    Returns:
        [..., size]
    """
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    output = gate_up.new_empty((*gate_up.shape[:-1], size))
    if output.numel():
        grid = (output.numel() // size, triton.cdiv(size, _BLOCK))
        _silu_mul_kernel[grid](gate_up, output, size, BLOCK=_BLOCK, num_warps=4, **pdl.launch_options(gate_up))
    return output


@triton.jit
def _silu_mul_kernel(gate_up_ptr, output_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gates = gate_up_ptr + row * 2 * size + columns
    pdl.wait(PDL)
    pdl.release(PDL)
    gate = tl.load(gates, mask=inside, other=0.0)
    up = tl.load(gates + size, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    # exp2 of a large gate's negation is 0 and of a small one's is infinite; both end as they should.
    activated = (wide / (1.0 + tl.exp2(wide * -1.4426950408889634))).to(gate.dtype).to(tl.float32)
    tl.store(output_ptr + row * size + columns, (activated * up).to(gate.dtype), mask=inside)
