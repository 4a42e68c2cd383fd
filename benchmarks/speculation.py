"""What prompt lookup gives and costs, in the engine alone, with weights of the real size.

    python benchmarks/speculation.py [--device cpu|cuda] [--config FOLDER] [--quantization int8] [--clients 1,8]
                                     [--prompt-tokens N] [--output-tokens N] [--speculative-tokens N] [--json FILE]

The weights are random but for two things: embeddings outweigh what the layers add, and the head answers each token with
one certain other. So a greedy answer is known in advance, while every product and all of attention are computed as for
a real model. There are four texts:

    same        the answer is the prompt, word for word
    changed     the same, but every eighth token of the prompt is another one, which the answer corrects
    new         nothing of the answer was there before: what looking for it costs
    misleading  every other pair of the answer was there before, with something else behind it: all guesses are wrong

Answers with and without speculation are compared with what they must be.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import foveate.models
from foveate.checkpoint.load import dummy_model
from foveate.config import EngineSettings
from foveate.engine.core import EngineCore
from foveate.engine.messages import Generate, SamplingParams
from foveate.engine.runner import ModelRunner
from foveate.engine.scheduler import Scheduler
from foveate.models.config import ModelConfig
from foveate.models.qwen2 import Qwen2
from foveate.quantization.linear import QuantizedLinear
from foveate.quantization.scheme import Quantization
from foveate.transport.local import LocalArena
from foveate.transport.sources import Sources

PRESET = Path(foveate.models.__path__[0]) / "presets" / "minicpm-v-2_6"
TEXTS = ("same", "changed", "new", "misleading")
CHANGED_EVERY = 8
TABLE_STD, HEAD_STD = 40.0, 0.02


class Text(NamedTuple):
    """A prompt and the answer to it."""

    prompt: list[int]
    answer: list[int]


class Result(NamedTuple):
    """One run: all answers, one after the other or together."""

    text: str
    clients: int
    speculation: str
    tokens_per_s: float
    steps: int
    draft_tokens: int
    accepted_tokens: int


def certain_model(config: ModelConfig, device: torch.device, quantization: Quantization, cycle: int) -> Qwen2:
    """Return random weights whose greedy answer to the token t is :func:`following` (t)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = dummy_model(config, device, dtype, part="language", quantization=quantization).language
    table = model.embed_tokens.weight.data
    table.normal_(std=TABLE_STD, generator=torch.Generator(device).manual_seed(1))
    tokens = torch.arange(config.language.vocab_size)
    target = torch.tensor([following(token, cycle, len(tokens)) for token in tokens.tolist()], device=device)
    head = torch.empty_like(table).index_copy_(0, target, table * (HEAD_STD / TABLE_STD))
    layer: nn.Module = model.lm_head
    if isinstance(layer, QuantizedLinear):
        packed = type(layer).pack(head, quantization)
        for part in layer.parts:
            getattr(layer, part).copy_(packed[part])
    else:
        model.lm_head.weight.data.copy_(head)
    return model


def following(token: int, cycle: int, vocab_size: int) -> int:
    """Return the next token in a token's circle of ``cycle`` tokens; the last circle is shorter."""
    first = token // cycle * cycle
    return token + 1 if token + 1 < min(first + cycle, vocab_size) else first


