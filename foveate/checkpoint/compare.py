"""Comparing a folder's model with its reference: loading one after the other, and running both."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from PIL import Image

from foveate.checkpoint.bounds import bounds_for
from foveate.checkpoint.engine import is_engine, read_manifest
from foveate.checkpoint.layout import DTYPES, stored_quantization
from foveate.checkpoint.load import load_model
from foveate.checkpoint.place import pick_device, pick_dtype
from foveate.checkpoint.published import PublishedModel
from foveate.checkpoint.sample import SamplePicture, SampleSet
from foveate.checkpoint.stage import Stage
from foveate.checkpoint.verify import OwnModel, Trace, compare, compare_inputs, run

Preprocess = Callable[[Image.Image], SamplePicture]
SamplesOf = Callable[[Path, Preprocess | None], SampleSet]
"""Makes the samples of a checkpoint's folder, with another preprocessor than ours if there is one."""
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Shows under a title how far something is: gives what is to be called with (done, in all)."""


def compare_folders(
    folder: Path, reference: Path, samples_of: SamplesOf, bar: Bar, *, device: str, dtype: str, trust_remote_code: bool
) -> list[Stage]:
    """Run the same samples through both, the reference first.

    Args:
        folder: a published checkpoint or an engine directory, which computes in the type it was built with.
        reference: a published checkpoint, or an engine directory.
        samples_of: makes the samples as each folder's own files put them.
        bar: shows progress.
        device: where both run.
        dtype: what the reference computes in, and the other one if it is no engine directory.
        trust_remote_code: run the reference by its own code.

    Returns:
        the stages up to the first that makes comparing the rest useless

    Raises:
        ConfigError: the device is not there, or transformers is not.
        CheckpointError: a folder cannot be loaded, or the two are different models.
    """
    place = pick_device(device)
    kinds = [_dtype(path, pick_dtype(dtype, place)) for path in (reference, folder)]
    names = [str(kind).removeprefix("torch.") for kind in kinds]
    bounds = bounds_for((names[0], names[1]), stored_quantization(folder))
    own = samples_of(folder, None)
    published = PublishedModel(reference, place, kinds[0]) if trust_remote_code else None
    theirs = samples_of(reference, published.preprocess if published else None)
    inputs = compare_inputs(theirs.samples, own.samples)
    if not all(stage.ok for stage in inputs):
        # The reference's answers mean nothing to a model that reads something else.
        return inputs
    if published is not None:
        with bar(f"Running {reference.name}") as progress:
            expected = run(published, theirs, progress=progress)
        del published
    else:
        expected = _run_own(reference, place, kinds[0], theirs, bar)
    # The first model's memory is needed for the second.
    gc.collect()
    return compare(expected, _run_own(folder, place, kinds[1], own, bar, follow=expected), bounds)


def _dtype(folder: Path, usual: torch.dtype) -> torch.dtype:
    return DTYPES[read_manifest(folder).dtype] if is_engine(folder) else usual


def _run_own(
    folder: Path, device: torch.device, dtype: torch.dtype, samples: SampleSet, bar: Bar, follow: Trace | None = None
) -> Trace:
    with bar(f"Loading {folder.name}") as progress:
        model = OwnModel(load_model(folder, device, dtype, progress=progress))
    with bar(f"Running {folder.name}") as progress:
        return run(model, samples, follow=follow, progress=progress)
