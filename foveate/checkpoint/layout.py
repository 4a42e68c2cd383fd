"""How a folder stores a model: which of its tensors make up which entry of the finished one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from foveate.checkpoint.engine import MANIFEST, is_engine, read_manifest
from foveate.checkpoint.headers import Expected
from foveate.errors import CheckpointError, ConfigError
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import Destination, MiniCPMV
from foveate.models.registry import architecture
from foveate.quantization.published import PublishedQuantization
from foveate.quantization.scheme import Quantization
from foveate.quantization.unpack import IN_INT32, published_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""The types of everything that is not quantized, by the names that an engine directory uses."""

_FORMAT_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
_INTEGERS = ("I32",)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor, or the stem of a packed layer's, and the rows of an entry that it fills.

    Attributes:
        name: of the tensor; of a packed layer, what comes before ``.qweight``.
        start: the first row.
        rows: how many.
    """

    name: str
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a folder stores a model.

    Attributes:
        config: of the model.
        quantization: how its weights are stored.
        expected: every tensor there should be, by name.
        pieces: by the name of an entry of the finished model, the tensors it is made of, in any order.
        packed: by the name of a linear layer of ours, its published layers of 4-bit integers.
    """

    config: ModelConfig
    quantization: Quantization
    expected: dict[str, Expected]
    pieces: dict[str, list[Piece]]
    packed: dict[str, list[Piece]]


def layout(folder: Path) -> Layout:
    """Say how a folder stores a model, from its configuration alone.

    Raises:
        CheckpointError: a file is missing or malformed, or asks for what is not supported.
    """
    config = ModelConfig.from_folder(folder)
    if is_engine(folder):
        return _of_engine(folder, config)
    destinations = architecture(config).tensors(config)
    if config.published is None:
        expected = {name: Expected(destination.shape) for name, destination in destinations.items()}
        return Layout(config, Quantization(), expected, _pieces(destinations), {})
    return _of_published(folder, config, config.published, destinations)


def stored_quantization(folder: Path) -> Quantization:
    """Say how a folder's weights are stored: a published checkpoint's, or an engine directory's.

    Raises:
        CheckpointError: see :func:`layout`.
    """
    return layout(folder).quantization


def agree(folder: Path, stored: Quantization, wanted: Quantization | None) -> Quantization:
    """Decide how the weights are to be in memory.

    Args:
        folder: names it in errors.
        stored: how they are there.
        wanted: how they should be; None for as they are.

    Raises:
        ConfigError: they are quantized already, and in another way.
    """
    if wanted is None or stored == wanted:
        return stored
    if stored.method == "none":
        return wanted
    same = replace_unused(wanted, stored)
    if same != stored:
        raise ConfigError(
            f"{folder}: is quantized already ({describe(stored)}) and cannot become {describe(wanted)}; "
            "take it as it is, or start from the unquantized checkpoint"
        )
    return stored


def replace_unused(wanted: Quantization, stored: Quantization) -> Quantization:
    """Take over from what is stored what a wish leaves open: the layers to keep, and groups where there are none."""
    grouped = wanted.method == "int4"
    return Quantization(
        method=wanted.method,
        group_size=wanted.group_size if grouped else stored.group_size,
        vision=wanted.vision,
        keep=wanted.keep or stored.keep,
    )


def describe(quantization: Quantization) -> str:
    """Say it in words: ``int4 in groups of 128, the vision encoder too``."""
    if quantization.method == "none":
        return "unquantized"
    groups = f" in groups of {quantization.group_size}" if quantization.method == "int4" else ""
    return f"{quantization.method}{groups}{', the vision encoder too' if quantization.vision else ''}"


def empty_model(config: ModelConfig, quantization: Quantization, dtype: torch.dtype) -> MiniCPMV:
    """Build a model on the meta device.

    Raises:
        CheckpointError: there is none of this type.
        ConfigError: it cannot be quantized in this way.
    """
    with torch.device("meta"):
        model = architecture(config).build(config)
    # Cast while nothing is allocated, and before the scales are there, whose types are not the activations'.
    model.to(dtype).requires_grad_(False)
    model.language.tie()
    model.quantize(quantization)
    return model


