"""What is in a model's folder, by its small files and the headers of the large ones. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from foveate.checkpoint.engine import Limits, Manifest, Source, is_engine, read_manifest
from foveate.checkpoint.files import shards
from foveate.checkpoint.hashes import Progress, check_files
from foveate.checkpoint.memory import LONGEST, Machine, MemoryPlan, demand_of, plan_memory
from foveate.checkpoint.stored import StoredTensor, stored_tensors
from foveate.config import EngineSettings, Settings
from foveate.errors import CheckpointError
from foveate.models.config import LanguageConfig, ModelConfig
from foveate.quantization.scheme import Quantization

Kind = Literal["checkpoint", "engine directory", "language part", "vision part"]
_VISION_PREFIXES = ("vpm.", "resampler.", "vision.")
_DTYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "F64": "float64"}


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the model: how many parameters, and the bytes that they take on the disk, by type."""

    parameters: int
    bytes: int
    bytes_by_dtype: dict[str, int]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it.

    Attributes:
        folder: what was looked at.
        kind: what it is.
        model_type: the architecture.
        architecture: its sizes, by part.
        parts: by name, ``language`` and ``vision``.
        files: number of files with weights.
        dtype: of what is not quantized.
        quantization: how the weights are stored, as the folder says; ``method`` is none, int8, fp8, int4, awq or gptq.
        limits, source, foveate, error: see :class:`foveate.checkpoint.engine.Manifest`; None for other folders.
        memory: a plan for each machine; none for a part, which is not served alone.
        hashes: what is wrong with the files; None if there are no hashes or they were not asked for.
    """

    folder: str
    kind: Kind
    model_type: str
    architecture: dict[str, Any]
    parts: dict[str, Part]
    files: int
    dtype: str
    quantization: dict[str, Any]
    limits: Limits | None = None
    source: Source | None = None
    foveate: str | None = None
    error: dict[str, float] | None = None
    memory: list[MemoryPlan] = []
    hashes: list[str] | None = None


def inspect(
    folder: Path, machines: Iterable[Machine], *, with_hashes: bool = True, progress: Progress | None = None
) -> Report:
    """Look at a published checkpoint, an engine directory, or a part that was split off.

    Args:
        folder: the model's.
        machines: to plan for.
        with_hashes: read every byte of an engine directory.
        progress: called with bytes hashed and bytes in all.

    Raises:
        CheckpointError: it is none of these, or a file is missing or malformed.
    """
    raw = _raw_config(folder)
    manifest = read_manifest(folder) if is_engine(folder) else None
    hashes = check_files(folder, manifest, progress) if manifest and with_hashes else None
    if hashes:
        # What the files say is of no use if they are not those that were written.
        stored: dict[str, StoredTensor] = {}
    else:
        stored = stored_tensors(folder)
    parts = _parts(stored, raw, manifest)
    kind = _kind(folder, raw, manifest, stored)
    config = None if kind == "language part" else ModelConfig.from_folder(folder)
    facts = Report(
        folder=str(folder), kind=kind, model_type=str(raw.get("model_type")), architecture=_architecture(raw, config),
        parts=parts, files=0 if hashes else len(shards(folder)), dtype=_dtype(stored, manifest),
        quantization=_quantization(raw, manifest), hashes=hashes,
    )  # fmt: skip
    if manifest is not None:
        facts = msgspec.structs.replace(
            facts, limits=manifest.limits, source=manifest.source, foveate=manifest.foveate, error=manifest.error
        )
    if config is None or hashes or kind == "vision part":
        return facts
    plans = [_plan(config, facts, manifest, machine) for machine in machines]
    return msgspec.structs.replace(facts, memory=plans)


def _raw_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _kind(folder: Path, raw: Mapping[str, Any], manifest: Manifest | None, stored: Mapping[str, StoredTensor]) -> Kind:
    if manifest is not None:
        return "engine directory"
    if raw.get("model_type") == "qwen2":
        return "language part"
    if stored and all(name.startswith(_VISION_PREFIXES) for name in stored):
        return "vision part"
    return "checkpoint"


def _parts(stored: Mapping[str, StoredTensor], raw: Mapping[str, Any], manifest: Manifest | None) -> dict[str, Part]:
    tensors: dict[str, dict[str, StoredTensor]] = {"language": {}, "vision": {}}
    for name, tensor in stored.items():
        tensors["vision" if name.startswith(_VISION_PREFIXES) else "language"][name] = tensor
    bits = raw.get("quantization_config", {}).get("bits", 4) if manifest is None else 0
    parts = {}
    for part, found in tensors.items():
        by_dtype: dict[str, int] = {}
        for tensor in found.values():
            by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.nbytes
        parameters = manifest.parameters.get(part, 0) if manifest else _count(found, bits)
        if parameters:
            parts[part] = Part(parameters=parameters, bytes=sum(by_dtype.values()), bytes_by_dtype=by_dtype)
    return parts


def _count(tensors: Mapping[str, StoredTensor], bits: int) -> int:
    """Count parameters; several share an element of AWQ's and GPTQ's ``qweight``, whose other tensors are none."""
    total = 0
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            total += tensor.nbytes * 8 // bits
        elif not name.endswith((".qzeros", ".scales", ".g_idx")):
            total += math.prod(tensor.shape)
    return total


def _dtype(stored: Mapping[str, StoredTensor], manifest: Manifest | None) -> str:
    if manifest is not None:
        return manifest.dtype
    floats = {_DTYPES[tensor.dtype] for tensor in stored.values() if tensor.dtype in _DTYPES}
    return ", ".join(sorted(floats)) or "none"


def _quantization(raw: Mapping[str, Any], manifest: Manifest | None) -> dict[str, Any]:
    if manifest is not None:
        found: dict[str, Any] = msgspec.to_builtins(manifest.quantization)
        return found
    published = raw.get("quantization_config") or {}
    keys = ("bits", "w_bit", "group_size", "q_group_size", "zero_point", "sym", "desc_act", "modules_to_not_convert")
    return {"method": published.get("quant_method", "none")} | {key: published[key] for key in keys if key in published}


def _architecture(raw: Mapping[str, Any], config: ModelConfig | None) -> dict[str, Any]:
    if config is not None:
        found = dataclasses.asdict(config)
        return {key: found[key] for key in ("language", "vision", "query_num")}
    try:
        return {"language": dataclasses.asdict(msgspec.convert(raw, LanguageConfig, strict=False))}
    except msgspec.ValidationError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _plan(config: ModelConfig, facts: Report, manifest: Manifest | None, machine: Machine) -> MemoryPlan:
    """Plan with the limits of an engine directory, or with the server's defaults."""
    packed = facts.quantization["method"] != "none"
    if manifest:
        limits, quantization = manifest.limits, manifest.quantization
        longest = limits.max_seq_len
        engine = EngineSettings(
            max_batch_size=limits.max_batch_size, max_num_tokens=limits.max_num_tokens, max_seq_len=longest
        )
    else:
        quantization = Quantization(method="int4" if packed else "none")
        longest = min(config.language.max_position_embeddings, LONGEST)
        engine = EngineSettings(max_seq_len=longest)
    demand = demand_of(Settings(engine=engine), longest, quantization, is_gpu=machine.is_gpu)
    usual = "bfloat16" if machine.is_gpu else "float32"
    item_bytes = {"bfloat16": 2, "float32": 4}[manifest.dtype if manifest else usual]
    weights = {
        # A checkpoint's numbers become the device's usual type while they are loaded; packed ones stay.
        name: part.bytes if manifest or (packed and name == "language") else part.parameters * item_bytes
        for name, part in facts.parts.items()
    }
    return plan_memory(config, weights, item_bytes, demand, machine)
