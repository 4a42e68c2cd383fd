"""Pixels against those of the published preprocessor, bit for bit."""

import hashlib
import json

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, TINY, pixels, unpatched
from safetensors.numpy import load_file

from foveate.checkpoint.load import load_model
from foveate.vision.encoder import VisionEncoder

MANIFEST = json.loads((GOLDEN / "preprocess" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    model = load_model(TINY, torch.device("cpu"), torch.float32)
    return VisionEncoder(model.vision, mean=[0.5] * 3, std=[0.5] * 3, batch_size=16)


@pytest.mark.parametrize("name", MANIFEST)
def test_every_slice_has_the_reference_s_hash(name: str, encoder: VisionEncoder) -> None:
    picture, golden = pixels(name), MANIFEST[name]
    assert [list(size) for size in picture.tgt_sizes] == golden["tgt_sizes_hw"]
    ends = np.cumsum([rows * columns for rows, columns in picture.tgt_sizes])
    for patches, expected in zip(np.split(picture.patches, ends[:-1]), golden["sha256_float32_slices"], strict=True):
        normalized = encoder.normalize(torch.from_numpy(patches)).numpy()
        assert hashlib.sha256(np.ascontiguousarray(unpatched(normalized)).tobytes()).hexdigest() == expected


@pytest.mark.parametrize("name", ["syn_palette.png", "syn_wide.png"])
def test_pixels(name: str) -> None:
    golden = load_file(GOLDEN / "preprocess" / f"{name.removesuffix('.png')}.safetensors")
    assert np.array_equal(unpatched(pixels(name).patches), golden["slice_0_u8"])
