"""Building an engine directory: a checkpoint fused, packed, measured, and written with its limits and hashes.

Entries come one at a time and go straight into their file, so a model larger than the memory can be built. With the
same inputs every file is the same, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from foveate.checkpoint.engine import FORMAT, MANIFEST, FileRecord, Limits, Manifest, Source, is_engine, read_manifest
from foveate.checkpoint.files import ENGINE_INDEX
from foveate.checkpoint.identity import identity
from foveate.checkpoint.layout import DTYPES
from foveate.checkpoint.load import load_model, state_shapes, stream_parameters
from foveate.checkpoint.random import random_parameters
from foveate.checkpoint.staging import staged
from foveate.checkpoint.write import (
    Entry,
    Pieces,
    Progress,
    copy_file,
    plan_shards,
    write_bytes,
    write_index,
    write_shards,
)
from foveate.errors import CheckpointError
from foveate.models.config import ModelConfig
from foveate.quantization.error import WeightErrors, measure_error
from foveate.quantization.scheme import Quantization
from foveate.version import version

SHARD_BYTES = 4 * 2**30
MEASURED_BYTES = 2 * 2**30
"""A language model below this size is loaded twice, to measure what quantization does to its logits."""
_DIGITS = 4
_REQUIRED = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
_OPTIONAL = ("generation_config.json", "chat_template.jinja")
_FORMAT_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8",
    torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
_CHUNK = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to build.

    Attributes:
        quantization: how to store the weights; see :func:`foveate.checkpoint.place.pick_quantization`.
        dtype: of everything that is not quantized: ``bfloat16`` or ``float32``.
        limits: see :func:`foveate.checkpoint.limits.choose_limits`.
        device: where the weights are packed.
        dummy: make the weights up; the folder only has to hold the configuration and the tokenizer.
        prompts: token ids on which the quantized language model is measured.
    """

    quantization: Quantization
    dtype: str
    limits: Limits
    device: torch.device
    dummy: bool = False
    prompts: Sequence[Sequence[int]] = ()


def build(
    folder: Path, output: Path, recipe: Recipe, *, force: bool = False, progress: Progress | None = None
) -> Manifest:
    """Write an engine directory.

    Args:
        folder: a published checkpoint.
        output: must not be there, unless ``force`` is given and it is an engine directory.
        recipe: what to build.
        force: replace an engine directory.
        progress: called with bytes written and bytes in all.

    Returns:
        what is in its ``engine.json``

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or not one of a supported model.
        ConfigError: the output is there already, or the checkpoint cannot be quantized in this way.
        OutputError: it does not fit the disk, or cannot be written.
    """
    if is_engine(folder):
        raise CheckpointError(f"{folder}: is an engine directory already; build from the checkpoint it was built from")
    for name in _REQUIRED:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: is missing")
    config, dtype = ModelConfig.from_folder(folder), DTYPES[recipe.dtype]
    quantization = recipe.quantization
    errors = WeightErrors()
    # Everything is checked here, before anything is written.
    if recipe.dummy:
        tensors = random_parameters(config, quantization, dtype, recipe.device, errors)
    else:
        tensors = stream_parameters(folder, dtype, quantization=quantization, device=recipe.device, errors=errors)
    entries = [
        Entry(name, _FORMAT_NAMES[kind], shape)
        for name, (shape, kind) in state_shapes(config, quantization, dtype).items()
    ]
    shards = plan_shards(entries, stem="engine", shard_bytes=SHARD_BYTES, group=lambda name: name.split(".")[0])
    needed = sum(shard.nbytes for shard in shards)
    with staged(output, needed_bytes=needed, force=force, ours=_is_built) as staging:
        files = write_shards(staging, shards, ((name, _bytes_of(tensor)) for name, tensor in tensors), progress)
        files[ENGINE_INDEX] = write_index(staging / ENGINE_INDEX, shards)
        files |= _copied(folder, staging)
        manifest = Manifest(
            format=FORMAT, foveate=version(), model_type=config.model_type, dtype=recipe.dtype,
            quantization=quantization, limits=recipe.limits, parameters=_parameters(config, dtype),
            error=_error(folder, config, recipe, errors),
            source=Source(name=folder.name, identity=identity(folder, dummy=recipe.dummy)),
            files=dict(sorted(files.items())),
        )  # fmt: skip
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
        write_bytes(staging / MANIFEST, text)
    return manifest


def _is_built(folder: Path) -> bool:
    """Whether a folder is an engine directory, with nothing in it that is not of one."""
    if not is_engine(folder):
        return False
    try:
        known = read_manifest(folder).files.keys() | {MANIFEST}
    except CheckpointError:
        return False
    return all(path.is_file() and path.name in known for path in folder.iterdir())


def _bytes_of(tensor: Tensor) -> Pieces:
    """Give a tensor's memory as it is, some megabytes at a time."""
    flat = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
    return (memoryview(part.numpy()) for part in flat.split(_CHUNK))


def _copied(folder: Path, staging: Path) -> dict[str, FileRecord]:
    names = [*_REQUIRED, *(name for name in _OPTIONAL if (folder / name).is_file())]
    return {name: copy_file(folder / name, staging / name) for name in names}


def _parameters(config: ModelConfig, dtype: torch.dtype) -> dict[str, int]:
    counts = {"language": 0, "vision": 0}
    for name, (shape, _) in state_shapes(config, Quantization(), dtype).items():
        counts[name.split(".")[0]] += math.prod(shape)
    return counts


def _error(folder: Path, config: ModelConfig, recipe: Recipe, errors: WeightErrors) -> dict[str, float] | None:
    """Say what quantization has cost: of the weights, and of what a model says that is small enough to be run here."""
    if not errors.layers:
        return None
    found = errors.summary()
    bytes_in_float32 = _parameters(config, torch.float32)["language"] * 4
    if not recipe.dummy and bytes_in_float32 < MEASURED_BYTES:
        exact = load_model(folder, recipe.device, torch.float32, part="language")
        packed = load_model(
            folder, recipe.device, DTYPES[recipe.dtype], part="language", quantization=recipe.quantization
        )
        found |= measure_error(exact.language, packed.language, recipe.prompts or None)
    # Rounded, since the last digits depend on how many threads have added them up.
    return {name: float(f"{value:.{_DIGITS}g}") for name, value in sorted(found.items())}
