"""The whole numbers by which Pillow resizes, against Pillow itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.media.slicing import Size, plan_slices
from foveate.vision.preprocess import columns_first, preprocess
from foveate.vision.preprocess import resized as resized_by_pillow
from foveate.vision.resize import DeviceResizer, coefficients

Picture = npt.NDArray[np.uint8]
SIDE = st.integers(1, 90)


def along_rows(pixels: Picture, new_length: int) -> Picture:
    starts, weights = coefficients(pixels.shape[1], new_length)
    places = np.minimum(starts[:, None] + np.arange(weights.shape[1]), pixels.shape[1] - 1)
    total = (pixels[:, places].astype(np.int64) * weights[:, :, None]).sum(axis=2) + 2**21
    assert np.abs(total).max() < 2**31
    return np.clip(total >> 22, 0, 255).astype(np.uint8)


def along_columns(pixels: Picture, new_length: int) -> Picture:
    return along_rows(pixels.swapaxes(0, 1), new_length).swapaxes(0, 1)


def resized(pixels: Picture, size: Size) -> Picture:
    if columns_first((pixels.shape[1], pixels.shape[0]), size):
        return along_rows(along_columns(pixels, size[1]), size[0])
    return along_columns(along_rows(pixels, size[0]), size[1])


@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE), st.integers(0, 2**32), st.booleans())
@example((10, 40), (4, 20), 1, True)
@example((11, 40), (10, 38), 1, True)
@example((11, 40), (10, 37), 1, True)
@settings(deadline=None, max_examples=150)
def test_the_same_pixels(size: Size, new_size: Size, seed: int, hard: bool) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if hard:
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    expected = np.asarray(resized_by_pillow(Image.fromarray(pixels), new_size))
    assert np.array_equal(resized(pixels, new_size), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1792, 1344), (1000, 747), (300, 1300), (2500, 333), (60, 60)])
def test_a_gpu_cuts_the_same_patches(size: Size) -> None:
    import torch

    resizer = DeviceResizer.make(torch.device("cuda"))
    assert resizer is not None
    pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    plan = plan_slices(*size)
    resizing = resizer.begin(pixels.tobytes(), size, plan)
    assert resizing is not None
    assert np.array_equal(resizing.wait(), preprocess(Image.fromarray(pixels), plan).patches)
    assert resizer.begin(bytes(3 * 10_000 * 10_000), (10_000, 10_000), plan_slices(10_000, 10_000)) is None
