"""How far attention over 8-bit keys and values is from attention over exact ones, with and without the keys' biases.

    python benchmarks/kv_cache.py [--model FOLDER] [--json FILE]

Real keys: the layers of a model, prompted with random tokens. Made ones: 1,500 tokens of one head of 128 channels,
whose keys differ by 2 around a bias of some size in 8 channels of the slowest rotation, as a published Qwen2's do. The
error is the norm of what is wrong in the attended values over the norm of what is right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from foveate.checkpoint.load import load_model
from foveate.kernels import reference
from foveate.kernels.kv_cache import FP8, FP8_MAX, KeyOffset

ROOT = Path(__file__).parents[1]
TOKENS, OUTLIERS, SIZES = 1500, 8, (0, 10, 50, 200, 400, 800)
Qkv = tuple[str, Tensor, Tensor, Tensor, int, int]
"""Name; [tokens, (heads + 2 * kv_heads) * head_dim]; key bias; cosines and sines; query heads and key heads."""


def made() -> Iterator[Qkv]:
    """Yield keys with outliers."""
    angles = torch.cat(reference.rotary_cos_sin(torch.arange(TOKENS), 128, 1e6), -1)[:, 0]
    slow = torch.cat((torch.arange(64 - OUTLIERS // 2, 64), torch.arange(128 - OUTLIERS // 2, 128)))
    for size in SIZES:
        bias = torch.zeros(128)
        bias[slow] = size * (0.5 + 0.5 * torch.rand(OUTLIERS)) * torch.randn(OUTLIERS).sign()
        query, key, value = torch.randn(TOKENS, 7 * 128), 2 * torch.randn(TOKENS, 128) + bias, torch.randn(TOKENS, 128)
        yield f"bias of {size}", torch.cat((query, key, value), dim=1), bias, angles, 7, 1


def real(folder: Path) -> Iterator[Qkv]:
    """Yield what a model's layers attend with."""
    model = load_model(folder, torch.device("cpu"), torch.float32, part="language").language
    config, found = model.config, []
    angles = model.rotary_table(512)
    positions = torch.arange(512)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        found.append((f"{folder.name}, layer {layer}", qkv, model.key_bias(layer), angles, heads, kv_heads))
        return attended(found[-1], torch.float32, None)

    model.run(model.embed_tokens(torch.randint(config.vocab_size, positions.shape)), attend)
    yield from found


def attended(layer: Qkv, dtype: torch.dtype, offset: KeyOffset | None, *, scaled: bool = False) -> Tensor:
    """Return causal attention over a cache of a type, as an engine computes it.

    ``scaled`` is what an engine could do instead: 8 bits with a scale for each token and head, beside ``dtype``.
    """
    _, qkv, bias, angles, heads, kv_heads = layer
    tokens = torch.arange(len(qkv))
    caches = [torch.zeros(1, len(qkv), kv_heads, len(bias) // kv_heads, dtype=dtype) for _ in range(2)]
    query = reference.rotary_write(qkv, angles, tokens, tokens, caches[0], caches[1], heads, offset)
    if scaled:
        scales = [cache.abs().amax(-1, keepdim=True) / FP8_MAX for cache in caches]
        caches = [(cache / scale).to(FP8).to(dtype) * scale for cache, scale in zip(caches, scales, strict=True)]
    table, ends = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, len(qkv)], dtype=torch.int32)
    return reference.paged_prefill_attention(query, *caches, table, ends, ends[1:], len(qkv), offset)


def errors(layer: Qkv) -> dict[str, float]:
    """Return the errors of each kind of cache."""
    exact = attended(layer, torch.float32, None)
    offset = KeyOffset(layer[2], layer[3])
    kinds: dict[str, Callable[[], Tensor]] = {
        "bfloat16": lambda: attended(layer, torch.bfloat16, None),
        "e4m3": lambda: attended(layer, FP8, None),
        "e4m3, scaled": lambda: attended(layer, torch.float32, None, scaled=True),
        "e4m3, keys without bias": lambda: attended(layer, FP8, offset),
    }
    return {name: float((run() - exact).norm() / exact.norm()) for name, run in kinds.items()}


@torch.inference_mode()
def main() -> None:
    """Print a line for each layer, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "golden" / "tiny" / "model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for layer in (*made(), *real(options.model)):
        results[layer[0]] = found = errors(layer)
        print(f"{layer[0]:20}" + "".join(f"  {name} {error:.4f}" for name, error in found.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
