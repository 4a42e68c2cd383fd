"""Kernels that are compiled before they are needed. Where there is no GPU this compiles for one, and runs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# A process of its own: in this one, without a GPU, kernels are interpreted.
SCRIPT = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from foveate.kernels.triton import ahead
from foveate.kernels.triton.activation import _silu_mul_kernel as kernel

class Driver(ahead._Target):
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
x = torch.zeros(4, 64, dtype=torch.bfloat16)

def run():
    for block in (32, 64, 128, 64):
        kernel[(4, 1)](x, x, 32, BLOCK=block, PDL=0)

compiler = ahead.Compiler()
print(compiler.compile(run))
print(compiler.compile(lambda: kernel[(4, 1)](x, x, 32, BLOCK=256, PDL=0)))
compiler.close()
print(compiler.compile(run))
kernel.warmup(x, x, 32, BLOCK=64, PDL=0, grid=(4, 1))
"""


def test_what_a_dry_run_would_launch_is_compiled_once_each(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.stdout.split() == ["3", "1", "0"], result.stderr
    # The last line's kernel is found there, and not compiled again.
    assert len(list(tmp_path.glob("*/*.cubin"))) == 4
    assert "compiled when they are needed" in result.stderr
