"""The measured error: its units, and that it grows with what is thrown away."""

from __future__ import annotations

import math

import pytest
import torch
from golden_data import TINY, tensors

from foveate.checkpoint.load import load_model, stream_parameters
from foveate.models.qwen2 import Qwen2
from foveate.quantization.error import WeightErrors, fixed_inputs, kl_divergence, measure_error
from foveate.quantization.int8 import Int8Linear
from foveate.quantization.scheme import Method, Quantization

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exact() -> Qwen2:
    return load_model(TINY, CPU, torch.float32, part="language").language


def quantized(method: Method) -> Qwen2:
    how = Quantization(method=method)
    return load_model(TINY, CPU, torch.float32, part="language", quantization=how).language


def test_divergence_is_in_nats() -> None:
    even, sure = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert kl_divergence(even, sure).item() == pytest.approx(expected)
    assert kl_divergence(sure, sure + 7).item() == pytest.approx(0, abs=1e-12)


def test_a_model_agrees_with_itself(exact: Qwen2) -> None:
    found = measure_error(exact, exact)
    assert found == {"kl_divergence": 0, "kl_divergence_max": 0, "greedy_agreement": 1, "tokens": 512}


def test_it_sees_what_another_computation_sees(exact: Qwen2) -> None:
    ids = tensors("text_only")["input_ids"].tolist()
    found = measure_error(exact, quantized("int8"), [ids])
    logits = []
    for model in (exact, quantized("int8")):
        prompt = torch.tensor(ids)

        def attend(_layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
            causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
            return torch.einsum("hqk,khd->qhd", scores.masked_fill(~causal, -torch.inf).softmax(-1), value)

        with torch.inference_mode():
            logits.append(model.logits(model(model.embed_tokens(prompt), torch.arange(len(ids)), attend)).double())
    p, q = (each.softmax(-1) for each in logits)
    divergence = (p * (p / q).log()).sum(-1)
    assert found["kl_divergence"] == pytest.approx(divergence.mean().item(), rel=1e-2)
    assert found["kl_divergence_max"] == pytest.approx(divergence.max().item(), rel=1e-2)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found["greedy_agreement"] == pytest.approx(agreement)
    assert found["tokens"] == len(ids)


@pytest.mark.parametrize("case", ["text_only", "bang_text"])
def test_int8_mostly_says_what_the_reference_says(case: str, exact: Qwen2) -> None:
    # Random weights make nearly even distributions, so a trained model agrees far more often than this one.
    golden = tensors(case)
    ids = golden["input_ids"].tolist() + golden["greedy_ids"].tolist()
    found = measure_error(exact, quantized("int8"), [ids])
    assert found["greedy_agreement"] >= 0.8
    assert found["kl_divergence"] <= 0.02


def test_fewer_bits_are_worse(exact: Qwen2) -> None:
    methods: list[Method] = ["int8", "fp8", "int4"]
    found = [measure_error(exact, quantized(method)) for method in methods]
    divergences = [each["kl_divergence"] for each in found]
    assert divergences == sorted(divergences)
    agreements = [each["greedy_agreement"] for each in found]
    assert agreements == sorted(agreements, reverse=True)


def test_fixed_inputs_are_always_the_same() -> None:
    first = fixed_inputs(100)
    assert first == fixed_inputs(100)
    assert [len(text) for text in first] == [128] * 4
    assert max(max(text) for text in first) < 100


def test_weight_errors_are_relative_and_add_up() -> None:
    how = Quantization(method="int8")
    weight = torch.randn(6, 40)
    weight[4:] *= 100
    errors, apart = WeightErrors(), WeightErrors()
    assert errors.summary() == {"weight_error": 0.0, "weight_error_max": 0.0}
    errors.add("a", weight, Int8Linear.pack(weight, how), Int8Linear)
    for rows in (slice(0, 4), slice(4, 6)):
        apart.add("a", weight[rows], Int8Linear.pack(weight[rows], how), Int8Linear)
    change = Int8Linear.unpack(Int8Linear.pack(weight, how), 40) - weight
    expected = (change.norm() / weight.norm()).item()
    assert errors.layers["a"] == pytest.approx(expected, rel=1e-5)
    assert apart.layers["a"] == pytest.approx(expected, rel=1e-5)
    errors.add("b", torch.ones(1, 40), Int8Linear.pack(torch.ones(1, 40), how), Int8Linear)
    assert errors.summary()["weight_error_max"] == errors.layers["a"] > errors.layers["b"]


def test_they_are_collected_while_packing() -> None:
    errors = WeightErrors()
    how = Quantization(method="int8", vision=True)
    names = [name for name, _ in stream_parameters(TINY, torch.float32, quantization=how, errors=errors)]
    assert set(errors.layers) == {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
    assert all(0.001 < error < 0.02 for error in errors.layers.values())
