"""Comparing two models stage by stage, from pixels to tokens, against stated bounds.

One after the other runs, so that the memory is that of the larger one. Each has its own preprocessing and its own
vision encoder, and its language model reads its own embeddings: a difference shows in its stage and in all that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.checkpoint.bounds import Bounds
from foveate.checkpoint.sample import Sample, SamplePicture, SampleSet
from foveate.checkpoint.stage import Stage
from foveate.errors import CheckpointError
from foveate.models.minicpmv import MiniCPMV
from foveate.quantization.error import kl_divergence

ANSWER_TOKENS = 24
"""How far the reference answers."""
_PROMPT_TOKENS = 16  # The last ones of the prompt, whose logits are compared too.


class Runnable(Protocol):
    """A model whose stages can be run one by one."""

    def look(self, picture: SamplePicture) -> tuple[Tensor, Tensor]:
        """Return the encoder's features [patches, size], and what the resampler makes of them [rows, hidden]."""
        ...

    def logits(self, token_ids: Sequence[int], positions: Sequence[int], rows: Tensor, last: int) -> Tensor:
        """Return the logits [last, vocab] of the last tokens, float32 on the CPU.

        Args:
            token_ids: the whole sequence.
            positions: whose embeddings are replaced by rows.
            rows: [positions, hidden].
            last: how many.
        """
        ...


@dataclass(slots=True)
class Trace:
    """What one model made of the samples: for each sample its pictures' features and rows, its logits, its answer."""

    samples: tuple[Sample, ...]
    features: list[list[Tensor]]
    rows: list[list[Tensor]]
    logits: list[Tensor]
    answers: list[list[int]]


class OwnModel:
    """A model of ours, without the engine. It keeps the keys and values of what it has read last.

    Args:
        model: on its device.
    """

    def __init__(self, model: MiniCPMV) -> None:
        self.model = model
        self._read: list[int] = []
        self._rows: Tensor | None = None
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}
        self.device = model.language.embed_tokens.weight.device
        self.dtype = model.language.embed_tokens.weight.dtype

    def look(self, picture: SamplePicture) -> tuple[Tensor, Tensor]:
        """See :meth:`Runnable.look`."""
        pixels = torch.from_numpy(picture.pixels).to(self.device, self.dtype)
        features = self.model.vision.encoder(pixels, picture.tgt_sizes)
        return features, self.model.vision.resampler(features, picture.tgt_sizes).flatten(0, 1)

    def logits(self, token_ids: Sequence[int], positions: Sequence[int], rows: Tensor, last: int) -> Tensor:
        """See :meth:`Runnable.logits`."""
        known = len(self._read)
        if rows is not self._rows or list(token_ids[:known]) != self._read or len(token_ids) - known < last:
            known = 0
            self._keys.clear()
        self._read, self._rows = list(token_ids), rows
        language = self.model.language
        x = language.embed_tokens(torch.tensor(token_ids, device=self.device))
        if positions:
            x[torch.tensor(positions, device=self.device)] = rows.to(self.device, self.dtype)
        places = torch.arange(len(token_ids), device=self.device)
        hidden = language(x[known:], places[known:], self._attend)
        return language.logits(hidden[-last:]).cpu()

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend to what was read before, and causally to the new tokens."""
        fresh = layer not in self._keys
        if not fresh:
            key, value = (torch.cat(pair) for pair in zip(self._keys[layer], (key, value), strict=True))
        self._keys[layer] = (key, value)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        mask = None if fresh else _causal(len(query), len(key), query.device)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=fresh)
        return attended[0].transpose(0, 1)


def _causal(new: int, total: int, device: torch.device) -> Tensor:
    """Return which of all tokens each of the new ones, the last, sees: bool [new, total]."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)


