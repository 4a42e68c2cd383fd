"""Rotation and write to the cache, against the reference."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import DEVICE, MARKS

from foveate.kernels import reference
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
