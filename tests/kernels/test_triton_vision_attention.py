"""Full attention within packed sequences against float64; on a CPU by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from kernels.interpreted import DEVICE, MARKS, ROUNDING
from torch import Tensor

from foveate.kernels import ops, vision_ops
from foveate.kernels.triton.vision_attention import Tile, default_tile, varlen_attention
from foveate.kernels.vision_ops import Sequences

pytestmark = MARKS
TILES = [None, Tile(64, 32, 4, 2)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def packed(count: int, lengths: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Make views [tokens, heads, head_dim] of one tensor, as a layer's joint product has them."""
    together = torch.randn(sum(lengths), count, heads, head_dim, device=DEVICE).to(dtype)
    return list(together.unbind(1))


def check(
    query: Tensor, key: Tensor, value: Tensor, queries: list[int], keys: list[int], tile: Tile | None = None
) -> None:
    rows, columns = (Sequences.of(lengths, query.device) for lengths in (queries, keys))
    attended = varlen_attention(query, key, value, rows.offsets, columns.offsets, rows.longest, tile)
    assert attended.shape == query.shape
    assert attended.dtype == query.dtype
    assert attended.is_contiguous()
    parts = zip(attended.split(queries), query.split(queries), key.split(keys), value.split(keys), strict=True)
    for got, *part in parts:
        q, k, v = (tensor.double().transpose(0, 1) for tensor in part)
        weights = (q @ k.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        away = (got.double() - (weights @ v).transpose(0, 1)).abs()
        assert (away <= (weights @ v.abs()).transpose(0, 1) * ROUNDING[query.dtype]).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("lengths", [[1], [17], [63, 64, 65], [128, 1, 130]])
def test_slices(lengths: list[int], tile: Tile | None, dtype: torch.dtype) -> None:
    check(*packed(3, lengths, 2, 72, dtype), lengths, lengths, tile)


@pytest.mark.parametrize("head_dim", [8, 16, 20, 40, 56, 64, 80, 96, 128])
@pytest.mark.parametrize("tile", TILES)
def test_heads_of_any_size(tile: Tile | None, head_dim: int) -> None:
    lengths = [33, 70]
    check(*packed(3, lengths, 2, head_dim, torch.float16), lengths, lengths, tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("queries", "keys"), [([64, 64], [130, 31]), ([5, 70, 1], [96, 1, 40])])
def test_cross_attention(queries: list[int], keys: list[int], tile: Tile | None) -> None:
    (query,) = packed(1, queries, 3, 128, torch.float16)
    check(query, *packed(2, keys, 3, 128, torch.float16), queries, keys, tile)


def test_what_is_not_a_sequences_own_is_not_looked_at() -> None:
    tensors = packed(3, [40, 50, 70], 2, 72, torch.float16)
    for tensor in tensors:
        tensor[:40], tensor[90:], tensor[:, 1] = torch.nan, torch.inf, torch.nan
    query, key, value = (tensor[:, :1] for tensor in tensors)
    ends = torch.tensor([40, 90], dtype=torch.int32, device=DEVICE)
    query[40:90] = 0  # All keys count alike.
    for tile in TILES:
        attended = varlen_attention(query, key, value, ends, ends, 50, tile)[40:90]
        mean = value[40:90].double().mean(0, keepdim=True)
        torch.testing.assert_close(attended.double(), mean.expand(50, 1, 72), atol=2e-3, rtol=0)


@pytest.mark.parametrize("tile", TILES)
def test_scores_far_below_zero(tile: Tile | None) -> None:
    query, key, value = packed(3, [70], 1, 72, torch.float16)
    query, key = query.abs() + 4, -(key.abs() + 4)
    check(query, key, value, [70], [70], tile)


def test_a_longer_bound_changes_nothing() -> None:
    parts = packed(3, [20, 3], 2, 72, torch.float16)
    ends = torch.tensor([0, 20, 23], dtype=torch.int32, device=DEVICE)
    attended = [varlen_attention(*parts, ends, ends, longest) for longest in (20, 500)]
    assert torch.equal(*attended)


def test_no_sequences() -> None:
    none = torch.zeros(0, 2, 72, device=DEVICE)
    ends = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert varlen_attention(none, none, none, ends, ends, 0).shape == none.shape


def test_a_default_fits_every_device() -> None:
    for capability in [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]:
        for head_dim in (64, 72, 128):
            tile = default_tile(torch.bfloat16, head_dim, capability)
            columns = 80 if head_dim == 72 else head_dim
            held = (tile.queries + 2 * tile.stages * tile.keys) * columns * 2
            assert held <= (227 if capability in [(9, 0), (10, 0)] else 99) * 1024
            assert tile.queries // 16 >= tile.warps


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    """Products that run on while their operands are overwritten would differ now and then."""
    lengths = [1008] * 5 + [1036, 17]
    parts, sequences = packed(3, lengths, 16, 72, torch.bfloat16), Sequences.of(lengths, torch.device(DEVICE))
    check(*parts, lengths, lengths)
    ends = sequences.offsets
    first, *others = (varlen_attention(*parts, ends, ends, sequences.longest) for _ in range(100))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.gpu
def test_a_cuda_graph_holds_it() -> None:
    lengths = [70, 1008]
    query, key, value = packed(3, lengths, 16, 72, torch.bfloat16)
    sequences = Sequences.of(lengths, query.device)
    vision_ops.varlen_attention(query, key, value, sequences, sequences)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attended = vision_ops.varlen_attention(query, key, value, sequences, sequences)
    # Other numbers and other lengths than those it was captured with.
    query.normal_()
    sequences.offsets[1] = 500
    graph.replay()
    ends = sequences.offsets
    assert torch.equal(attended, varlen_attention(query, key, value, ends, ends, sequences.longest))


@pytest.mark.gpu
def test_it_serves_heads_that_flash_attention_would_pad() -> None:
    assert ops.implementations(torch.device("cuda"))["varlen_attention"] == "triton"
    for head_dim, dtype, ours in [
        (72, torch.bfloat16, True), (72, torch.float16, True), (64, torch.float16, False), (72, torch.float32, False),
    ]:  # fmt: skip
        kernel = ops.varlen_kernel(torch.zeros(1, 2, head_dim, device="cuda", dtype=dtype))
        assert (kernel is varlen_attention) is ours
