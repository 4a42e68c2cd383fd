"""The plan of a service's memory, from its settings and a look at the device: before anything is loaded."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path

import msgspec
import torch

from foveate.checkpoint.activations import ENCODED_BYTES, RESIZER_BYTES, encoder_bytes
from foveate.checkpoint.load import state_shapes
from foveate.checkpoint.memory import LONGEST, Machine, MemoryPlan, cpu_machine, demand_of, plan_memory, refusal
from foveate.checkpoint.place import pick_device, pick_dtype, pick_quantization
from foveate.config import Settings
from foveate.errors import ConfigError
from foveate.models.config import ModelConfig
from foveate.quantization.scheme import Quantization
from foveate.transport.identity import device_id

_VISION_REMEDIES = (
    "What helps: a smaller --vision-batch-size, another --vision-device, or ending what else uses this one."
)


def machine_of(device: torch.device) -> Machine:
    """Say what a device has of memory now. On a GPU this process begins to use it with that."""
    if device.type != "cuda":
        return cpu_machine()
    free, total = torch.cuda.mem_get_info(device)
    return Machine(device=torch.cuda.get_device_name(device), memory_bytes=total, free_bytes=free, is_gpu=True)


def first_look(instance: Path, device: torch.device) -> Machine:
    """Say what a device had before any process of this service took something of it.

    Whoever comes first writes that down for the others. So each has to call this before it allocates anything.

    Args:
        instance: the service's own folder.
        device: of this process.
    """
    path = instance / f"memory-{device_id(device)}.json"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=instance) as file:
            file.write(msgspec.json.encode(machine_of(device)))
            file.flush()
            # A link is there as a whole or not at all, and never takes another's place.
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    return msgspec.json.decode(path.read_bytes(), type=Machine)


def longest_sequence(settings: Settings, trained: int) -> int:
    """Return the tokens that a sequence may have: what was asked for, or what the model was trained for.

    Raises:
        ConfigError: more was asked for than that.
    """
    wanted = settings.engine.max_seq_len or min(trained, LONGEST)
    if wanted > trained:
        raise ConfigError(f"max_seq_len: got {wanted}, and the model was trained for {trained} tokens at most")
    return wanted


def plan_service(settings: Settings, device: torch.device, machine: Machine) -> MemoryPlan:
    """Plan the memory of the engine's device, with the encoder if that shares it.

    Args:
        settings: the whole service's; ``model.model`` is a folder.
        device: the engine's.
        machine: the device's memory before anything is there but this process's context.

    Raises:
        ConfigError: a setting is impossible.
        CheckpointError: the folder does not say what it has.
    """
    folder = Path(settings.model.model or "")
    config = ModelConfig.from_folder(folder)
    quantization = pick_quantization(settings.model, folder)
    dtype = pick_dtype(settings.model.dtype, device)
    vision_device, vision_dtype = _of_encoder(settings)
    has_encoder = settings.vision.encoder != "none" and device_id(vision_device) == device_id(device)
    weights = {"language": weight_bytes(config, quantization, dtype)["language"]}
    if has_encoder:
        weights["vision"] = weight_bytes(config, quantization, vision_dtype)["vision"]
    demand = demand_of(
        settings, longest_sequence(settings, config.language.max_position_embeddings), quantization,
        is_gpu=device.type == "cuda", has_encoder=has_encoder,
        contexts=int(has_encoder and settings.vision.encoder == "own"),
    )  # fmt: skip
    return plan_memory(config, weights, dtype.itemsize, demand, machine, vision_item_bytes=vision_dtype.itemsize)


def check_encoder(settings: Settings) -> int:
    """See that a device has room for the encoder alone, and return the bytes that its largest step may take.

    Raises:
        ConfigError: there is not; the message says what takes how much.
        CheckpointError: the folder does not say what it has.
    """
    folder = Path(settings.model.model or "")
    config = ModelConfig.from_folder(folder)
    quantization = pick_quantization(settings.model, folder)
    device, dtype = _of_encoder(settings)
    is_gpu = device.type == "cuda"
    demand = demand_of(settings, LONGEST, quantization, is_gpu=is_gpu)
    step = encoder_bytes(config, demand, demand.vision_batch_size, dtype.itemsize)
    pictures = RESIZER_BYTES + ENCODED_BYTES if is_gpu else 0
    parts = [
        ("weights, vision", weight_bytes(config, quantization, dtype)["vision"]),
        (f"largest step, {demand.vision_batch_size} slices (estimate)", step),
        ("pictures on their way", pictures),
    ]
    machine = machine_of(device)
    if sum(size for _, size in parts) > machine.free_bytes:
        raise refusal("the vision encoder", machine, parts, _VISION_REMEDIES)
    return step + pictures


def weight_bytes(config: ModelConfig, quantization: Quantization, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of each part's weights, as they will be in memory, without making them."""
    found: dict[str, int] = {}
    for name, (shape, kind) in state_shapes(config, quantization, dtype).items():
        part = name.partition(".")[0]
        found[part] = found.get(part, 0) + math.prod(shape) * kind.itemsize
    return found


def _of_encoder(settings: Settings) -> tuple[torch.device, torch.dtype]:
    device = pick_device(settings.vision.vision_device or settings.model.device)
    return device, pick_dtype(settings.vision.vision_dtype or settings.model.dtype, device)
