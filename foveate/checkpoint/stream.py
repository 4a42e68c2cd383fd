"""Making the entries of a model out of a folder's tensors, one after another: fused, cast and packed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from foveate.checkpoint.headers import Progress, Reader, check
from foveate.checkpoint.layout import Layout, Piece, agree, empty_model, entries, layout
from foveate.checkpoint.stored import stored_tensors
from foveate.errors import CheckpointError
from foveate.quantization.error import WeightErrors
from foveate.quantization.linear import QuantizedLinear
from foveate.quantization.scheme import Quantization
from foveate.quantization.unpack import from_published, is_in_order

Part = Literal["all", "language", "vision"]
"""What a process needs of a model: the engine ``language``, the vision encoder ``vision``."""

_EMBEDDINGS = "language.embed_tokens.weight"
_PUBLISHED_PARTS = ("qweight", "qzeros", "scales")


class Stream:
    """The entries of a folder's model, made one after another. Making it checks the whole folder."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        *,
        part: Part,
        quantization: Quantization | None,
        device: torch.device,
        progress: Progress | None,
        errors: WeightErrors | None = None,
    ) -> None:
        self.layout: Layout = layout(folder)
        self.quantization = agree(folder, self.layout.quantization, quantization)
        config = self.layout.config
        stored = stored_tensors(folder)
        check(folder, config.model_type, stored, self.layout.expected)
        self.model = empty_model(config, self.quantization, dtype)
        self.entries = {
            name: entry for name, entry in entries(self.model).items() if part in ("all", name.split(".")[0])
        }
        self.device, self.errors = device, errors
        self.read = Reader(stored, progress)
        self.read.total = sum(self._reads(name) for name in self.entries)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, (shape, dtype) in self.entries.items():
            pieces = self.layout.pieces.get(name)
            if pieces is not None:
                yield name, self._fused(pieces, shape, dtype)
                continue
            layer, kind = self._layer_of(name)
            # The first part brings the others with it: they come right behind it.
            if name.endswith(f".{kind.parts[0]}"):
                packed = self._packed(layer, kind)
                for part in kind.parts:
                    yield f"{layer}.{part}", packed.pop(part)

    def _layer_of(self, name: str) -> tuple[str, type[QuantizedLinear]]:
        layer = name.rpartition(".")[0]
        module = self.model.get_submodule(layer)
        assert isinstance(module, QuantizedLinear), f"{name} is made of nothing"
        return layer, type(module)

    def _reads(self, name: str) -> int:
        """Count the tensors that making an entry reads."""
        if name in self.layout.pieces:
            return len(self.layout.pieces[name])
        layer, kind = self._layer_of(name)
        if not name.endswith(f".{kind.parts[0]}"):
            return 0
        pieces = self._pieces_of(layer)
        if layer not in self.layout.packed:
            return len(pieces)
        return sum(len(_PUBLISHED_PARTS) + len(self._beside(piece)) for piece in pieces)

    def _fused(self, pieces: list[Piece], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if len(pieces) == 1:
            # Copied in any case, since what was read shares the file's memory.
            return self.read(pieces[0].name).reshape(shape).to(self.device, dtype, copy=True)
        fused = torch.empty(shape, dtype=dtype, device=self.device)
        for piece in pieces:
            fused[piece.start : piece.start + piece.rows].copy_(self.read(piece.name))
        return fused

    def _packed(self, layer: str, kind: type[QuantizedLinear]) -> dict[str, Tensor]:
        """Pack a layer, piece by piece: rows are packed on their own, so the fused weight never exists."""
        whole: dict[str, Tensor] = {}
        pieces = self._pieces_of(layer)
        for piece in pieces:
            rows = self._taken_over(piece) if layer in self.layout.packed else self._quantized(piece, layer, kind)
            if len(pieces) == 1:
                return rows
            for part, tensor in rows.items():
                if part not in whole:
                    shape, dtype = self.entries[f"{layer}.{part}"]
                    whole[part] = torch.empty(shape, dtype=dtype, device=self.device)
                whole[part][piece.start : piece.start + piece.rows] = tensor
        return whole

    def _pieces_of(self, layer: str) -> list[Piece]:
        if layer in self.layout.packed:
            return self.layout.packed[layer]
        # A head that shares the embeddings' table gets a packed copy of it.
        return self.layout.pieces.get(f"{layer}.weight") or self.layout.pieces[_EMBEDDINGS]

    def _quantized(self, piece: Piece, layer: str, kind: type[QuantizedLinear]) -> dict[str, Tensor]:
        weight = self.read(piece.name).to(self.device)
        packed = kind.pack(weight, self.quantization)
        if not packed["scale"].isfinite().all():
            raise CheckpointError(
                f"{self.read.stored[piece.name].file}: tensor {piece.name} cannot be quantized to {kind.method}: it "
                "holds numbers that are infinite, NaN, or too large for a scale"
            )
        if self.errors is not None:
            self.errors.add(layer, weight, packed, kind)
        return packed

    def _taken_over(self, piece: Piece) -> dict[str, Tensor]:
        """Bring a published layer of 4-bit integers into our layout."""
        published = self.layout.config.published
        assert published is not None, "only such checkpoints have packed pieces"
        for name in self._beside(piece):
            tensor = self.read(name)
            if name.endswith(".g_idx") and not is_in_order(tensor, published.columns):
                raise CheckpointError(
                    f"{self.read.stored[name].file}: tensor {name} orders the columns by their importance (desc_act), "
                    "which is not supported: quantize with desc_act off, or with static_groups"
                )
            if name.endswith(".bias") and tensor.any():
                raise CheckpointError(f"{self.read.stored[name].file}: tensor {name} is a bias that this model lacks")
        qweight, qzeros, scales = (self.read(f"{piece.name}.{part}").to(self.device) for part in _PUBLISHED_PARTS)
        return from_published(qweight, qzeros, scales, published)

    def _beside(self, piece: Piece) -> list[str]:
        """Name what a published layer has beside its weight, where it is only looked at."""
        names = [f"{piece.name}.g_idx", f"{piece.name}.bias"]
        return [name for name in names if name in self.read.stored and self.layout.expected[name].optional]
