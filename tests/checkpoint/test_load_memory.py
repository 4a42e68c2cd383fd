"""Memory while loading: the finished model and about one tensor, whatever the size of the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import TINY
from safetensors.torch import save_file
from serving import ROOT

from foveate.models.config import ModelConfig
from foveate.models.minicpmv import checkpoint_tensors

MEBI = 2**20
# A tensor that was read is mapped, and counts until it is dropped; blocks of floats while packing; the allocator.
SLACK = 60 * MEBI

# The peak is the kernel's own (VmHWM): getrusage's begins with that of the process that started this one.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from foveate.checkpoint.load import load_model, stream_parameters
from foveate.quantization.scheme import Quantization
torch.set_num_threads(1)
folder, warm, what, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

def run(folder):
    if what == "stream":
        return sum(tensor.nbytes for _, tensor in stream_parameters(folder, torch.bfloat16, quantization=how))
    model = load_model(folder, torch.device("cpu"), torch.bfloat16, quantization=how)
    return sum(tensor.nbytes for tensor in model.state_dict().values())

how = Quantization(method=method, vision=True)
run(warm)
before = status("VmRSS")
size = run(folder)
print(json.dumps({"size": size, "growth": status("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A checkpoint of some hundred megabytes in three files; its bytes, and those of its largest tensor."""
    folder = tmp_path_factory.mktemp("large")
    raw = json.loads((TINY / "config.json").read_text())
    raw |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "vocab_size": 20000}
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = checkpoint_tensors(ModelConfig.from_folder(folder))
    names = list(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number}.safetensors"
        shapes = {name: tensors[name].shape for name in names[number::3]}
        save_file({name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, folder / file)
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = [torch.Size(tensor.shape).numel() * 2 for tensor in tensors.values()]
    return folder, sum(sizes), max(sizes)


def peak(folder: Path, what: str, method: str) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(TINY), what, method]
    # One arena: what threads' arenas keep is not ours to count. Large blocks go back to the kernel at once.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(MEBI)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("method", ["none", "int8", "int4"])
def test_a_stream_holds_one_tensor(method: str, large: tuple[Path, int, int]) -> None:
    folder, total, largest = large
    found = peak(folder, "stream", method)
    assert found["growth"] < 2 * largest + SLACK < total / 2


@pytest.mark.parametrize("method", ["none", "int8"])
def test_loading_holds_the_model_and_one_tensor(method: str, large: tuple[Path, int, int]) -> None:
    folder, total, largest = large
    found = peak(folder, "load", method)
    assert found["size"] == pytest.approx(total if method == "none" else total / 2, rel=0.15)
    assert found["growth"] < found["size"] + 2 * largest + SLACK
