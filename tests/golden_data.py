"""The published model's golden data, as the tests read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from foveate.media.slicing import plan_slices
from foveate.vision.preprocess import Pixels, preprocess

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny" / "model"
EMBEDS_ATOL = 5e-5
LOGITS_ATOL = 3e-4

CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "tiny" / "cases.json").read_text())["cases"]
PICTURE_CASES = [name for name, case in CASES.items() if "tgt_sizes" in case["tensors"]]


def tensors(case: str) -> dict[str, torch.Tensor]:
    """Every golden tensor of a case of the tiny model."""
    return load_file(GOLDEN / "tiny" / CASES[case]["file"])


def picture_names(case: str) -> list[str]:
    """File names of the pictures of a case's conversation, in order."""
    contents = [message["content"] for message in CASES[case]["messages"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part[1:] for part in parts if part.startswith("@")]


def asset(name: str) -> Image.Image:
    """A picture of the golden data, decoded."""
    with Image.open(GOLDEN / "assets" / name) as picture:
        return picture.convert("RGB")


def pixels(name: str, max_slice_nums: int = 9) -> Pixels:
    """A picture of the golden data, ready for the encoder."""
    picture = asset(name)
    return preprocess(picture, plan_slices(*picture.size, max_slice_nums=max_slice_nums))


def unpatched(patches: np.ndarray, patch_size: int = 14) -> np.ndarray:
    """Patches [n, 3 * patch_size**2] in the reference's layout [3, patch_size, n * patch_size]."""
    return patches.reshape(-1, 3, patch_size, patch_size).transpose(1, 2, 0, 3).reshape(3, patch_size, -1)
