"""Which files hold a checkpoint's weights, as its index says. Nothing here needs torch."""

from __future__ import annotations

import json
from pathlib import Path

from foveate.checkpoint.engine import is_engine
from foveate.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ENGINE_INDEX = "engine.safetensors.index.json"


def shards(folder: Path) -> dict[Path, frozenset[str] | None]:
    """List the safetensors files of a checkpoint in the order of their names, each with the tensors it should hold.

    Returns:
        for each file what the index says is in it, or None where there is no index to say. An engine directory always
        has one.

    Raises:
        CheckpointError: the index is malformed or leads out of its folder, or a file is missing.
    """
    index = folder / (ENGINE_INDEX if is_engine(folder) else INDEX)
    if index.name == INDEX and not index.is_file():
        return {_there(folder / SINGLE): None}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is not an index of safetensors files ({error!r})") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names {name!r}, which is not a file of its own folder")
    return {
        _there(folder / name): frozenset(tensor for tensor, where in weight_map.items() if where == name)
        for name in names
    }


def _there(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    return path
