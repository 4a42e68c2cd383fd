"""Where a model goes: its device, its number type, and loading it there with a progress bar."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from foveate.checkpoint.layout import agree, stored_quantization
from foveate.checkpoint.load import Part, dummy_model, load_model
from foveate.config import ModelSettings
from foveate.errors import ConfigError
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import MiniCPMV
from foveate.quantization.scheme import GROUP_SIZE, Quantization


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that is there.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name} is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn ``auto``, ``float32`` or ``bfloat16`` into a type."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def pick_quantization(settings: ModelSettings, folder: Path) -> Quantization:
    """Decide how a folder's weights are to be in memory.

    A setting that was left at its default goes along with what the folder has.

    Raises:
        ConfigError: the folder is quantized already, in another way, or there is nothing to quantize the encoder with.
        CheckpointError: the folder does not say how it is stored.
    """
    stored = stored_quantization(folder)
    method = stored.method if settings.quantization == "auto" else settings.quantization
    if settings.quantize_vision and method == "none":
        raise ConfigError("quantize_vision: got true, but nothing is quantized: set quantization to int8, fp8 or int4")
    is_default = settings.quantization_group_size == GROUP_SIZE
    same = method == stored.method
    wanted = Quantization(
        method=method,
        group_size=stored.group_size if same and is_default else settings.quantization_group_size,
        vision=settings.quantize_vision or (same and stored.vision),
    )
    return agree(folder, stored, wanted)


def load(settings: ModelSettings, device: torch.device, dtype: torch.dtype, part: Part = "all") -> MiniCPMV:
    """Load the model of ``settings.model`` (a folder), or one part of it, or make it up with ``load_format: dummy``.

    Args:
        settings: ``model`` is a folder already; ``load_format`` decides about the weights, ``quantization`` about how
            they are stored.
        device: where the weights go.
        dtype: what they become.
        part: what to fill; see :func:`foveate.checkpoint.load.load_model`.

    Raises:
        ConfigError: there is no folder, or it is quantized in another way than the settings want.
        CheckpointError: the checkpoint cannot be served.
    """
    if settings.model is None:
        raise ConfigError("model: a folder is needed")
    folder = Path(settings.model)
    quantization = pick_quantization(settings, folder)
    if settings.load_format == "dummy":
        return dummy_model(ModelConfig.from_folder(folder), device, dtype, part=part, quantization=quantization)
    # Shown where somebody is looking, and only while there is something to wait for.
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"Loading {folder.name}", total=None)
        return load_model(
            folder,
            device,
            dtype,
            part=part,
            quantization=quantization,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
