"""Names for where a process runs, equal exactly where memory can be shared."""

from __future__ import annotations

from pathlib import Path

import torch


def host_id() -> str:
    """Name the running kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def device_id(device: torch.device) -> str:
    """Name a device: ``cpu``, or ``cuda:`` and the GPU's UUID, which no environment variable renumbers."""
    if device.type != "cuda":
        return device.type
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    return f"cuda:GPU-{uuid}"
