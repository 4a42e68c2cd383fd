"""The tensors of a checkpoint: compared with what a model needs before any of them is read, and read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from foveate.checkpoint.stored import StoredTensor, listed
from foveate.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")

Progress = Callable[[int, int], None]
"""Called with (tensors loaded, tensors in all)."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that a folder should hold.

    Attributes:
        shape: in its file.
        dtypes: the types that it may have, by the format's names.
        optional: whether the folder is whole without it.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    optional: bool = False


def check(folder: Path, kind: str, stored: Mapping[str, StoredTensor], expected: Mapping[str, Expected]) -> None:
    """Compare what is there with what should be, both ways.

    Args:
        folder: names the checkpoint in errors.
        kind: the model's type, for errors.
        stored: what is there.
        expected: what should be.

    Raises:
        CheckpointError: a tensor is missing, unknown, misshapen or of the wrong type; the message names it.
    """
    for name, tensor in stored.items():
        if name not in expected:
            raise CheckpointError(f"{tensor.file}: tensor {name} does not belong to a {kind} of this size and form")
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, expected {list(wanted.shape)}"
            )
        if tensor.dtype not in wanted.dtypes:
            one_of = "one of " if len(wanted.dtypes) > 1 else ""
            raise CheckpointError(
                f"{tensor.file}: tensor {name} holds {tensor.dtype}, expected {one_of}{', '.join(wanted.dtypes)}"
            )
    if missing := sorted(name for name, wanted in expected.items() if name not in stored and not wanted.optional):
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing: {listed(missing)}")


class Reader:
    """Reads tensors, and says how far it is.

    Args:
        stored: where they are.
        progress: called after each.

    Attributes:
        total: how many will be read.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], progress: Progress | None) -> None:
        self.stored = stored
        self.total = 0
        self._progress = progress
        self._done = 0

    def __call__(self, name: str) -> Tensor:
        """Return a tensor, which shares the file's memory: keep a copy, and let go of it soon.

        Raises:
            CheckpointError: the file is damaged.
        """
        # Opened each time: what has been read of an open file counts as this process's memory until it is closed.
        with _opened(self.stored[name].file) as file:
            tensor: Tensor = file.get_tensor(name)
        self._done += 1
        if self._progress:
            self._progress(self._done, self.total)
        return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from error
