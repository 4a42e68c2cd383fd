"""What making models' folders costs at the real size, in seconds and memory, with made-up weights.

    python benchmarks/checkpoints.py FOLDER [--commands int8 split ...] [--json FILE]

FOLDER gets a checkpoint of 16 GB as it would be published, and what is made of it, one at a time. Each command runs in
a process of its own; its peak of memory is looked at fifty times a second, and leaves out pages of files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from foveate.checkpoint.layout import layout
from foveate.checkpoint.write import Entry, plan_shards, write_index, write_shards
from foveate.deploy.resolve import PRESETS

SIZE = PRESETS / "minicpm-v-2_6"
SHARD_BYTES = 5 * 10**9
CHUNK = 2**22
COMMANDS = {
    "none": ["build", "{model}", "--output", "{output}", "--quantization", "none", "--load-on-cpu"],
    "int8": ["build", "{model}", "--output", "{output}", "--quantization", "int8", "--load-on-cpu"],
    "fp8": ["build", "{model}", "--output", "{output}", "--quantization", "fp8", "--load-on-cpu"],
    "int4": ["build", "{model}", "--output", "{output}", "--quantization", "int4", "--load-on-cpu"],
    "split": ["split", "{model}", "--output", "{output}"],
    "dummy": [
        "build", "--load-format", "dummy", "--config", "minicpm-v-2_6", "--output", "{output}", "--quantization",
        "int8", "--load-on-cpu",
    ],
}  # fmt: skip


def publish(folder: Path) -> None:
    """Write a checkpoint with the published names and shapes, its weights around zero like real ones."""
    shutil.copytree(SIZE, folder)
    entries = [Entry(name, "BF16", tensor.shape) for name, tensor in layout(folder).expected.items()]
    shards = plan_shards(entries, stem="model", shard_bytes=SHARD_BYTES)
    random = np.random.default_rng(0)

    def pieces(size: int) -> Iterator[memoryview]:
        for start in range(0, size, CHUNK):
            numbers = random.standard_normal(min(CHUNK, size - start) // 2, dtype=np.float32) * np.float32(0.02)
            # The upper half of a float32 is a bfloat16.
            yield memoryview((numbers.view(np.uint32) >> 16).astype(np.uint16)).cast("B")

    write_shards(folder, shards, ((entry.name, pieces(entry.nbytes)) for entry in entries))
    write_index(folder / "model.safetensors.index.json", shards)


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and its peak of memory in GB."""
    started = time.monotonic()
    process = psutil.Popen([sys.executable, "-m", "foveate.cli", *command], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            memory = process.memory_info()
            peak = max(peak, memory.rss - memory.shared)
        except psutil.Error:
            break
        time.sleep(0.02)
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - started, peak / 1e9


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        model, output = Path(place) / "model", Path(place) / "output"
        started = time.monotonic()
        publish(model)
        print(f"made a checkpoint in {time.monotonic() - started:.0f} s")
        print(f"{'':8}{'s':>8}{'written GB':>12}{'peak GB':>10}")
        for name in arguments.commands:
            filled = [part.format(model=model, output=output) for part in COMMANDS[name]]
            seconds, peak = measure(filled)
            size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e9
            print(f"{name:8}{seconds:8.1f}{size:12.2f}{peak:10.2f}", flush=True)
            results.append({"command": name, "seconds": seconds, "gigabytes": size, "peak_gigabytes": peak})
            shutil.rmtree(output)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
