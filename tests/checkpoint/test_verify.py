"""Comparisons with a reference: what is the same passes, and what is not fails in its stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import foveate
from golden_data import EMBEDS_ATOL, LOGITS_ATOL, TINY, picture_names, pixels, tensors
from PIL import Image
from safetensors.torch import load_file, save_file
from serving import ROOT

from foveate.chat.assets import ModelAssets
from foveate.checkpoint.bounds import bounds_for
from foveate.checkpoint.load import load_model
from foveate.checkpoint.sample import Sample, SamplePicture, SampleSet
from foveate.checkpoint.stage import Stage
from foveate.checkpoint.verify import OwnModel, compare, run
from foveate.deploy.samples import PICTURES, sample_set, text_prompts
from foveate.errors import CheckpointError
from foveate.models.minicpmv import MiniCPMV
from foveate.quantization.scheme import Method, Quantization
from foveate.vision.encoder import VisionEncoder

torch.set_num_threads(1)
CPU = torch.device("cpu")
DEMO = ROOT / "foveate" / "demo" / "model"
REMOTE_CODE = Path(__file__).parent / "remote_code"
EXACT = bounds_for(("float32", "float32"), Quantization())
STAGES = ["prompts", "preprocess", "vision features", "resampler output", "logits", "greedy"]


def tiny() -> MiniCPMV:
    return load_model(TINY, CPU, torch.float32)


@pytest.fixture(scope="module")
def samples() -> SampleSet:
    """Few, so that it is quick: one with a picture, one without."""
    whole = sample_set(TINY)
    return replace(whole, samples=(whole.samples[0], whole.samples[-1]))


def stages(change: Callable[[MiniCPMV], object], samples: SampleSet) -> dict[str, Stage]:
    """Compare the tiny model with a changed one."""
    reference = run(OwnModel(tiny()), samples)
    other = tiny()
    with torch.no_grad():
        change(other)
    return {stage.name: stage for stage in compare(reference, run(OwnModel(other), samples, follow=reference), EXACT)}


def test_a_model_is_its_own_reference(samples: SampleSet) -> None:
    found = stages(lambda model: None, samples)
    assert list(found) == STAGES
    assert all(stage.ok for stage in found.values())
    assert found["logits"].values["max"] == 0
    assert found["greedy"].values == {"same": 48, "of": 48, "agreement": 1}


@pytest.mark.parametrize(
    ("change", "outside"),
    [
        (lambda model: model.vision.encoder.layers[1].fc1.weight.mul_(1.1), STAGES[2:]),
        (lambda model: model.vision.resampler.ln_post.weight.mul_(1.5), STAGES[3:]),
        (lambda model: model.language.layers[1].down_proj.weight.mul_(1.5), STAGES[4:]),
    ],
)
def test_a_difference_shows_in_its_stage(
    change: Callable[[MiniCPMV], object], outside: list[str], samples: SampleSet
) -> None:
    found = stages(change, samples)
    # A little in what the encoder sees may leave the tokens alone.
    assert [name for name in STAGES[:-1] if not found[name].ok] == [name for name in outside if name != "greedy"]
    assert found[outside[0]].values["relative"] > 0.01


def test_other_pixels_and_other_prompts_end_the_comparison(samples: SampleSet) -> None:
    reference = run(OwnModel(tiny()), samples)
    first, last = samples.samples
    brighter = SamplePicture(first.pictures[0].pixels + np.float32(1e-3), first.pictures[0].tgt_sizes)
    moved = SamplePicture(first.pictures[0].pixels, ((16, 64),))
    for sample, measured in (
        (replace(first, pictures=(brighter,)), {"prompts": True, "preprocess": False}),
        (replace(first, pictures=(moved,)), {"prompts": True, "preprocess": False}),
        (replace(first, token_ids=(*first.token_ids[:-1], 5)), {"prompts": False, "preprocess": True}),
    ):
        other = replace(samples, samples=(sample, last))
        found = compare(reference, run(OwnModel(tiny()), other, follow=reference), EXACT)
        assert {stage.name: stage.ok for stage in found} == measured


@pytest.mark.parametrize("case", ["text_only", "image1", "two_images"])
def test_the_stages_are_the_published_model_s(case: str) -> None:
    golden = tensors(case)
    model = OwnModel(tiny())
    rows = []
    for name in picture_names(case):
        cut = pixels(name)
        normalized = (cut.patches.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
        rows.append(model.look(SamplePicture(normalized, cut.tgt_sizes))[1])
    positions = [p for start, end in golden.get("image_bound", torch.empty(0, 2)).tolist() for p in range(start, end)]
    ids = golden["input_ids"].tolist()
    with torch.inference_mode():
        logits = model.logits(ids, positions, torch.cat(rows) if rows else torch.empty(0), len(ids))
    if rows:
        assert (torch.cat(rows) - golden["resampler_out"].flatten(0, 1)).abs().max() < EMBEDS_ATOL
    assert (logits[-8:] - golden["logits_last8"]).abs().max() < LOGITS_ATOL
    greedy = golden.get("greedy_ids_fullmask", golden["greedy_ids"]).tolist()
    sample = Sample(case, tuple(ids), tuple(positions), ())
    answer: list[int] = []
    with torch.inference_mode():
        while len(answer) < len(greedy):
            joined = torch.cat(rows) if rows else torch.empty(0)
            scores = model.logits([*sample.token_ids, *answer], sample.image_positions, joined, 1)
            answer.append(int(scores.argmax()))
    assert answer == greedy


def test_reading_on_is_reading_anew() -> None:
    ids = torch.randint(700, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    model = OwnModel(tiny())
    with torch.inference_mode():
        whole = model.logits(ids, [2, 3, 4, 5], rows, 60)
        model.logits(ids[:40], [2, 3, 4, 5], rows, 1)
        assert torch.allclose(model.logits(ids, [2, 3, 4, 5], rows, 20), whole[40:], atol=1e-4)
        assert torch.allclose(model.logits(ids, [2, 3, 4, 5], rows, 30), whole[30:], atol=1e-4)
        # Other rows, or another beginning, are no continuation.
        other = model.logits([*ids[:50], 1, 2], [2, 3, 4, 5], rows.clone() + 1, 1)
        assert not torch.allclose(model.logits([*ids[:50], 1, 2, 3], [2, 3, 4, 5], rows, 2)[0], other[0], atol=1e-2)
        changed = model.logits([7, *ids[1:50], 1, 2, 3, 4], [2, 3, 4, 5], rows, 1)
        assert torch.allclose(
            OwnModel(tiny()).logits([7, *ids[1:50], 1, 2, 3, 4], [2, 3, 4, 5], rows, 1), changed, atol=1e-4
        )


def test_samples_are_what_the_server_would_make() -> None:
    samples = sample_set(DEMO)
    assets = ModelAssets.from_folder(DEMO)
    assert len(samples.samples) == 8
    assert samples.eos_token_ids == frozenset(assets.eos_token_ids)
    slot = assets.tokenizer.token_id(assets.pictures.unk)
    encoder = VisionEncoder(tiny().vision, mean=[0.5] * 3, std=[0.5] * 3, batch_size=16)
    for sample in samples.samples:
        assert all(sample.token_ids[position] == slot for position in sample.image_positions)
        assert len(sample.image_positions) == 64 * sum(len(picture.tgt_sizes) for picture in sample.pictures)
    [small_print] = [sample for sample in samples.samples if sample.name.startswith("small-print")]
    assert len(small_print.pictures[0].tgt_sizes) == 7
    from foveate.media.slicing import plan_slices
    from foveate.vision.preprocess import preprocess

    with Image.open(PICTURES / "small-print.png") as file:
        picture = file.convert("RGB")
    exact = preprocess(picture, plan_slices(*picture.size))
    assert np.array_equal(encoder.normalize(torch.from_numpy(exact.patches)).numpy(), small_print.pictures[0].pixels)
    assert all(20 < len(prompt) < 200 for prompt in text_prompts(DEMO))


@pytest.mark.parametrize(("method", "dtype"), [("none", "float32"), ("int8", "bfloat16"), ("int4", "bfloat16")])
def test_bounds_grow_with_what_is_given_up(method: Method, dtype: str) -> None:
    found = bounds_for(("float32", dtype), Quantization(method=method))
    assert found.features == (1e-4 if dtype == "float32" else 0.05)
    assert bounds_for((dtype, "float32"), Quantization(method=method, vision=True)).features >= found.features
    plain = bounds_for((dtype, dtype), Quantization())
    assert found.kl_divergence >= plain.kl_divergence
    assert found.agreement <= plain.agreement


def test_a_quantized_engine_is_within_its_bounds_and_a_broken_one_is_not(tmp_path: Path) -> None:
    output = tmp_path / "engine"
    built = foveate("build", DEMO, "--output", output, "--quantization", "int8", "--load-on-cpu")
    assert built.returncode == 0, built.stderr
    result = foveate("verify", output, "--reference", DEMO, "--device", "cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok") == 6
    assert "agreement at least 0.95" in result.stdout
    path = next(path for path in output.glob("engine-*.safetensors") if "language.norm.weight" in load_file(path))
    weights = load_file(path)
    weights["language.layers.2.down_proj.scale"] *= 8
    save_file(weights, path, {"format": "pt"})
    result = foveate("verify", output, "--reference", DEMO, "--device", "cpu", "--json")
    assert result.returncode == 1
    found = {stage["name"]: stage for stage in json.loads(result.stdout)}
    assert [name for name in STAGES if found[name]["ok"]] == STAGES[:4]
    assert found["logits"]["values"]["kl_divergence"] > found["logits"]["bound"]


def test_another_model_is_no_reference(tmp_path: Path) -> None:
    result = foveate("verify", TINY, "--reference", DEMO, "--device", "cpu")
    assert result.returncode == 1
    assert "OUTSIDE" in result.stdout
    assert foveate("verify", TINY).returncode == 2
    assert foveate("verify", TINY, "--reference", tmp_path / "nowhere").returncode == 3


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A checkpoint that brings code along: a stand-in with the published interface."""
    folder = Path(shutil.copytree(TINY, tmp_path / "with-code"))
    for path in REMOTE_CODE.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def test_the_reference_runs_by_its_own_code(with_code: Path, tmp_path: Path) -> None:
    flags = ("--reference", with_code, "--trust-remote-code", "--device", "cpu", "--json")
    result = foveate("verify", TINY, *flags, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 0, result.stdout + result.stderr
    found = {stage["name"]: stage for stage in json.loads(result.stdout)}
    assert list(found) == STAGES
    assert 0 < found["logits"]["values"]["max"] < 1e-3


def test_code_that_fails_is_said_to(with_code: Path, tmp_path: Path) -> None:
    flags = ("--reference", with_code, "--trust-remote-code", "--device", "cpu")
    (with_code / "modeling_minicpmv.py").write_text("from transformers import NothingOfTheKind\n")
    result = foveate("verify", TINY, *flags, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 3
    assert f"error: {with_code}: its own code cannot be loaded with the installed transformers" in result.stderr
    assert "NothingOfTheKind" in result.stderr
    (with_code / "modeling_minicpmv.py").unlink()
    result = foveate("verify", TINY, *flags)
    assert result.returncode == 3
    assert "has no modeling_*.py" in result.stderr


def test_a_prompt_needs_as_many_rows_as_it_has_room_for(samples: SampleSet) -> None:
    sample = replace(samples.samples[0], image_positions=samples.samples[0].image_positions[:-1])
    with pytest.raises(CheckpointError, match=r"the encoder makes 64 rows, and the prompt has room for 63"):
        run(OwnModel(tiny()), replace(samples, samples=(sample,)))
