"""``python -m foveate.checkpoint.cards > docs/real-model.md``: the page about GPUs of usual sizes, from the planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import foveate
from foveate.checkpoint.memory import MemoryPlan, binary, demand_of, gpu_of, plan_memory
from foveate.checkpoint.plan import longest_sequence, weight_bytes
from foveate.config import EngineSettings, ModelSettings, Settings, VisionSettings
from foveate.models.config import ModelConfig
from foveate.quantization.scheme import Quantization

PRESET = Path(foveate.__file__ or "").parent / "models" / "presets" / "minicpm-v-2_6"
CARDS = (12, 16, 24, 48, 80)
"""In GB, as they are sold."""
METHODS = ("none", "int8", "int4")
KV_CACHES = ("auto", "fp8")
BATCHES = (32, 16, 8)
PICTURE_TOKENS = 1280
"""Of a request with a large picture: a whole and 9 slices (about 670), a question, and an answer of 512."""
LONG_TOKENS = 8192

INTRODUCTION = """\
# Serving the real model

<!-- Made by `make docs-reference` from foveate/checkpoint/cards.py and the planner: change it there. -->

MiniCPM-V-2_6 has 8.1 billion parameters. Where its memory goes is planned before anything is loaded: weights, the
largest step of the encoder and of the language model, CUDA graphs, pictures on their way, the processes themselves.
Keys and values get 90 % of the rest (`--kv-cache-free-mem-fraction`). What does not fit ends at once, with a table of
what takes how much. This page is made by that planner, and so can be made for any card:

```sh title="Not run by the tests: it needs the checkpoint"
foveate inspect /models/MiniCPM-V-2_6 --gpu-memory 24GiB
```

Nothing here was measured on these cards. The planner's estimates are compared with an H100 by the tests that need a
GPU, and the server measures its own steps before it makes the cache; its log has both.

## What the weights take

"""

CARDS_TEXT = """
`fp8` takes the same as `int8`. What each costs in exactness is in [quantization](quantization.md).

## Which flags fit which card

Encoder and language model share the card; nothing else uses it. A card of 24 GB counts as 22.5 GiB, 15 of 16 parts:
that is what cards with error correction show; others have a little more. All settings that are not named are the
defaults.

- *weights*: what `--quantization` says.
- *KV cache*: what `--kv-cache-dtype` says. `auto` keeps keys and values in bfloat16, `fp8` in 8 bits.
- *more flags*: the cheapest with which it fits, and the largest `--max-batch-size` up to 32 that has room for as many
  large pictures.
- *KV tokens*: what keys and values hold, of all running requests together. A single request may have as many, and at
  most {longest:,}.
- *large pictures*: requests of {picture:,} tokens that run at once: a picture of 1344×1344 or more, a question, and an
  answer of 512 tokens.
- *long*: requests of {long:,} tokens that run at once.

More requests wait in the queue (`--max-queue-size`). At once are at most `--max-batch-size`; what is measured ends
at 16 ([performance](performance.md)).

"""

ADVICE = """
The flags of a row go behind `foveate serve MODEL`, or `foveate serve MODEL-INT8` without `--quantization` for a folder
that `foveate build` has packed ([checkpoints](checkpoints.md)): it starts faster, and needs no memory for packing.

```sh title="Not run by the tests: it needs the checkpoint and a GPU"
foveate serve /models/MiniCPM-V-2_6 --quantization int8 --max-batch-size 16      # a card of 16 GB
```

## When it does not fit

About in the order of what it costs:

