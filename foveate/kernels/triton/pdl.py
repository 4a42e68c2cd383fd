"""Programmatic dependent launch: a kernel is set up while its predecessor in the stream still runs.

At one client the gaps between launches cost as much as small kernels themselves. With this, from compute capability
9.0 on, the next kernel's programs are placed and do what does not depend on its predecessor (weights, tables), and
then :func:`wait`, which returns when the preceding kernel is done, with all that came before it, and its writes can be
seen. Every kernel waits in each program that does anything, and writes nothing before.

A kernel's programs are placed when all those of its predecessor have called :func:`release`. Products do so at their
start; all other kernels behind their wait. So between two kernels whose first parts run at one time there is never
more than a chain of products, and what is read before a wait must be older than the last kernel that is not a product:
model weights, or the step's block tables and lengths, written before the first normalization.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MODE = 1  # 0: off, for measurements.


def launch_options(x: Tensor) -> dict[str, int]:
    """Return the keywords ``PDL`` (of the kernel) and ``launch_pdl`` (of its launch) for the device of ``x``."""
    mode = MODE if x.is_cuda and _has_dependent_launch(x.get_device()) else 0
    return {"PDL": mode, "launch_pdl": mode > 0}


@lru_cache(maxsize=16)
def _has_dependent_launch(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the kernels before this one."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel be placed on multiprocessors that have room."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
