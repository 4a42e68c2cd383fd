"""What quantization costs, measured: by what a model says, and by how far its weights have moved.

:func:`measure_error` compares two models; :class:`WeightErrors` is for sizes of which two do not fit into memory, and
is fed while the weights are packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.quantization.linear import QuantizedLinear, row_blocks

_ROWS = (
    64  # Tokens whose logits are compared at a time: with a vocabulary of 150 000, 75 MiB for both models in float64.
)


class _Attend(Protocol):
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class LanguageModel(Protocol):
    """What is needed of :class:`foveate.models.qwen2.Qwen2`."""

    embed_tokens: nn.Embedding

    def __call__(self, x: Tensor, positions: Tensor, attend: _Attend) -> Tensor:
        """Hidden states [tokens, hidden] of input embeddings [tokens, hidden]."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """[tokens, hidden] → [tokens, vocab]"""
        ...


def measure_error(
    reference: LanguageModel, quantized: LanguageModel, token_ids: Sequence[Sequence[int]] | None = None
) -> dict[str, float]:
    """Compare what two models expect to come next, at every token of some texts (neither model's own answers).

    Args:
        reference: the model before quantization. May be on another device than the quantized one, of another type.
        quantized: the same model, quantized.
        token_ids: the texts; :func:`fixed_inputs` if there are none.

    Returns:
        ``kl_divergence``: of the quantized model's distribution of the next token from the reference's, the mean over
        all tokens, in nats. ``kl_divergence_max``: the largest of a token, in nats. ``greedy_agreement``: the share
        of tokens, 0 to 1, at which both find the same next token most likely. ``tokens``: how many were compared.
    """
    table = reference.embed_tokens
    texts = fixed_inputs(table.num_embeddings) if token_ids is None else token_ids
    divergences, agreements = [], []
    with torch.inference_mode():
        for text in texts:
            hidden = [_hidden(model, text) for model in (reference, quantized)]
            for start in range(0, len(text), _ROWS):
                expected, found = (
                    model.logits(states[start : start + _ROWS]).to(table.weight.device)
                    for model, states in zip((reference, quantized), hidden, strict=True)
                )
                divergences.append(kl_divergence(expected, found))
                agreements.append(expected.argmax(dim=-1) == found.argmax(dim=-1))
    divergence, agreement = torch.cat(divergences), torch.cat(agreements)
    return {
        "kl_divergence": divergence.mean().item(),
        "kl_divergence_max": divergence.max().item(),
        "greedy_agreement": agreement.double().mean().item(),
        "tokens": float(len(divergence)),
    }


def kl_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return the divergence of each row's distribution from the expected one, in nats.

    Args:
        expected: logits [tokens, vocab].
        found: logits of the same shape.

    Returns:
        float64 [tokens]; 0 where both are equal
    """
    # In float64, since the sum over a large vocabulary is the small difference of large terms.
    wanted, got = (logits.double().log_softmax(dim=-1) for logits in (expected, found))
    return F.kl_div(got, wanted, reduction="none", log_target=True).sum(dim=-1).clamp_(min=0)


def fixed_inputs(vocab_size: int, *, texts: int = 4, length: int = 128) -> list[list[int]]:
    """Make up texts of random tokens, the same ones every time: [texts][length]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (texts, length), generator=generator).tolist()


class WeightErrors:
    """How far weights have moved, collected layer by layer: the Frobenius norm of the change, relative to the weight's.

    Attributes:
        layers: each layer's error, by its name: 0 is no change, and 1 as large as the weight.
    """

    def __init__(self) -> None:
        self.layers: dict[str, float] = {}
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, layer: str, weight: Tensor, packed: Mapping[str, Tensor], kind: type[QuantizedLinear]) -> None:
        """Count some rows of a layer.

        Args:
            layer: its name; it may be added to repeatedly.
            weight: [rows, in] before packing.
            packed: the same rows, packed.
            kind: the class that packed them.
        """
        change, size = self._sums.get(layer, (0.0, 0.0))
        for rows in row_blocks(*weight.shape):
            exact = weight[rows].float()
            stored = kind.unpack({name: part[rows] for name, part in packed.items()}, weight.shape[1])
            change += (stored - exact).square().sum(dtype=torch.float64).item()
            size += exact.square().sum(dtype=torch.float64).item()
        self._sums[layer] = (change, size)
        self.layers[layer] = _relative(change, size)

    def summary(self) -> dict[str, float]:
        """Return ``weight_error``, over all layers together, and ``weight_error_max``, the worst layer's.

        Both are 0 if nothing was added.
        """
        change, size = (sum(pair[place] for pair in self._sums.values()) for place in (0, 1))
        return {"weight_error": _relative(change, size), "weight_error_max": max(self.layers.values(), default=0.0)}


def _relative(change: float, size: float) -> float:
    return math.sqrt(change / size) if size else 0.0


def _hidden(model: LanguageModel, text: Sequence[int]) -> Tensor:
    device = model.embed_tokens.weight.device
    ids = torch.tensor(text, device=device)
    return model(model.embed_tokens(ids), torch.arange(len(ids), device=device), _attend_causally)


def _attend_causally(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each token sees itself and those before it; ``layer`` makes no difference, since nothing is kept."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (
        tensor.transpose(0, 1)[None]
        for tensor in (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
    )
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
