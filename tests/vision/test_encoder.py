"""The encoder's steps: what they make does not depend on what else is in them, and their memory is known."""

from __future__ import annotations

import pytest
import torch
from golden_data import EMBEDS_ATOL, PICTURE_CASES, TINY, picture_names, pixels, tensors

from foveate.chat.assets import ModelAssets
from foveate.checkpoint.load import load_model
from foveate.models.minicpmv import VisionTower
from foveate.vision.encoder import VisionEncoder, slices_of
from foveate.vision.service import measure

NAMES = ["syn_wide.png", "image1.jpg", "syn_tall.png", "frame_0.jpg"]
PICTURES = [pixels(name) for name in NAMES]


def encoder_on(device: str, dtype: torch.dtype, batch_size: int) -> VisionEncoder:
    torch.set_num_threads(1)
    tower = load_model(TINY, torch.device(device), dtype, part="vision").vision
    return VisionEncoder(tower, mean=[0.5] * 3, std=[0.5] * 3, batch_size=batch_size)


def test_alone_and_batched_agree(tower: VisionTower) -> None:
    single, batched = (VisionEncoder(tower, mean=[0.5] * 3, std=[0.5] * 3, batch_size=size) for size in (1, 16))
    for picture, together in zip(PICTURES, batched.encode(PICTURES), strict=True):
        torch.testing.assert_close(single.encode([picture])[0], together, atol=1e-5, rtol=0)


def test_any_order_of_slices_gives_each_its_own(tower: VisionTower) -> None:
    encoder = VisionEncoder(tower, mean=[0.5] * 3, std=[0.5] * 3, batch_size=16)
    slices = [piece for picture in PICTURES for piece in slices_of(picture)]
    forwards, backwards = encoder.empty(len(slices)), encoder.empty(len(slices))
    encoder.encode_slices(slices, list(forwards))
    encoder.encode_slices(slices[::-1], list(backwards))
    torch.testing.assert_close(forwards, backwards.flip(0), atol=1e-5, rtol=0)


def test_a_cpu_is_not_measured(tower: VisionTower) -> None:
    encoder = VisionEncoder(tower, mean=[0.5] * 3, std=[0.5] * 3, batch_size=16)
    assert measure(encoder, ModelAssets.from_folder(TINY).pictures, 16) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", PICTURE_CASES)
def test_a_gpu_s_embeddings_are_the_published_model_s(case: str) -> None:
    encoder = encoder_on("cuda", torch.float32, 3)
    embeddings = torch.cat(encoder.encode([pixels(name) for name in picture_names(case)]))
    golden = tensors(case)["resampler_out"].flatten(0, 1)
    torch.testing.assert_close(embeddings.cpu(), golden, atol=EMBEDS_ATOL, rtol=0)


@pytest.mark.gpu
def test_no_step_takes_more_than_was_measured() -> None:
    encoder = encoder_on("cuda", torch.bfloat16, 4)
    measured = measure(encoder, ModelAssets.from_folder(TINY).pictures, 4)
    assert measured > 0
    slices = [piece for picture in PICTURES for piece in slices_of(picture)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for start in range(0, len(slices), 4):
        step = slices[start : start + 4]
        encoder.encode_slices(step, list(encoder.empty(len(step))))
    assert torch.cuda.max_memory_allocated() - before <= measured


@pytest.mark.gpu
def test_pixels_are_looked_up_as_they_are_computed() -> None:
    encoder = encoder_on("cuda", torch.bfloat16, 4)
    patches = torch.arange(256, dtype=torch.uint8).repeat(3, 147).unflatten(1, (-1, 588)).flatten(0, 1)
    assert torch.equal(encoder.normalize(patches), encoder._normalized(patches.cuda()))
