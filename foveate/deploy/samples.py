"""The built-in conversations on which models are measured and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from foveate.chat.assets import ModelAssets
from foveate.chat.template import Message, PicturePart, TextPart
from foveate.checkpoint.sample import Sample, SamplePicture, SampleSet
from foveate.deploy.resolve import PACKAGE
from foveate.media.slicing import SlicePlan, plan_slices
from foveate.vision.preprocess import preprocess

PICTURES = PACKAGE / "demo" / "pictures"
_QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Describe the picture.", ("shapes",)),
    ("What does the sign say?", ("sign",)),
    ("What is the total?", ("receipt",)),
    ("Which bar is the highest?", ("chart",)),
    ("What is different in the second picture?", ("before", "after")),
    ("What does the small print say?", ("small-print",)),
    ("天空为什么是蓝色的？", ()),
    ("Write one sentence about the sea.", ()),
)
_TEXTS = (
    "A lighthouse keeper notes the weather three times a day: the wind, the height of the waves, how far one can see. "
    "In November of the first year the lamp failed twice, and both times a ship passed safely, as the moon was full.",
    "To make bread, mix 500 g of flour with 350 ml of water, 10 g of salt and 3 g of yeast. Let it rest for 12 hours, "
    "fold it twice, and bake it at 230 degrees for 40 minutes.",
    "def mean(values):\n    return sum(values) / len(values)\n\n\nprint(mean([1.5, 2.5, 8.0]))  # 4.0\n",
    "The picture shows 3 shapes: a large red circle at the top left, a small blue square in the centre, and a green "
    "triangle at the bottom right. There is no star in this picture.",
    "请描述这张图片。图中有三个图形：左上角是一个红色的圆形，中间是一个蓝色的正方形，右下角是一个绿色的三角形。",
    "Receipt no. 4711: coffee 2.80, cake 3.95, water 1.50; total 8.25, paid in cash 10.00, change 1.75. Thank you!",
)


def sample_set(folder: Path, preprocessed: Callable[[Image.Image], SamplePicture] | None = None) -> SampleSet:
    """Ask the built-in questions about the built-in pictures, as a checkpoint's own files put them.

    Args:
        folder: the checkpoint's.
        preprocessed: turns an RGB picture into the encoder's input, in place of our own preprocessor.

    Raises:
        CheckpointError: the checkpoint's tokenizer, template or preprocessor configuration cannot be used.
    """
    assets = ModelAssets.from_folder(folder)
    samples = tuple(_sample(assets, question, pictures, preprocessed) for question, pictures in _QUESTIONS)
    return SampleSet(samples, frozenset(assets.eos_token_ids))


def text_prompts(folder: Path) -> list[list[int]]:
    """Return texts of some dozens of tokens each, in several languages.

    Raises:
        CheckpointError: the checkpoint's tokenizer cannot be used.
    """
    tokenizer = ModelAssets.from_folder(folder).tokenizer
    return [tokenizer.encode_text(text) for text in _TEXTS]


def _sample(
    assets: ModelAssets,
    question: str,
    names: Sequence[str],
    preprocessed: Callable[[Image.Image], SamplePicture] | None,
) -> Sample:
    settings = assets.pictures
    pictures, parts = [], []
    for name in names:
        with Image.open(PICTURES / f"{name}.png") as file:
            picture = file.convert("RGB")
        plan = plan_slices(
            *picture.size,
            max_slice_nums=settings.max_slice_nums if settings.slice_mode else 1,
            scale_resolution=settings.scale_resolution,
            patch_size=settings.patch_size,
        )
        pictures.append(preprocessed(picture) if preprocessed else _preprocessed(assets, picture, plan))
        parts.append(PicturePart(plan))
    message = Message("user", [*parts, TextPart(question)])
    prompt = assets.tokenizer.encode_prompt(assets.template.render([message], settings))
    positions = (
        position
        for ranges in prompt.image_ranges
        for start, count in ranges
        for position in range(start, start + count)
    )
    name = f"{', '.join(names)}: {question}" if names else question
    return Sample(name, tuple(prompt.token_ids), tuple(positions), tuple(pictures))


def _preprocessed(assets: ModelAssets, picture: Image.Image, plan: SlicePlan) -> SamplePicture:
    pixels = preprocess(picture, plan)
    mean, std = (
        np.array(values, dtype=np.float32)[:, None] for values in (assets.pictures.norm_mean, assets.pictures.norm_std)
    )
    channels = pixels.patches.reshape(len(pixels.patches), 3, -1).astype(np.float32)
    normalized = (channels / np.float32(255) - mean) / std
    return SamplePicture(normalized.reshape(len(pixels.patches), -1), pixels.tgt_sizes)
