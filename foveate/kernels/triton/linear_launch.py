"""Launches the kernels of the products: grids, workspaces, and what goes where."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from foveate.kernels.triton import pdl
from foveate.kernels.triton.linear_decode import linear_kernel
from foveate.kernels.triton.linear_gemv import gemv_kernel
from foveate.kernels.triton.linear_int4 import int4_kernel, unpack_int4_rows
from foveate.kernels.triton.linear_slab import quantize_rows, unpack_rows
from foveate.kernels.triton.tuning import DECODE_ROWS, UPCOMING_PROGRAMS, Config

_COUNTERS = 16384
_local = threading.local()


@dataclass(frozen=True)
class Call:
    """The arguments of a product.

    Attributes:
        x: [rows, in], each row contiguous.
        qweight: int8, float8_e4m3fn or the type of ``x`` [out, in], or packed 4-bit integers.
        scale: of its rows, or their groups; None if the weight is of the type of ``x``.
        zero: the zero points of 4-bit integers, or None.
        bias: [out], or None.
        residual: the shape of the result, or None.
        fused: apply silu(gate) * up.
        upcoming: what is read soon after, or None.
    """

    x: Tensor
    qweight: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    fused: bool
    upcoming: Tensor | None

    @property
    def columns(self) -> int:
        """Return the columns of the result."""
        return self.qweight.shape[0] // 2 if self.fused else self.qweight.shape[0]

    @property
    def scales(self) -> Tensor:
        """Return the scales, or any tensor: a kernel's argument must be something, though it is not read."""
        return self.qweight if self.scale is None else self.scale


def gemv(config: Config, call: Call) -> Tensor:
    """Multiply one row; see ``linear_gemv``."""
    x, columns, block_k = call.x, call.columns, config.block_k
    assert x.shape[0] == 1
    out = x.new_empty(1, columns)
    programs = triton.cdiv(call.qweight.shape[0], config.block_n)
    gemv_kernel[(programs,)](
        x, _bytes(call.qweight), call.scales, *_added(call, out), out, columns, _piece(config, call),
        *_upcoming(config, call, programs), x.shape[1], BLOCK_N=config.block_n, BLOCK_K=block_k, UNROLL=config.groups,
        DIRECT=config.direct, EVEN_K=x.shape[1] % block_k == 0, **_common(config, call),
    )  # fmt: skip
    return out


def tiles(config: Config, call: Call) -> Tensor:
    """Multiply with tiles on the tensor cores; see ``linear_decode``."""
    (rows, in_features), columns = call.x.shape, call.columns
    block_m, block_n = config.block_m, config.block_n
    out = call.x.new_empty(rows, columns)
    count = triton.cdiv(call.qweight.shape[0], block_n) * triton.cdiv(rows, block_m)
    split = config.split if count <= _COUNTERS else 1
    linear_kernel[(count, split)](
        call.x, _bytes(call.qweight), call.scales, *_added(call, out), out,
        *_workspace(count * block_m * block_n, split, call.scales), rows, columns, call.x.stride(0),
        _piece(config, call), *_upcoming(config, call, count * split), in_features, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=config.block_k, GROUPS=config.groups, SPLIT=split, SUPER=config.supers, SWAP=config.swap,
        EVEN_K=in_features % (config.block_k * config.groups * split) == 0,
        ALIGNED=block_m > DECODE_ROWS and columns % 16 == 0, ASYNC=_is_async(call.x, config),
        **_common(config, call),
    )  # fmt: skip
    return out


def int4_tiles(config: Config, call: Call) -> Tensor:
    """Multiply by 4-bit integers; see ``linear_int4``."""
    assert call.scale is not None
    (rows, in_features), columns, groups = call.x.shape, call.columns, call.scale.shape[1]
    block_m, block_n, split = config.block_m, config.block_n, config.split
    out = call.x.new_empty(rows, columns)
    grid = (triton.cdiv(call.qweight.shape[0], block_n), split, triton.cdiv(rows, block_m))
    int4_kernel[grid](
        call.x, call.qweight, call.scale, call.zero, *_added(call, out), out,
        *_workspace(grid[0] * grid[2] * block_m * block_n, split, call.scale), rows, columns, call.x.stride(0),
        _piece(config, call), *_upcoming(config, call, grid[0] * split), in_features, NUM_GROUPS=groups,
        HALF=call.qweight.shape[1] // groups, BLOCK_M=block_m, BLOCK_N=block_n, GROUPS=config.groups, SPLIT=split,
        **_common(config, call),
    )  # fmt: skip
    return out


