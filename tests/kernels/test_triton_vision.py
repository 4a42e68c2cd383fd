"""The vision encoder's kernels against plain PyTorch and against Pillow; on a CPU by Triton's interpreter."""

from __future__ import annotations

import interpreted
import numpy as np
import pytest
import torch
from PIL import Image

from foveate.kernels import vision_ops
from foveate.media.slicing import Size
from foveate.vision.preprocess import columns_first, resized, to_patches
from foveate.vision.resize import coefficients, resize

with interpreted._interpreting():
    from foveate.kernels.triton import vision, vision_resize

DEVICE = interpreted.DEVICE
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 8), (1, 72), (5, 1152), (3, 200)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).mul_(2).add_(1).to(dtype)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    # The interpreter cuts bfloat16 off instead of rounding it, here from numbers up to 8, and twice.
    return {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 6e-2, "rtol": 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = (normal(*shape, dtype=dtype) for _ in range(2))
    weight, bias = (normal(shape[1], dtype=dtype) for _ in range(2))
    expected = torch.nn.functional.layer_norm(x.double(), shape[1:], weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(vision.layer_norm(x, weight, bias, 1e-6).double(), expected, **tolerance(dtype))
    normed, total = vision.add_layer_norm(x, residual, weight, bias, 1e-6)
    torch.testing.assert_close(total, x + residual, **tolerance(dtype))
    expected = vision_ops.layer_norm(total.cpu(), weight.cpu(), bias.cpu(), 1e-6)
    torch.testing.assert_close(normed.cpu(), expected, **tolerance(dtype))


def test_a_norm_of_large_numbers_keeps_their_differences() -> None:
    x = torch.tensor([[10000.0, 10000.3, 10000.9, 10001.2]], device=DEVICE)
    normed = vision.layer_norm(x, torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE), 1e-6)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(x.double(), (4,)).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_with_positions(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, table = normal(*shape, dtype=dtype), normal(10, shape[1] // 2, dtype=dtype)
    weight, bias = (normal(shape[1], dtype=dtype) for _ in range(2))
    places = torch.randint(0, 10, (2, shape[0]), dtype=torch.int32, device=DEVICE)
    got = vision.layer_norm_positions(x, weight, bias, 1e-6, table, places)
    expected = vision_ops.layer_norm_positions(*(t.cpu() for t in (x, weight, bias)), 1e-6, table.cpu(), places.cpu())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patches", [0, 1, 7])
def test_pixels_are_looked_up(patches: int, dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, (patches, 588), dtype=torch.uint8, device=DEVICE)
    values = normal(3, 256, dtype=dtype)
    expected = vision_ops.normalize_pixels(pixels.cpu(), values.cpu())
    assert torch.equal(vision.normalize_pixels(pixels, values).cpu(), expected)
    for channel, part in enumerate(expected.unflatten(1, (3, -1)).unbind(1)):
        assert torch.equal(part, values.cpu()[channel][pixels.cpu().unflatten(1, (3, -1))[:, channel].long()])


def table(length: int, new_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts, weights = coefficients(length, new_length)
    return torch.from_numpy(starts).to(DEVICE), torch.from_numpy(weights).to(DEVICE)


@pytest.mark.parametrize(
    ("size", "new_size", "grid"),
    [
        ((45, 40), (28, 28), (1, 1)),
        ((30, 31), (84, 56), (2, 3)),
        ((20, 90), (42, 28), (2, 1)),
        ((28, 28), (28, 28), (1, 1)),
        ((1, 5), (28, 14), (1, 2)),
    ],
)
def test_pictures_are_resized_as_pillow_does(size: Size, new_size: Size, grid: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    rows, columns = new_size[1] // grid[0], new_size[0] // grid[1]
    picture = resized(Image.fromarray(pixels), new_size)
    boxes = [(x * columns, y * rows) for y in range(grid[0]) for x in range(grid[1])]
    expected = np.concatenate([to_patches(picture.crop((x, y, x + columns, y + rows)), 14) for x, y in boxes])
    first = columns_first(size, new_size)
    patches = torch.zeros(expected.shape, dtype=torch.uint8, device=DEVICE)
    middle = torch.empty(3 * max(size[0] * new_size[1], size[1] * new_size[0]), dtype=torch.uint8, device=DEVICE)
    tables = table(size[0], new_size[0]), table(size[1], new_size[1])
    picture = torch.from_numpy(pixels).to(DEVICE)
    resize(vision_resize, picture, middle, tables, patches, new_size, grid, first)
    assert np.array_equal(patches.cpu().numpy(), expected)


def test_both_orders_are_among_them() -> None:
    assert columns_first((20, 90), (42, 28))
    assert not columns_first((45, 40), (28, 28))
