"""Rotation and write to the cache, against the reference."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import DEVICE, MARKS

from foveate.kernels import reference
from foveate.kernels.kv_cache import FP8, KeyOffset, raw
from foveate.kernels.triton.rope import rotary_write

pytestmark = MARKS
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(7, 1, 128), (4, 2, 72), (3, 3, 16), (16, 1, 32)])
def test_rotary_write(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    tokens, block_size = 5, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=DEVICE).to(dtype)
    positions = torch.tensor([0, 7, 100, 3, 99], device=DEVICE)
    slots = torch.tensor([35, 0, -1, 47, 16], device=DEVICE)
    cos, sin = reference.rotary_cos_sin(torch.arange(101, device=DEVICE), head_dim, 1e4)
    caches = [torch.randn(3, block_size, kv_heads, head_dim, device=DEVICE).to(dtype) for _ in range(2)]
    key_cache, value_cache = (cache.clone() for cache in caches)
    query = rotary_write(
        qkv, torch.cat((cos, sin), -1)[:, 0].contiguous(), positions, slots, key_cache, value_cache, heads
    )

    query_key, value = qkv.unflatten(1, (-1, head_dim)).split((heads + kv_heads, kv_heads), dim=1)
    rotated, key = reference.rotary(query_key, cos[positions], sin[positions]).split((heads, kv_heads), dim=1)
    written = slots >= 0
    reference.write_kv(*caches, key[written], value[written], slots[written])
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(query, rotated, **tolerance)
    torch.testing.assert_close(key_cache, caches[0], **tolerance)
    assert torch.equal(value_cache, caches[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cache_dtype", [None, FP8], ids=["own", "fp8"])
def test_keys_without_their_bias(cache_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, tokens = 6, 2, 72, 5
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=DEVICE)
    bias = 100 * torch.randn(kv_heads * head_dim, device=DEVICE)
    qkv[:, heads * head_dim : (heads + kv_heads) * head_dim] += bias
    qkv, bias = qkv.to(dtype), bias.to(dtype)
    positions, slots = (torch.tensor(data, device=DEVICE) for data in ([0, 7, 100, 3, 99], [35, 0, -1, 47, 16]))
    cos_sin = torch.cat(reference.rotary_cos_sin(torch.arange(101, device=DEVICE), head_dim, 1e4), -1)[:, 0]
    offset = KeyOffset(bias, cos_sin.to(dtype))
    found, expected = (
        [torch.zeros(3, 16, kv_heads, head_dim, device=DEVICE, dtype=cache_dtype or dtype) for _ in range(2)]
        for _ in range(2)
    )
    query = rotary_write(qkv, cos_sin, positions, slots, *found, heads, offset)
    other = reference.rotary_write(qkv, cos_sin, positions, slots, *expected, heads, offset)
    torch.testing.assert_close(query, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    # Where a sum is rounded in another way, so may be the 8 bits of it.
    tolerance = 2**-3 if cache_dtype else TOLERANCE[dtype]
    torch.testing.assert_close(found[0].float(), expected[0].float(), rtol=tolerance, atol=tolerance)
    assert torch.equal(*(raw(caches[1]) for caches in (found, expected)))
    assert found[0].float().abs().max() < 10


def test_eight_bits_are_rounded_as_pytorch_does() -> None:
    sizes = torch.cat((
        torch.randn(2000).exp2(), torch.linspace(0, 2**-5, 2001), torch.arange(2**-9, 500, 2**-3),
        torch.tensor([0.0, 448.0, 463.9, 464.0, 1000.0, 1e30, torch.inf]),
        torch.arange(0x7F).to(torch.uint8).view(FP8).float().unfold(0, 2, 1).mean(1),  # Ties.
    ))  # fmt: skip
    numbers = torch.cat((sizes, -sizes)).to(DEVICE)
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 16)).view(-1, 16)
    qkv = torch.cat((torch.zeros(len(numbers), 32, device=DEVICE), numbers), dim=1)
    caches = [torch.zeros(len(numbers), 1, 1, 16, dtype=FP8, device=DEVICE) for _ in range(2)]
    slots = torch.arange(len(numbers), device=DEVICE)
    rotary_write(qkv, torch.zeros(1, 16, device=DEVICE), torch.zeros_like(slots), slots, *caches, 1)
    assert torch.equal(raw(caches[1])[:, 0, 0], raw(numbers.cpu().clamp(-448, 448).to(FP8)).to(DEVICE))
    assert not caches[1].float().isnan().any()


def test_a_layer_of_a_larger_cache() -> None:
    cache = torch.zeros(2, 2, 2, 16, 1, 16, device=DEVICE)
    qkv = torch.randn(1, 3 * 16, device=DEVICE)
    cos_sin = torch.cat((torch.ones(1, 8), torch.zeros(1, 8)), 1).to(DEVICE)
    place = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rotary_write(qkv, cos_sin, place, place + 17, *cache[1].unbind(0), 1)
    assert torch.equal(cache[1, :, 1, 1].flatten(), qkv[0, 16:])
    assert cache.count_nonzero() == 32


def test_a_cache_of_another_layout() -> None:
    cache = torch.zeros(2, 2, 16, 16).transpose(1, 2)
    place = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="contiguous"):
        rotary_write(torch.zeros(1, 48), torch.zeros(1, 16), place, place, cache, cache, 1)


def test_no_tokens() -> None:
    cache, place = torch.zeros(2, 16, 1, 16, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    query = rotary_write(torch.zeros(0, 64, device=DEVICE), torch.zeros(1, 16), place, place, cache, cache, 2)
    assert query.shape == (0, 2, 16)
