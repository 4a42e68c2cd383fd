"""The commands on checkpoints as they are typed, and checkpoints of any size for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from golden_data import TINY
from serving import ROOT

from foveate.checkpoint.write import Entry, plan_shards, write_index, write_shards
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import checkpoint_tensors

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("FOVEATE_")},
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
    "HF_HUB_OFFLINE": "1",
}


def foveate(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "foveate.cli", *map(str, args)]
    variables = {**ENVIRONMENT, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)


def started(*args: str | Path) -> subprocess.Popen[str]:
    """Start a command."""
    command = [sys.executable, "-m", "foveate.cli", *map(str, args)]
    return subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have it ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def python(script: str, *args: str | Path) -> str:
    """Run a script in a process of its own and return what it prints."""
    command = [sys.executable, "-c", script, *map(str, args)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_json(path: Path, **values: Any) -> None:
    """Replace some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_weights(folder: Path, **config: Any) -> Path:
    """Make the tiny model's folder without weights, with a configuration of other sizes."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    change_json(folder / "config.json", **config)
    return folder


def large_checkpoint(folder: Path, *, shard_bytes: int = 2**30) -> Path:
    """Make a published checkpoint of 390 MB, in bfloat16; its largest tensor has 10 MB."""
    without_weights(folder, intermediate_size=20000, num_hidden_layers=12)
    tensors = checkpoint_tensors(ModelConfig.from_folder(folder))
    entries = [Entry(name, "BF16", destination.shape) for name, destination in tensors.items()]
    shards = plan_shards(entries, stem="model", shard_bytes=shard_bytes)
    random = np.random.default_rng(0)

    def pieces(entry: Entry) -> list[bytes]:
        # The upper half of a small float32.
        values = random.standard_normal(entry.nbytes // 2, np.float32) * np.float32(0.02)
        return [(values.view(np.uint32) >> 16).astype(np.uint16).tobytes()]

    write_shards(folder, shards, ((entry.name, pieces(entry)) for entry in entries))
    write_index(folder / "model.safetensors.index.json", shards)
    return folder