def run(
    model: Runnable,
    samples: SampleSet,
    *,
    follow: Trace | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Run the samples through a model.

    Args:
        model: whose stages to run.
        samples: as its own checkpoint puts them.
        follow: the reference's trace, whose prompts and answers are then read; otherwise the model answers itself,
            taking the most likely token until one that ends the answer.
        progress: called with (samples done, samples in all).
    """
    trace = Trace(samples.samples, [], [], [], [])
    with torch.inference_mode():
        for index, sample in enumerate(samples.samples):
            seen = [model.look(picture) for picture in sample.pictures]
            trace.features.append([features.float().cpu() for features, _ in seen])
            trace.rows.append([rows.float().cpu() for _, rows in seen])
            prompt = follow.samples[index] if follow else sample
            logits, answer = _read(model, prompt, trace.rows[-1], follow.answers[index] if follow else None, samples)
            trace.logits.append(logits)
            trace.answers.append(answer)
            progress(index + 1, len(samples.samples))
    return trace


def _read(
    model: Runnable, sample: Sample, pictures: list[Tensor], answer: list[int] | None, samples: SampleSet
) -> tuple[Tensor, list[int]]:
    """Return the logits of the end of the prompt and of the answer, and the answer."""
    rows = torch.cat(pictures) if pictures else torch.empty(0)
    if len(rows) != len(sample.image_positions):
        raise CheckpointError(
            f"{sample.name}: the encoder makes {len(rows)} rows, and the prompt has room for "
            f"{len(sample.image_positions)}"
        )
    if answer is None:
        answer = []
        while len(answer) < ANSWER_TOKENS and not samples.eos_token_ids.intersection(answer[-1:]):
            scores = model.logits([*sample.token_ids, *answer], sample.image_positions, rows, 1)
            answer.append(int(scores[0].argmax()))
    # The last token of the answer is predicted by the one before it.
    ids = [*sample.token_ids, *answer[:-1]]
    count = min(_PROMPT_TOKENS, len(sample.token_ids)) - 1 + len(answer)
    return model.logits(ids, sample.image_positions, rows, count), answer


def compare(reference: Trace, found: Trace, bounds: Bounds) -> list[Stage]:
    """Compare two traces of the same samples, of which the second followed the first.

    Raises:
        CheckpointError: the models are not of one shape, so that nothing after the prompts can be compared.
    """
    stages = compare_inputs(reference.samples, found.samples)
    if not all(stage.ok for stage in stages):
        return stages
    for name, bound in (("features", bounds.features), ("rows", bounds.rows)):
        pairs = list(zip(_flat(getattr(reference, name)), _flat(getattr(found, name)), strict=True))
        title = {"features": "vision features", "rows": "resampler output"}[name]
        stages.append(_tensors(title, pairs, bound))
    stages.append(_logits(list(zip(reference.logits, found.logits, strict=True)), bounds.kl_divergence))
    return [*stages, _greedy(reference, found, bounds.agreement)]


def compare_inputs(reference: Sequence[Sample], found: Sequence[Sample]) -> list[Stage]:
    """Compare prompts and pixels, which do not depend on weights: they have to be the same."""
    pairs = list(zip(reference, found, strict=True))
    other = sum(a.token_ids != b.token_ids or a.image_positions != b.image_positions for a, b in pairs)
    prompts = Stage(
        name="prompts", values={"different": float(other), "of": float(len(pairs))}, measure="different", bound=0.0,
        ok=not other,
    )  # fmt: skip
    worst, total, count = 0.0, 0.0, 0
    for a, b in pairs:
        for one, two in zip(a.pictures, b.pictures, strict=True):
            if one.tgt_sizes != two.tgt_sizes or one.pixels.shape != two.pixels.shape:
                worst = float("inf")
                continue
            difference = np.abs(one.pixels - two.pixels)
            worst = max(worst, float(difference.max()))
            total, count = total + float(difference.sum(dtype=np.float64)), count + difference.size
    values = {"max": worst, "mean": total / max(count, 1)}
    return [prompts, Stage(name="preprocess", values=values, measure="max", bound=1e-6, ok=worst <= 1e-6)]


def _flat(tensors: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for group in tensors for tensor in group]


def _differences(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Measure absolute differences, and the whole difference relative to the reference (Frobenius norms)."""
    for a, b in pairs:
        if a.shape != b.shape:
            raise CheckpointError(f"the models are not of one shape: {list(a.shape)} and {list(b.shape)}")
    differences = [(a - b).abs() for a, b in pairs]
    change, size = (
        sum(tensor.double().square().sum().item() for tensor in tensors)
        for tensors in (differences, [a for a, _ in pairs])
    )
    return {
        "max": max(difference.max().item() for difference in differences),
        "mean": sum(d.double().sum().item() for d in differences) / sum(d.numel() for d in differences),
        "relative": (change / size) ** 0.5 if size else 0.0,
    }


def _tensors(name: str, pairs: list[tuple[Tensor, Tensor]], bound: float) -> Stage:
    values = _differences(pairs)
    return Stage(name=name, values=values, measure="relative", bound=bound, ok=values["relative"] <= bound)


def _logits(pairs: list[tuple[Tensor, Tensor]], bound: float) -> Stage:
    values = _differences(pairs)
    divergences = torch.cat([kl_divergence(a, b) for a, b in pairs])
    values |= {"kl_divergence": divergences.mean().item(), "kl_divergence_max": divergences.max().item()}
    ok = values["kl_divergence"] <= bound
    return Stage(name="logits", values=values, measure="kl_divergence", bound=bound, ok=ok)


def _greedy(reference: Trace, found: Trace, bound: float) -> Stage:
    """Count the tokens of the reference's answers that are the other model's choice too, at the same place."""
    same = total = 0
    for logits, answer in zip(found.logits, reference.answers, strict=True):
        chosen = logits[-len(answer) :].argmax(dim=-1).tolist()
        same += sum(a == b for a, b in zip(chosen, answer, strict=True))
        total += len(answer)
    values = {"same": float(same), "of": float(total), "agreement": same / total}
    return Stage(name="greedy", values=values, measure="agreement", bound=bound, ok=same / total >= bound)
