"""From a decoded picture to the encoder's patches: exactly the pixels that the published preprocessor makes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from foveate.media.slicing import SlicePlan

Patches = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pixels:
    """A picture ready for the encoder.

    Attributes:
        patches: uint8 [patches, 3 * patch_size**2], channel first within a patch, all slices packed.
        tgt_sizes: (rows, columns) of each slice in patches, the source first.
    """

    patches: Patches
    tgt_sizes: tuple[tuple[int, int], ...]


def cut(picture: Image.Image, plan: SlicePlan) -> list[Image.Image]:
    """Return the resized source and its slices, row by row, as RGB pictures."""
    slices = [_resized(picture, plan.source_size)]
    if plan.refine_size is not None and plan.slice_size is not None and plan.grid is not None:
        refined = _resized(picture, plan.refine_size)
        width, height = plan.slice_size
        for row in range(plan.grid[1]):
            for column in range(plan.grid[0]):
                left, top = column * width, row * height
                slices.append(refined.crop((left, top, left + width, top + height)))
    return slices


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture.resize(size, Image.Resampling.BICUBIC)


def to_patches(picture: Image.Image, patch_size: int) -> Patches:
    """Cut an RGB picture, whose sides are multiples of ``patch_size``, into rows of one patch each."""
    pixels = np.asarray(picture)
    height, width, _ = pixels.shape
    grid = pixels.reshape(height // patch_size, patch_size, width // patch_size, patch_size, 3)
    return grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3 * patch_size**2)


def preprocess(picture: Image.Image, plan: SlicePlan) -> Pixels:
    """Resize, slice and cut into patches an RGB picture of the size that was planned for."""
    patches = [to_patches(piece, plan.patch_size) for piece in cut(picture, plan)]
    return Pixels(np.concatenate(patches), plan.tgt_sizes)


def digest(picture: Image.Image, plan: SlicePlan, encoder: str) -> bytes:
    """Name what the encoder will see: SHA-256 over mode, size and pixels, the slicing, and the encoder's identity."""
    hashed = hashlib.sha256(f"{picture.mode} {picture.size} {plan} {encoder}".encode())
    hashed.update(picture.tobytes())
    return hashed.digest()