def entries(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """List the state of a model, a head that shares the embeddings' table left out: name → (shape, type)."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = (tuple(tensor.shape), tensor.dtype)
    return found


def _of_engine(folder: Path, config: ModelConfig) -> Layout:
    manifest = read_manifest(folder)
    for key, value, supported in (
        ("model_type", manifest.model_type, (config.model_type,)), ("dtype", manifest.dtype, tuple(DTYPES)),
    ):  # fmt: skip
        if value not in supported:
            raise CheckpointError(f"{folder / MANIFEST}: {key} is {value!r}, expected {' or '.join(supported)}")
    try:
        shapes = entries(empty_model(config, manifest.quantization, DTYPES[manifest.dtype]))
    except ConfigError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error
    expected = {name: Expected(shape, (_FORMAT_NAMES[dtype],)) for name, (shape, dtype) in shapes.items()}
    pieces = {name: [Piece(name, 0, shape[0])] for name, (shape, _) in shapes.items()}
    return Layout(config, manifest.quantization, expected, pieces, {})


def _pieces(destinations: Mapping[str, Destination]) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = {}
    for name, destination in destinations.items():
        pieces.setdefault(destination.parameter, []).append(Piece(name, destination.start, destination.shape[0]))
    return pieces


def _of_published(
    folder: Path, config: ModelConfig, published: PublishedQuantization, destinations: Mapping[str, Destination]
) -> Layout:
    pieces = _pieces(destinations)
    converted, keep = _converted(folder, published, pieces, empty_model(config, Quantization(), torch.float32))
    quantization = Quantization(method="int4", group_size=published.group_size, keep=keep)
    expected = {name: Expected(destination.shape) for name, destination in destinations.items()}
    packed: dict[str, list[Piece]] = {}
    for layer in converted:
        packed[layer] = []
        for piece in pieces.pop(f"{layer}.weight"):
            stem = piece.name.removesuffix(".weight")
            packed[layer].append(replace(piece, name=stem))
            expected |= _expected_of(folder, stem, expected.pop(piece.name).shape, published)
            # Some exporters give every layer a bias, of zeros where the model has none.
            expected.setdefault(f"{stem}.bias", Expected((piece.rows,), optional=True))
    return Layout(config, quantization, expected, pieces, packed)


def _converted(
    folder: Path, published: PublishedQuantization, pieces: Mapping[str, list[Piece]], model: MiniCPMV
) -> tuple[list[str], tuple[str, ...]]:
    """Return our names of the linear layers that are packed, and of those of the language model that are not."""
    converted: list[str] = []
    keep: list[str] = []
    for layer in model.linears(vision=False):
        names = [piece.name.removesuffix(".weight") for piece in pieces.get(f"{layer}.weight", [])]
        answers = {published.converts(name) for name in names}
        if len(answers) > 1:
            raise CheckpointError(
                f"{folder / 'config.json'}: quantization_config leaves some of {', '.join(names)} unquantized and not "
                "all, and they are one layer here"
            )
        (converted if True in answers else keep).append(layer)
    return converted, tuple(keep)


def _expected_of(
    folder: Path, stem: str, shape: tuple[int, ...], published: PublishedQuantization
) -> dict[str, Expected]:
    rows, columns = shape
    if rows % IN_INT32 or columns % IN_INT32:
        raise CheckpointError(f"{folder}: {stem} is [{rows}, {columns}], and packing needs multiples of {IN_INT32}")
    shapes = published_shapes(rows, columns, published)
    expected = {
        f"{stem}.qweight": Expected(shapes["qweight"], _INTEGERS),
        f"{stem}.qzeros": Expected(shapes["qzeros"], _INTEGERS),
        f"{stem}.scales": Expected(shapes["scales"]),
    }
    if published.method == "gptq":
        expected[f"{stem}.g_idx"] = Expected((columns,), (*_INTEGERS, "I64"), optional=True)
    return expected
