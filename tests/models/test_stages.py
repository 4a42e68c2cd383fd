"""Every stage of the tiny model against the published reference code, float32 on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_data import CASES, EMBEDS_ATOL, LOGITS_ATOL, PICTURE_CASES, TINY, picture_names, pixels, tensors

from foveate.checkpoint.load import load_model
from foveate.models.minicpmv import MiniCPMV
from foveate.vision.encoder import VisionEncoder


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    return load_model(TINY, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def encoder(model: MiniCPMV) -> VisionEncoder:
    return VisionEncoder(model.vision, mean=[0.5] * 3, std=[0.5] * 3, batch_size=16)


def causal(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One sequence, everything at once."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("case", PICTURE_CASES)
@torch.inference_mode()
def test_vision_features(case: str, model: MiniCPMV, encoder: VisionEncoder) -> None:
    golden = tensors(case)
    pictures = [pixels(name) for name in picture_names(case)]
    sizes = [size for picture in pictures for size in picture.tgt_sizes]
    assert sizes == [tuple(size) for size in golden["tgt_sizes"].tolist()]
    packed = torch.cat([torch.from_numpy(picture.patches) for picture in pictures])
    features = model.vision.encoder(encoder.normalize(packed), sizes)
    for index, feature in enumerate(features.split([rows * columns for rows, columns in sizes])):
        torch.testing.assert_close(feature, golden[f"vision_last_hidden_state_{index}"], atol=EMBEDS_ATOL, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("case", PICTURE_CASES)
def test_resampler(case: str, batch_size: int, model: MiniCPMV) -> None:
    encoder = VisionEncoder(model.vision, mean=[0.5] * 3, std=[0.5] * 3, batch_size=batch_size)
    embeddings = torch.cat(encoder.encode([pixels(name) for name in picture_names(case)]))
    golden = tensors(case)["resampler_out"].flatten(0, 1)
    torch.testing.assert_close(embeddings, golden, atol=EMBEDS_ATOL, rtol=0)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_embeddings_and_logits(case: str, model: MiniCPMV, encoder: VisionEncoder) -> None:
    golden = tensors(case)
    ids = golden["input_ids"]
    x = model.language.embed_tokens(ids)
    if case in PICTURE_CASES:
        embeddings = torch.cat(encoder.encode([pixels(name) for name in picture_names(case)]))
        rows = [row for start, end in golden["image_bound"].tolist() for row in range(start, end)]
        x[rows] = embeddings
    torch.testing.assert_close(x, golden["inputs_embeds"], atol=EMBEDS_ATOL, rtol=0)
    logits = model.language.logits(model.language(x, torch.arange(len(ids)), causal))
    # Where a prompt has token 0 the reference masks it, which a server must not: those goldens have a suffix.
    suffix = "_fullmask" if (ids == 0).any() else ""
    torch.testing.assert_close(logits[-8:], golden[f"logits_last8{suffix}"], atol=LOGITS_ATOL, rtol=0)
    if f"logits_all{suffix}" in golden:
        torch.testing.assert_close(logits, golden[f"logits_all{suffix}"], atol=LOGITS_ATOL, rtol=0)


def test_bfloat16_runs_and_is_close(encoder: VisionEncoder) -> None:
    half = load_model(TINY, torch.device("cpu"), torch.bfloat16)
    coarse = VisionEncoder(half.vision, mean=[0.5] * 3, std=[0.5] * 3, batch_size=16)
    picture = [pixels("syn_palette.png")]
    exact, rounded = encoder.encode(picture)[0], coarse.encode(picture)[0]
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.999