1. `--vision-batch-size 4`: fewer slices in a step of the encoder. Pictures of many clients take longer.
2. `--max-num-tokens 1024` or `512`: long prompts take more steps.
3. `--max-batch-size 4`: fewer answers at once.
4. `--quantize-vision`: 0.4 GiB for the encoder's exactness.
5. `--kv-cache-dtype fp8`: twice the tokens for a few per cent of error in each layer's attention.
6. `--no-cuda-graphs`: 0.7 GiB, and slower steps.
7. `--vision-device cpu`, or an encoder on another card or host ([vision service](vision-service.md)).
8. `--quantization int4`.
"""


@dataclass(frozen=True, slots=True)
class Choice:
    """What somebody may ask for, and the flags that say it, beside those of weights, cache and batch."""

    flags: str = ""
    vision: bool = False
    max_num_tokens: int = 2048
    vision_batch_size: int = 16
    cuda_graphs: bool = True
    batches: tuple[int, ...] = BATCHES


CHOICES = (
    Choice(),
    Choice("--vision-batch-size 4 --max-num-tokens 1024", max_num_tokens=1024, vision_batch_size=4, batches=(8, 4)),
    Choice(
        "--vision-batch-size 4 --max-num-tokens 512 --quantize-vision --no-cuda-graphs",
        vision=True, max_num_tokens=512, vision_batch_size=4, cuda_graphs=False, batches=(4,),
    ),
)  # fmt: skip
"""From what costs nothing to what costs most; the first that fits is shown."""


def page() -> str:
    """Return the whole page as Markdown."""
    return "".join(_parts())


def _parts() -> Iterator[str]:
    yield INTRODUCTION
    yield "| flags | language model | vision | in all |\n| --- | --- | --- | --- |\n"
    for method in METHODS:
        for vision in (False, True) if method != "none" else (False,):
            flags = f"`--quantization {method}{' --quantize-vision' * vision}`"
            parts = _weights(method, vision)
            sizes = (parts["language"], parts["vision"], sum(parts.values()))
            yield f"| {flags} | {' | '.join(binary(size) for size in sizes)} |\n"
    yield CARDS_TEXT.format(longest=_longest(Settings()), picture=PICTURE_TOKENS, long=LONG_TOKENS)
    yield "| card | weights | KV cache | more flags | KV tokens | large pictures | long |\n"
    yield "| --- | --- | --- | --- | --- | --- | --- |\n"
    for card in CARDS:
        for method in METHODS:
            for kv_cache in KV_CACHES:
                yield _row(card, method, kv_cache)
    yield ADVICE


def _row(card: int, method: str, kv_cache: str) -> str:
    head = f"| {card} GB | {method} | {kv_cache} "
    for choice in CHOICES if method != "none" else CHOICES[:-1]:
        for batch in choice.batches:
            plan = plan_for(card, method, kv_cache, choice, batch)
            # The smallest batch is taken as it is; a larger one has to be of use.
            if plan.fits and (batch == choice.batches[-1] or plan.kv_tokens >= batch * PICTURE_TOKENS):
                size = "" if batch == EngineSettings().max_batch_size else f"--max-batch-size {batch}"
                flags = " ".join(filter(None, (size, choice.flags)))
                at_once = [str(min(batch, plan.kv_tokens // tokens)) for tokens in (PICTURE_TOKENS, LONG_TOKENS)]
                return f"{head}| {f'`{flags}`' if flags else ''} | {plan.kv_tokens:,} | {' | '.join(at_once)} |\n"
    return f"{head}| does not fit | | | |\n"


def plan_for(card: int, method: str, kv_cache: str, choice: Choice, batch: int) -> MemoryPlan:
    """Plan the real model's memory on a card.

    Args:
        card: its size in GB, as it is sold.
        method: of the weights: none, int8, fp8 or int4.
        kv_cache: auto or fp8.
        choice: the other settings.
        batch: ``max_batch_size``.
    """
    settings = Settings(
        model=ModelSettings.model_validate({"quantization": method, "quantize_vision": choice.vision}),
        engine=EngineSettings.model_validate(
            {
                "max_batch_size": batch, "max_num_tokens": choice.max_num_tokens, "kv_cache_dtype": kv_cache,
                "cuda_graphs": choice.cuda_graphs,
            }
        ),
        vision=VisionSettings(vision_batch_size=choice.vision_batch_size),
    )  # fmt: skip
    # One of the two contexts is the engine's own, which a server has before it looks at the memory.
    demand = demand_of(settings, _longest(settings), _quantization(method, choice.vision), is_gpu=True)
    machine = gpu_of(card * 2**30 * 15 // 16)
    return plan_memory(_config(), _weights(method, choice.vision), torch.bfloat16.itemsize, demand, machine)


@cache
def _config() -> ModelConfig:
    return ModelConfig.from_folder(PRESET)


@cache
def _weights(method: str, vision: bool) -> dict[str, int]:
    return weight_bytes(_config(), _quantization(method, vision), torch.bfloat16)


def _quantization(method: str, vision: bool) -> Quantization:
    settings = ModelSettings.model_validate({"quantization": method})
    assert settings.quantization != "auto"
    return Quantization(method=settings.quantization, vision=vision)


def _longest(settings: Settings) -> int:
    return longest_sequence(settings, _config().language.max_position_embeddings)


if __name__ == "__main__":
    print(page(), end="")
