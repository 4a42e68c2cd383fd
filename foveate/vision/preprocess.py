"""From a decoded picture to the encoder's patches: exactly the pixels that the published preprocessor makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from foveate.media.slicing import Size, SlicePlan

Patches = npt.NDArray[np.uint8]
Room = Callable[[tuple[int, int], type[np.uint8]], Patches]


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
    slices = [resized(picture, plan.source_size)]
    if plan.refine_size is not None and plan.slice_size is not None and plan.grid is not None:
        refined = resized(picture, plan.refine_size)
        width, height = plan.slice_size
        for row in range(plan.grid[1]):
            for column in range(plan.grid[0]):
                left, top = column * width, row * height
                slices.append(refined.crop((left, top, left + width, top + height)))
    return slices


def resized(picture: Image.Image, size: Size) -> Image.Image:
    """Resize a picture bicubically, to the same pixels with every version of Pillow from 12 on.

    They differ in which direction comes first. A resize of one side alone is the same in all of them.
    """
    if columns_first(picture.size, size):
        picture = picture.resize((picture.width, size[1]), Image.Resampling.BICUBIC)
    return picture.resize(size, Image.Resampling.BICUBIC)


def columns_first(size: Size, new_size: Size) -> bool:
    """Say whether columns are resized before rows, as Pillow 13 does where the height shrinks by much more pixels."""
    less = size[1] - new_size[1]
    return less > 0 and less > 2 * (size[0] - new_size[0])


def to_patches(picture: Image.Image, patch_size: int, into: Patches | None = None) -> Patches:
    """Cut an RGB picture, whose sides are multiples of ``patch_size``, into rows of one patch each.

    Args:
        picture: what is cut.
        patch_size: side of a patch, in pixels.
        into: where they go, in one piece; new memory if None.
    """
    pixels = np.asarray(picture)
    height, width, _ = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    if into is None:
        into = np.empty((rows * columns, 3 * patch_size**2), dtype=np.uint8)
    grid = pixels.reshape(rows, patch_size, columns, patch_size, 3)
    np.copyto(into.reshape(rows, columns, 3, patch_size, patch_size), grid.transpose(0, 2, 4, 1, 3))
    return into


def preprocess(picture: Image.Image, plan: SlicePlan, room: Room = np.empty) -> Pixels:
    """Resize, slice and cut into patches an RGB picture of the size that was planned for.

    Args:
        picture: what is cut.
        plan: how.
        room: makes memory of a shape and type for the patches.
    """
    lengths = [rows * columns for rows, columns in plan.tgt_sizes]
    patches = room((sum(lengths), 3 * plan.patch_size**2), np.uint8)
    start = 0
    for piece, length in zip(cut(picture, plan), lengths, strict=True):
        to_patches(piece, plan.patch_size, patches[start : start + length])
        start += length
    return Pixels(patches, plan.tgt_sizes)
