"""Trains the demo model from scratch: ``python -m training.train --help``.

The schedule follows the clock, so that a run ends when it should on whatever machine it gets, and a run may be
continued by another one. Beside the answers, a throw-away head learns to say what every patch shows: that teaches
the encoder to read long before the decoder knows how to ask.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from foveate.checkpoint.load import load_model
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import MiniCPMV
from foveate.models.resampler import sincos_positions
from training.attention import SegmentAttention, join
from training.data import CELLS, World
from training.export import export
from training.log import Log
from training.muon import Muon
from training.replay import Replay
from training.world.conversation import FAMILIES
from training.world.records import NUM_LABELS

READER = "reader.safetensors"
AUX_WEIGHT = 1.0
BACKGROUND_WEIGHT = 0.2


def initialize(model: MiniCPMV) -> None:
    """Random weights, and queries that begin by looking at one cell each of an 8 × 8 grid."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
        else:
            nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)
    depth = 2 * len(model.language.layers)
    with torch.no_grad():
        for layer in model.language.layers:
            layer.o_proj.weight.div_(math.sqrt(depth))
            layer.down_proj.weight.div_(math.sqrt(depth))
        for layer in model.vision.encoder.layers:
            layer.out_proj.weight.div_(math.sqrt(2 * len(model.vision.encoder.layers)))
            layer.fc2.weight.div_(math.sqrt(2 * len(model.vision.encoder.layers)))
        _focus_queries(model)