def text_of(kind: str, number: int, cycle: int, prompt_tokens: int, output_tokens: int) -> Text:
    """Make a text of circle ``number``, which is as long as the prompt if the answer repeats that."""
    first, draw = number * cycle, random.Random(number)
    prompt = list(range(first, first + prompt_tokens))
    answer = [first + (prompt_tokens + place) % cycle for place in range(output_tokens)]
    if kind == "changed":
        for place in range(CHANGED_EVERY - 1, prompt_tokens - 1, CHANGED_EVERY):
            prompt[place] = draw.randrange(first)
    elif kind == "misleading":
        for place in range((prompt_tokens - 1) // 3):
            token = first + prompt_tokens + 2 * place
            prompt[3 * place : 3 * place + 3] = token, token + 1, draw.randrange(cycle)
    return Text(prompt, answer)


def run(model: Qwen2, texts: list[Text], settings: EngineSettings) -> tuple[float, dict[str, int]]:
    """Answer all texts at once, twice, and return the seconds from first to last token, and what the engine counted."""
    assert settings.max_seq_len is not None
    gc.collect()  # A runner before this one, whose graphs know it.
    runner = ModelRunner(model, settings, settings.max_seq_len)
    scheduler = Scheduler(
        settings,
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_seq_len=runner.max_seq_len,
        mixed_tokens=settings.mixed_tokens(on_gpu=runner.device.type == "cuda"),
        depth=runner.depth,
    )
    sources = Sources(runner.device, LocalArena("benchmark"))
    core = EngineCore(runner, scheduler, sources, eos_token_ids=frozenset(), max_seq_len=runner.max_seq_len)
    seconds, before = 0.0, scheduler.stats()
    for attempt in ("warm", "timed"):
        before = scheduler.stats()
        for number, text in enumerate(texts):
            sampling = SamplingParams(max_tokens=len(text.answer), temperature=0.0)
            name = f"{attempt}/{number}"
            core.handle(Generate(request_id=name, prompt_token_ids=text.prompt, sampling=sampling))
        answers: dict[str, list[int]] = {f"{attempt}/{number}": [] for number in range(len(texts))}
        started = 0.0
        while scheduler.has_work:
            step = core.step()
            assert not step.failures
            for chunk in step.chunks:
                answers[chunk.request_id] += chunk.token_ids
            # From when everybody has the first token: prompts take the same time either way.
            if not started and all(answers.values()):
                started = time.perf_counter()
                done = sum(map(len, answers.values()))
        seconds = (time.perf_counter() - started) / (sum(map(len, answers.values())) - done)
        for number, text in enumerate(texts):
            found = answers[f"{attempt}/{number}"]
            wrong = next((n for n, pair in enumerate(zip(found, text.answer, strict=True)) if pair[0] != pair[1]), None)
            assert wrong is None, f"text {number} has another answer than it must have, from token {wrong} on"
    after = scheduler.stats()
    counted = {name: getattr(after, name) - getattr(before, name) for name in Result._fields[4:]}
    return seconds, counted


def measure(arguments: argparse.Namespace) -> list[Result]:
    """Run every text, number of clients and kind of speculation."""
    device = torch.device(arguments.device)
    config = ModelConfig.from_folder(arguments.config)
    quantization = Quantization(method=arguments.quantization)
    results = []
    for kind in TEXTS:
        length = arguments.prompt_tokens + (arguments.output_tokens if kind in ("new", "misleading") else 0)
        model = certain_model(config, device, quantization, length)
        for clients in arguments.clients:
            # Circle 0 is left for the tokens that are changed.
            texts = [
                text_of(kind, number + 1, length, arguments.prompt_tokens, arguments.output_tokens)
                for number in range(clients)
            ]
            for speculation in ("none", "prompt_lookup"):
                max_seq_len = arguments.prompt_tokens + arguments.output_tokens
                settings = EngineSettings.model_validate(
                    {
                        "max_batch_size": max(arguments.clients), "max_seq_len": max_seq_len,
                        "num_kv_blocks": (max(arguments.clients) + 1) * (max_seq_len // 16 + 2),
                        "speculation": speculation, "speculative_tokens": arguments.speculative_tokens,
                    }
                )  # fmt: skip
                seconds, counted = run(model, texts, settings)
                results.append(Result(kind, clients, speculation, 1 / seconds, **counted))
                show(results[-1])
        del model
    return results


def show(result: Result) -> None:
    """Print one line."""
    share = result.accepted_tokens / result.draft_tokens if result.draft_tokens else 0.0
    print(
        f"{result.text:10} {result.clients:3} clients  {result.speculation:14} {result.tokens_per_s:9.1f} tokens/s  "
        f"{1000 * result.clients / result.tokens_per_s:7.3f} ms a token of each  {result.steps:5} steps  "
        f"{result.accepted_tokens:6} of {result.draft_tokens:6} guesses right ({share:.0%})",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", type=Path, default=PRESET, help="folder with a config.json")
    parser.add_argument("--quantization", default="int8", choices=["none", "int8", "fp8", "int4"])
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--output-tokens", type=int, default=800)
    parser.add_argument("--speculative-tokens", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments)
    if arguments.json is not None:
        rows: list[dict[str, Any]] = [result._asdict() for result in results]
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
