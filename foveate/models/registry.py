"""Which class serves which ``model_type``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foveate.errors import CheckpointError
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import Destination, MiniCPMV, checkpoint_tensors


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to build a model, and where the tensors of its checkpoints go."""

    build: Callable[[ModelConfig], MiniCPMV]
    tensors: Callable[[ModelConfig], dict[str, Destination]]


ARCHITECTURES = {"minicpmv": Architecture(MiniCPMV, checkpoint_tensors)}


def architecture(config: ModelConfig) -> Architecture:
    """Return the architecture of a configuration.

    Raises:
        CheckpointError: there is none for its ``model_type``; the message lists those there are.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(f"model_type {config.model_type!r} is not supported; supported: {known}")
    return found
