"""From files to patches: the digest is known before anything is decoded."""

from __future__ import annotations

import numpy as np
import pytest
from golden_data import asset, pixels
from PIL import Image
from watched import Service, file, page, png

from foveate.media.slicing import plan_slices
from foveate.models.minicpmv import VisionTower
from foveate.vision import pipeline
from foveate.vision.digest import digest
from foveate.vision.encoder import VisionEncoder
from foveate.vision.prepare import cut

NAME = "image1.jpg"
PLAN = plan_slices(*asset(NAME).size)


@pytest.fixture
def plain(tower: VisionTower) -> VisionEncoder:
    return VisionEncoder(tower, mean=[0.5] * 3, std=[0.5] * 3, batch_size=4)


def test_the_published_pixels(plain: VisionEncoder) -> None:
    made = cut(asset(NAME), PLAN, plain)
    assert np.array_equal(made.patches, pixels(NAME).patches)
    assert made.tgt_sizes == pixels(NAME).tgt_sizes


def test_a_digest_is_of_all_that_counts() -> None:
    data = file(NAME)
    names = {
        digest(data, PLAN, "tiny"),
        digest(data, PLAN, "other"),
        digest(data, plan_slices(*asset(NAME).size, max_slice_nums=1), "tiny"),
        digest(data[:-1] + bytes([data[-1] ^ 1]), PLAN, "tiny"),
        digest(png(Image.new("RGB", (20, 20))), PLAN, "tiny"),
    }
    assert len(names) == 5
    assert digest(bytes(data), PLAN, "tiny") in names


async def test_a_known_picture_is_not_decoded_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = await service.encode(page(1))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded again")

    await service.until(lambda stats: stats["cache_entries"] == 1)
    monkeypatch.setattr(pipeline, "decode", refuse)
    (again,) = await service.encode(page(1))
    assert again.cached
    assert again.handle.digest == first.handle.digest