def _focus_queries(model: MiniCPMV) -> None:
    resampler = model.vision.resampler
    count, size = resampler.query.shape
    side = math.isqrt(count)
    device = resampler.query.device
    table = sincos_positions([(40, 40)], size, device, torch.float32).unflatten(0, (40, 40))
    places = (torch.arange(side, device=device) + 0.5) * (35 / side)
    whole = places.round().long()
    resampler.query.copy_(table[whole[:, None], whole].flatten(0, 1))
    # Each head gets every other frequency of both axes; the high ones, which tell neighbours apart, count most.
    frequencies = size // 4
    gain = 1.7 * (torch.arange(frequencies, device=device) < frequencies // 4).float() + 0.2
    heads = size // 128
    selection = torch.zeros(size, size, device=device)
    for head in range(heads):
        chosen = torch.arange(head, frequencies, heads, device=device)
        parts = [start + chosen for start in range(0, size, frequencies)]
        for row, column in enumerate(torch.cat(parts).tolist()):
            selection[head * 128 + row, column] = gain[column % frequencies]
    weights = resampler.in_proj_weight
    noise = 0.3 * size**-0.5
    weights[:size].copy_(selection + noise * torch.randn_like(selection))
    weights[size : 2 * size].copy_(selection + noise * torch.randn_like(selection))


def _compile(model: MiniCPMV) -> None:
    """Fuse what lies between the attentions: layers of this size spend most of their time moving activations."""
    for layer in [*model.vision.encoder.layers, *model.language.layers]:
        layer.before_attention = torch.compile(layer.before_attention, dynamic=True)
        layer.after_attention = torch.compile(layer.after_attention, dynamic=True)


class Trainer:
    """Model, optimizers and one step."""

    def __init__(self, config: ModelConfig, device: torch.device, peak: float, *, compiled: bool = False) -> None:
        self.device = device
        self.model = MiniCPMV(config).to(device)
        self.reader = nn.Linear(config.vision.hidden_size, CELLS * NUM_LABELS).to(device)
        self._label_weights = torch.ones(NUM_LABELS, device=device)
        self._label_weights[0] = BACKGROUND_WEIGHT
        initialize(self.model)
        if compiled:
            _compile(self.model)
        hidden = [
            p
            for n, p in self.model.named_parameters()
            if p.dim() == 2 and "embed" not in n and "lm_head" not in n and not n.endswith("query")
        ]
        chosen = {id(p) for p in hidden}
        rest = [p for p in [*self.model.parameters(), *self.reader.parameters()] if id(p) not in chosen]
        self.optimizers = [
            Muon(hidden, lr=peak, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"),
        ]
        self.peak = peak
        self.step_count = 0

    def loss(self, batches: list[dict]) -> tuple[Tensor, dict[str, Tensor], list[str], Tensor]:
        """Answer loss and reading loss of several batches together, and which turns would be answered exactly."""
        batch = join(batches, self.device)
        sizes = batch["tgt_sizes"]
        language = self.model.language
        x = language.embed_tokens(batch["token_ids"].long())
        reading = x.new_zeros(())
        if sizes:
            pixels = batch["patches"].to(torch.bfloat16) / 127.5 - 1.0
            features = self.model.vision.encoder(pixels, sizes)
            embeddings = self.model.vision.resampler(features, sizes).flatten(0, 1)
            reading = self._reading_loss(features.index_select(0, batch["labelled"]), batch["labels"])
            x = x.index_copy(0, batch["image_rows"], embeddings.to(x.dtype))
        attend = SegmentAttention(batch["lengths"], batch["segments"], batch["positions"])
        hidden = language(x, batch["positions"].long(), attend)
        logits = language.logits(hidden.index_select(0, batch["answering"]))
        answering = F.cross_entropy(logits, batch["targets"])
        with torch.no_grad():
            wrong = (logits.argmax(-1) != batch["targets"]).float()
            exact = wrong.new_zeros(len(batch["categories"])).index_add_(0, batch["turns"], wrong) == 0
        parts = {"answer": answering.detach(), "reading": reading.detach()}
        return answering + self.aux_weight * reading, parts, batch["categories"], exact

    aux_weight = AUX_WEIGHT

    def _reading_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        scores = self.reader(features).unflatten(-1, (CELLS, NUM_LABELS)).flatten(0, 1).float()
        return F.cross_entropy(scores, labels.flatten().long(), weight=self._label_weights)

    def step(self, batches: list[dict], scale: float) -> tuple[dict[str, Tensor], list[str], Tensor]:
        """One update at ``scale`` times the peak learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.peak * scale
        with torch.autocast(self.device.type, torch.bfloat16):
            loss, parts, categories, exact = self.loss(batches)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return parts, categories, exact

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "reader": self.reader.state_dict(), "steps": self.step_count,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}  # fmt: skip

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.reader.load_state_dict(state["reader"])
        self.step_count = state["steps"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def scale_at(progress: float, steps: int) -> float:
    """Warm up over 200 steps, hold, then fall to nothing over the last 45 % of the time."""
    return min(1.0, (steps + 1) / 200) * min(1.0, max(0.0, (1.0 - progress) / 0.45))


def parse_mix(text: str) -> dict[str, float]:
    """Shares by family from ``text=3,pair=1``."""
    pairs = [part.split("=") for part in text.split(",") if part]
    unknown = [family for family, _ in pairs if family not in FAMILIES]
    if unknown:
        raise SystemExit(f"--mix: {', '.join(unknown)} is no family: {', '.join(FAMILIES)}")
    return {family: float(share) for family, share in pairs}


def run(args: argparse.Namespace) -> None:
    started = time.time()
    torch.manual_seed(args.seed)
    # The processors belong to the workers: threads that must wait for each other wait for them as well.
    torch.set_num_threads(1)
    device = torch.device(args.device)
    trainer = Trainer(ModelConfig.from_folder(args.model), device, args.lr, compiled=args.compile)
    args.output.mkdir(parents=True, exist_ok=True)
    resume = args.state / "state.pt"
    if resume.exists():
        trainer.restore(torch.load(resume, map_location=device, weights_only=True))
        print(f"continuing after {trainer.step_count} steps")
    elif args.weights:
        trainer.model.load_state_dict(load_model(args.weights, device, torch.float32).state_dict())
        if (reader := args.weights / READER).exists():
            trainer.reader.load_state_dict(load_file(reader, device=str(device)))
        print(f"continuing with the weights of {args.weights}")
    first_seed = args.seed * 10_000_000 + int(args.start * 500_000_000)
    world = World(args.model, args.batch, seed=first_seed, stage=args.stage, mix=parse_mix(args.mix))
    pinned = device.type == "cuda"
    ahead = 4 if args.workers else None
    loader = iter(
        DataLoader(world, batch_size=None, num_workers=args.workers, prefetch_factor=ahead, pin_memory=pinned)
    )
    replay = Replay(loader, device, args.repeat)
    log = Log(args.output / "log.jsonl", args.every)
    while (elapsed := time.time() - started) < args.seconds:
        progress = args.start + (args.end - args.start) * elapsed / args.seconds
        trainer.aux_weight = AUX_WEIGHT * max(0.1, 1 - 1.5 * progress)
        asked = time.time()
        batches = replay.take(args.accumulate)
        waited = time.time() - asked
        parts, categories, exact = trainer.step(batches, scale_at(progress, trainer.step_count))
        if log.add(parts, categories, exact, sum(len(batch["lengths"]) for batch in batches), waited):
            log.write(step=trainer.step_count, progress=round(progress, 4), seconds=round(elapsed, 1))
    args.state.mkdir(parents=True, exist_ok=True)
    torch.save(trainer.state(), resume)
    export(trainer.model, args.output)
    save_file(trainer.reader.state_dict(), args.output / READER)
    print(f"{trainer.step_count} steps, wrote {args.output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder with config, tokenizer and preprocessor files"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("/tmp/foveate-training"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--start", type=float, default=0.0, help="where in the schedule this run begins, 0 to 1")
    parser.add_argument("--end", type=float, default=1.0, help="where in the schedule this run ends, 0 to 1")
    parser.add_argument(
        "--stage", type=float, default=1.0, help="share of the hard pictures: 0 without slices, 1 all kinds"
    )
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--mix", default="", help="shares of the families instead, such as text=3,small_text=2,pair=1")
    parser.add_argument("--compile", action="store_true", help="compile what lies between the attentions")
    parser.add_argument("--weights", type=Path, help="checkpoint to begin from, without the state of a run")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=12, help="worker batches in one step")
    parser.add_argument("--repeat", type=float, default=1.0, help="how often each batch is learned from, on average")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--every", type=int, default=50, help="steps between log lines")
    parser.add_argument("--seed", type=int, default=1)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