def slabs(config: Config, call: Call) -> Tensor:
    """Unpack some rows of the weight at a time, and leave the product to PyTorch; there is no silu in it."""
    assert call.scale is not None
    out_features, in_features = call.qweight.shape[0], call.x.shape[1]
    out = call.x.new_empty(call.x.shape[0], out_features)
    slab = call.x.new_empty(min(config.block_n, out_features), in_features)
    for start in range(0, out_features, config.block_n):
        part = slice(start, min(start + config.block_n, out_features))
        weight = slab[: part.stop - start]
        if call.zero is None:
            unpack_rows(call.qweight[part], call.scale[part], weight)
        else:
            unpack_int4_rows(call.qweight[part], call.scale[part], call.zero[part], weight)
        if call.bias is None:
            torch.mm(call.x, weight.t(), out=out[:, part])
        else:
            torch.addmm(call.bias[part], call.x, weight.t(), out=out[:, part])
    return out if call.residual is None else out.add_(call.residual)


def scaled(call: Call) -> Tensor:
    """Round the activations to 8-bit floats as well, for PyTorch's product of these; there is no silu in it."""
    assert call.scale is not None
    rounded, scale = quantize_rows(call.x)
    out: Tensor = torch._scaled_mm(
        rounded, call.qweight.t(), scale_a=scale[:, None], scale_b=call.scale[None, :], bias=call.bias,
        out_dtype=call.x.dtype, use_fast_accum=True,
    )  # fmt: skip
    return out if call.residual is None else out.add_(call.residual)


def library(call: Call) -> Tensor:
    """Leave a product with plain floats to PyTorch; there is no silu in it."""
    out = F.linear(call.x, call.qweight, call.bias)
    return out if call.residual is None else out.add_(call.residual)


def counters(device: torch.device) -> Tensor:
    """Return this thread's counters on a device: int32 zeros, which every kernel leaves as zeros.

    Raises:
        RuntimeError: they are made while a CUDA graph is captured, which would clear them in every replay only.
    """
    made: dict[torch.device, Tensor] = _local.__dict__.setdefault("counters", {})
    if device not in made:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a split product was captured on a thread that had not called linear.reserve")
        made[device] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    return made[device]


def _common(config: Config, call: Call) -> dict[str, Any]:
    dependent = pdl.launch_options(call.x)
    return {
        "FUSED": call.fused,
        "HAS_BIAS": call.bias is not None,
        "HAS_RESIDUAL": call.residual is not None,
        "THREADS": 32 * config.warps,
        "NATIVE": call.x.is_cuda,
        "STAGES": config.stages,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **dependent,
        "launch_pdl": bool(dependent["launch_pdl"]) and config.pdl,
    }


def _is_async(x: Tensor, config: Config) -> bool:
    """Say whether a tile's products run beside the program: on Hopper, without groups, four warps at a time."""
    return x.is_cuda and config.groups == 1 and config.warps % 4 == 0 and _major(x.get_device()) == 9


@lru_cache(maxsize=16)
def _major(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _added(call: Call, out: Tensor) -> tuple[Tensor, Tensor]:
    return call.scales if call.bias is None else call.bias, out if call.residual is None else call.residual


def _bytes(qweight: Tensor) -> Tensor:
    # Devices before 8.9 have no such floats; the kernels read their bits.
    return qweight.view(torch.uint8) if qweight.dtype == torch.float8_e4m3fn else qweight


def _piece(config: Config, call: Call) -> int:
    """Return how many bytes of a row each thread of a block fetches early, 0 where that is of no use."""
    threads, row_bytes = 32 * config.warps, call.qweight.shape[1] * call.qweight.element_size()
    if not config.prefetch or not pdl.launch_options(call.x)["PDL"] or config.block_n > threads or row_bytes % 16:
        return 0
    return min(config.prefetch, row_bytes // config.split) // (threads // config.block_n) // 16 * 16


def _upcoming(config: Config, call: Call, programs: int) -> tuple[Tensor, int, int]:
    """Return what to bring into the cache, in which pieces, and how much of it."""
    if call.upcoming is None or not config.ahead or not pdl.launch_options(call.x)["PDL"]:
        return call.x, 0, 0
    total = min(call.upcoming.nbytes, abs(config.ahead)) // 16 * 16
    piece = -(-total // min(programs, UPCOMING_PROGRAMS) // 16) * 16
    return call.upcoming, piece if config.ahead > 0 else -piece, total


def _workspace(elements: int, split: int, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parts' memory and the counters, or anything that is a tensor if there is but one part."""
    if split == 1:
        return unused, unused
    return torch.empty(elements * split, dtype=torch.float32, device=unused.device), counters(unused.device)
