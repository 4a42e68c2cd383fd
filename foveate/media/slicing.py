"""The slice plan of a picture: how MiniCPM-V cuts it up, as pure arithmetic on its size.

A picture is always seen whole, resized to an area of about ``scale_resolution`` squared. A larger one is cut into a
grid of slices of about that area each as well. Every number of the prompt and of the encoder's input follows from the
plan, so it is known before a single pixel is decoded.

The rounding rules are those of the published ``image_processing_minicpmv.py`` of openbmb/MiniCPM-V-2_6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """What becomes of one picture.

    Attributes:
        source_size: width and height of the whole picture as it is encoded, in pixels.
        refine_size: width and height to which the picture is resized before it is cut, or None without slices.
        grid: columns and rows of slices, or None without slices.
        patch_size: side of a patch, in pixels.
    """

    source_size: Size
    refine_size: Size | None
    grid: Size | None
    patch_size: int

    @property
    def slice_size(self) -> Size | None:
        """Width and height of one slice, in pixels."""
        if self.refine_size is None or self.grid is None:
            return None
        return self.refine_size[0] // self.grid[0], self.refine_size[1] // self.grid[1]

    @property
    def num_slices(self) -> int:
        """How many pictures the encoder sees: the source and its slices."""
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]

    @property
    def tgt_sizes(self) -> tuple[Size, ...]:
        """(rows, columns) of patches: the source, then every slice, row by row."""
        patch = self.patch_size
        source = (self.source_size[1] // patch, self.source_size[0] // patch)
        if self.slice_size is None:
            return (source,)
        width, height = self.slice_size
        return (source, *[(height // patch, width // patch)] * (self.num_slices - 1))


def plan_slices(
    width: int, height: int, *, max_slice_nums: int = 9, scale_resolution: int = 448, patch_size: int = 14
) -> SlicePlan:
    """Plan how a picture of ``width`` × ``height`` pixels is encoded.

    Args:
        width: pixels, at least 1.
        height: pixels, at least 1.
        max_slice_nums: most slices beside the source; 1 means none.
        scale_resolution: side of the square whose area the source and each slice have, about, in pixels.
        patch_size: side of a patch, in pixels.

    Raises:
        ValueError: a size or limit is less than 1.
    """
    for name, value in (("width", width), ("height", height), ("max_slice_nums", max_slice_nums)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    grid = _best_grid(width, height, max_slice_nums, scale_resolution)
    source = _resized(width, height, scale_resolution, patch_size)
    if grid is None:
        return SlicePlan(source, None, None, patch_size)
    columns, rows = grid
    # The cell keeps its fraction: rounding it here would move some grids by a patch.
    cell_width = _to_multiple(width, columns) / columns
    cell_height = _to_multiple(height, rows) / rows
    cell = _resized(cell_width, cell_height, scale_resolution, patch_size)
    return SlicePlan(source, (cell[0] * columns, cell[1] * rows), grid, patch_size)


def _to_multiple(length: float, unit: int) -> int:
    """Round to a multiple of ``unit``, half to even, at least one."""
    return max(round(length / unit) * unit, unit)


def _resized(width: float, height: float, scale_resolution: int, patch_size: int) -> Size:
    """Keep the aspect ratio, bring the area to ``scale_resolution`` squared, then round to patches."""
    ratio = width / height
    scaled_height = int(scale_resolution / math.sqrt(ratio))
    scaled_width = int(scaled_height * ratio)
    return _to_multiple(scaled_width, patch_size), _to_multiple(scaled_height, patch_size)


def _best_grid(width: int, height: int, max_slice_nums: int, scale_resolution: int) -> Size | None:
    """Return the grid (columns, rows) whose shape is closest to the picture's, or None if it needs no slices."""
    area = width * height / (scale_resolution * scale_resolution)
    wanted = min(math.ceil(area), max_slice_nums)
    if wanted <= 1:
        return None
    log_ratio = math.log(width / height)
    best, best_error = (1, 1), math.inf
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > max_slice_nums:
            continue
        for columns in range(1, count + 1):
            if count % columns:
                continue
            rows = count // columns
            error = abs(log_ratio - math.log(columns / rows))
            if error < best_error:
                best, best_error = (columns, rows), error
    return best
