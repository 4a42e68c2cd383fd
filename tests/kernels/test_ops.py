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
    table = torch.tensor([7, 2, 5], device=device)
    attended = ops.paged_prefill_attention(query, key_cache, value_cache, table, num_cached)
    torch.testing.assert_close(attended, dense(query, key, value), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_paged_decode_attention_of_different_lengths(device: str) -> None:
    key, value, key_cache, value_cache = paged(11, [7, 2, 5], device)
    query = torch.randn(2, 6, 16, device=device)
    tables = torch.tensor([[7, 2, 5], [7, 2, 0]], device=device)
    lengths = torch.tensor([11, 6], device=device)
    mask = (torch.arange(12, device=device) < lengths[:, None])[:, None, None]
    attended = ops.paged_decode_attention(query, key_cache, value_cache, tables, mask)
    expected = torch.stack([dense(query[row : row + 1], key[:n], value[:n])[0] for row, n in enumerate((11, 6))])
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


def test_implementations_are_named() -> None:
    assert ops.implementations(torch.device("cpu"))["varlen_attention"] == "torch"
