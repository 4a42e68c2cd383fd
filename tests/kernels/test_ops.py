"""Every operation against its reference, and the references against the textbook."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foveate.kernels import ops, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_rms_norm() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-6), F.rms_norm(x, (64,), weight, 1e-6))
    half = reference.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6)
    assert half.dtype == torch.bfloat16


def test_rotary_turns_pairs_by_their_position() -> None:
    x = torch.randn(3, 2, 8)
    cos, sin = reference.rotary_cos_sin(torch.tensor([0, 1, 5]), 8, 10000.0)
    turned = reference.rotary(x, cos, sin)
    assert torch.equal(turned[0], x[0])
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = torch.tensor([0.0, 1.0, 5.0])[:, None, None] / 10000 ** (torch.arange(4) / 4)
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [4, 1, 7, 7, 2], [1036, 1024]])
def test_varlen_attention(lengths: list[int], device: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(sum(lengths), 4, 72, device=device, dtype=dtype) for _ in range(3))
    expected = torch.cat(
        [
            F.scaled_dot_product_attention(*(t.transpose(0, 1)[None].float() for t in parts))[0].transpose(0, 1)
            for parts in zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
        ]
    )
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    for attend in (ops.varlen_attention, reference.varlen_attention):
        torch.testing.assert_close(attend(q, k, v, lengths, lengths).float(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_cross_attention_of_different_lengths(device: str) -> None:
    q = torch.randn(6, 2, 16, device=device)
    k, v = (torch.randn(9, 2, 16, device=device) for _ in range(2))
    together = ops.varlen_attention(q, k, v, [3, 3], [4, 5])
    apart = [ops.varlen_attention(q[:3], k[:4], v[:4], [3], [4]), ops.varlen_attention(q[3:], k[4:], v[4:], [3], [5])]
    torch.testing.assert_close(together, torch.cat(apart))


def paged(
    tokens: int, block_table: list[int], device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, 2, 16], and a cache of 10 blocks of 4 that holds them at ``block_table``."""
    key, value = (torch.randn(tokens, 2, 16, device=device) for _ in range(2))
    key_cache, value_cache = (torch.randn(10, 4, 2, 16, device=device) for _ in range(2))
    slots = torch.tensor([block_table[i // 4] * 4 + i % 4 for i in range(tokens)], device=device)
    reference.write_kv(key_cache, value_cache, key, value, slots)
    return key, value, key_cache, value_cache


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last ``len(query)`` tokens."""
    k, v = (t.repeat_interleave(query.shape[1] // 2, 1).transpose(0, 1) for t in (key, value))
    scores = query.transpose(0, 1) @ k.transpose(1, 2) / 4
    rows = torch.arange(len(key) - len(query), len(key), device=query.device)
    hidden = torch.arange(len(key), device=query.device) > rows[:, None]
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_cached", [0, 1, 4, 9])
def test_paged_prefill_attention(num_cached: int, device: str) -> None:
    key, value, key_cache, value_cache = paged(11, [7, 2, 5], device)
    query = torch.randn(11 - num_cached, 6, 16, device=device)
    attended = ops.paged_prefill_attention(
        query, key_cache, value_cache, integers([[7, 2, 5, 9]], device), integers([0, 11 - num_cached], device),
        integers([11], device), 11 - num_cached,
    )  # fmt: skip
    torch.testing.assert_close(attended, dense(query, key, value), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_paged_prefill_attention_of_several_sequences(device: str) -> None:
    key, value, key_cache, value_cache = paged(11, [7, 2, 5], device)
    query = torch.randn(8, 6, 16, device=device)
    # Both have the same beginning; one of them has computed some of it before, and the other has no token here.
    tables, lengths = integers([[7, 2, 5], [7, 0, 0], [7, 2, 0]], device), integers([11, 3, 6], device)
    attended = ops.paged_prefill_attention(
        query, key_cache, value_cache, tables, integers([0, 2, 2, 8], device), lengths, 6
    )
    expected = torch.cat((dense(query[:2], key, value), dense(query[2:], key[:6], value[:6])))
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(11, 6), (11, 0), (6, 6), (12, 12), (0, 0)])
def test_paged_decode_attention_of_different_lengths(lengths: tuple[int, int], device: str) -> None:
    key, value, key_cache, value_cache = paged(12, [7, 2, 5], device)
    query = torch.randn(2, 6, 16, device=device)
    tables = integers([[7, 2, 5], [7, 2, 5]], device)
    attended = ops.paged_decode_attention(query, key_cache, value_cache, tables, integers(lengths, device))
    assert attended.shape == query.shape
    for row, length in enumerate(lengths):
        expected = dense(query[row : row + 1], key[:length], value[:length])[0] if length else torch.zeros(6, 16)
        torch.testing.assert_close(attended[row], expected.to(device), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_rotary_write_is_rotation_and_storage(device: str) -> None:
    positions, slots = torch.tensor([3, 0, 9], device=device), torch.tensor([6, -1, 0], device=device)
    cos, sin = reference.rotary_cos_sin(torch.arange(10, device=device), 16, 10000.0)
    qkv = torch.randn(3, 10 * 16, device=device)
    query, key, value = qkv.unflatten(1, (10, 16)).split((6, 2, 2), dim=1)
    caches = [torch.full((3, 4, 2, 16), 7.0, device=device) for _ in range(2)]
    rotated = ops.rotary_write(qkv, torch.cat((cos, sin), dim=-1).squeeze(1), positions, slots, *caches, 6)
    torch.testing.assert_close(rotated, reference.rotary(query, cos[positions], sin[positions]))
    turned = reference.rotary(key, cos[positions], sin[positions])
    for cache, new in zip(caches, (turned, value), strict=True):
        expected = torch.full((12, 2, 16), 7.0, device=device)
        expected[6], expected[0] = new[0], new[2]
        torch.testing.assert_close(cache.flatten(0, 1), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_fused_decode_is_its_parts(device: str) -> None:
    _, _, *caches = paged(11, [7, 2, 5], device)
    again = [cache.clone() for cache in caches]
    table = torch.randn(20, 16, device=device)
    qkv = torch.randn(2, 10 * 16, device=device)
    positions, slots = torch.tensor([11, 0], device=device), torch.tensor([5 * 4 + 3, -1], device=device)
    tables, lengths = integers([[7, 2, 5], [0, 0, 0]], device), integers([12, 0], device)
    attended = ops.fused_decode(qkv, table, positions, slots, *caches, tables, lengths, 6)
    query = reference.rotary_write(qkv, table, positions, slots, *again, 6)
    torch.testing.assert_close(attended, reference.paged_decode_attention(query, *again, tables, lengths))
    torch.testing.assert_close(caches, again)


@pytest.mark.parametrize("device", DEVICES)
def test_add_rms_norm_is_its_parts(device: str) -> None:
    x, residual, weight = (torch.randn(shape, device=device) for shape in ((5, 64), (5, 64), (64,)))
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (64,), weight, 1e-6))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_columns", [False, True])
def test_linear(by_columns: bool, dtype: torch.dtype, device: str) -> None:
    x, weight, bias, residual = (
        torch.randn(shape, device=device).to(dtype) for shape in ((2, 3, 64), (48, 64), (48,), (2, 3, 48))
    )
    if by_columns:
        weight = weight.t().contiguous().t()
    expected = F.linear(x.double(), weight.double(), bias.double())
    atol = 1e-4 if dtype == torch.float32 else 2**-8 * expected.abs().max().item() * 4
    torch.testing.assert_close(ops.linear(x, weight, bias).double(), expected, atol=atol, rtol=0)
    added = ops.linear(x, weight, bias, residual).double()
    torch.testing.assert_close(added, expected + residual.double(), atol=atol, rtol=0)
    gate, up = expected.chunk(2, dim=-1)
    gated = ops.gate_up_silu(x, weight, bias).double()
    torch.testing.assert_close(gated, F.silu(gate) * up, atol=4 * atol, rtol=2**-6)


def integers(values: object, device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def test_implementations_are_named() -> None:
    names = ops.implementations(torch.device("cpu"))
    assert set(names.values()) == {"torch"}
    assert {"varlen_attention", "fused_decode", "int8_linear", "add_rms_norm"} <= set(names)
    assert all(callable(getattr(ops, name)) for name in names)
    assert not ops.has_kernels(torch.device("cpu"))


@pytest.mark.gpu
def test_plain_pytorch_can_be_chosen() -> None:
    device = torch.device("cuda")
    assert ops.has_kernels(device)
    ops.choose("reference")
    try:
        assert not ops.has_kernels(device)
        assert set(ops.implementations(device).values()) == {"torch", "flash"}
    finally:
        ops.choose("auto")
