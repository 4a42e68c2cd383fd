"""Engine directories: what is in them, that they are always the same, and that half of one never looks whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import change_json, contents, foveate, large_checkpoint, python, started, without_weights
from golden_data import TINY
from published_layers import awq_tensors, random_layer
from safetensors.torch import load_file, save_file

from foveate.chat.assets import ModelAssets
from foveate.checkpoint.build import Recipe, build
from foveate.checkpoint.engine import Limits, Manifest, read_manifest
from foveate.checkpoint.identity import identity
from foveate.checkpoint.load import load_model, state_shapes
from foveate.errors import CheckpointError, ConfigError
from foveate.models.config import ModelConfig
from foveate.quantization.scheme import Method, Quantization

torch.set_num_threads(1)
CPU = torch.device("cpu")
MIB = 2**20
METHODS: list[Method] = ["none", "int8", "fp8", "int4"]
LIMITS = Limits(max_batch_size=8, max_input_len=30720, max_seq_len=32768, max_num_tokens=32768, max_image_tokens=4096)
GROUP = 64


def recipe(method: Method = "none", *, dtype: str = "float32", vision: bool = False, dummy: bool = False) -> Recipe:
    quantization = Quantization(method=method, group_size=GROUP, vision=vision)
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    return Recipe(quantization=quantization, dtype=dtype, limits=LIMITS, device=CPU, dummy=dummy, prompts=prompts)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an engine directory, by its name; no file holds both parts."""
    index = json.loads((folder / "engine.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(set(index.values())):
        tensors = load_file(folder / file)
        assert len({name.split(".")[0] for name in tensors}) == 1
        assert all(index[name] == file for name in tensors)
        found |= tensors
    assert found.keys() == index.keys()
    return found


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_it_holds_the_model_that_loading_makes(method: Method, vision: bool, tmp_path: Path) -> None:
    chosen = recipe(method, vision=vision and method != "none")
    build(TINY, tmp_path / "out", chosen)
    expected = load_model(TINY, CPU, torch.float32, quantization=chosen.quantization).state_dict()
    tensors = stored(tmp_path / "out")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    loaded = load_model(tmp_path / "out", CPU, torch.float32).state_dict()
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in expected.items())


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    returned = build(TINY, tmp_path / "out", recipe("int8", dtype="bfloat16"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest == returned
    assert (manifest.format, manifest.model_type, manifest.dtype) == (1, "minicpmv", "bfloat16")
    assert manifest.quantization.method == "int8"
    assert manifest.limits == LIMITS
    assert manifest.source.name == "model"
    assert manifest.source.identity == identity(TINY, dummy=False)
    weights = {name: t for path in TINY.glob("*.safetensors") for name, t in load_file(path).items()}
    language = sum(tensor.numel() for name, tensor in weights.items() if name.startswith("llm."))
    vision = sum(tensor.numel() for name, tensor in weights.items() if not name.startswith("llm."))
    assert manifest.parameters == {"language": language, "vision": vision}
    files = contents(tmp_path / "out")
    assert manifest.files.keys() == files.keys() - {"engine.json"}
    for name, record in manifest.files.items():
        assert (record.bytes, record.sha256) == (len(files[name]), hashlib.sha256(files[name]).hexdigest())
    assert list(manifest.files) == sorted(manifest.files)


def test_what_the_server_reads_beside_the_weights_is_unchanged(tmp_path: Path) -> None:
    build(TINY, tmp_path / "out", recipe())
    ours, theirs = ModelAssets.from_folder(tmp_path / "out"), ModelAssets.from_folder(TINY)
    assert (ours.pictures, ours.generation, ours.eos_token_ids) == (
        theirs.pictures, theirs.generation, theirs.eos_token_ids,
    )  # fmt: skip
    for name in ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (TINY / name).read_bytes()


def test_the_error_is_measured(tmp_path: Path) -> None:
    manifests: dict[str, Manifest] = {
        method: build(TINY, tmp_path / method, recipe(method)) for method in ("none", "int8", "int4")
    }
    assert manifests["none"].error is None
    int8, int4 = manifests["int8"].error, manifests["int4"].error
    assert int8 is not None
    assert int4 is not None
    assert int8.keys() == {
        "greedy_agreement", "kl_divergence", "kl_divergence_max", "tokens", "weight_error", "weight_error_max",
    }  # fmt: skip
    assert int8["tokens"] == 8
    assert 0.004 < int8["weight_error"] <= int8["weight_error_max"] < 0.02
    assert 0.04 < int4["weight_error"] <= int4["weight_error_max"] < 0.2
    assert 0 < int8["kl_divergence"] < int4["kl_divergence"]


def test_a_build_is_always_the_same_byte_for_byte(tmp_path: Path) -> None:
    flags = ("--quantization", "int4", "--group-size", "64", "--load-on-cpu", "--max-seq-len", "1000")
    for name in ("first", "second"):
        result = foveate("build", TINY, "--output", tmp_path / name, *flags)
        assert result.returncode == 0, result.stderr
        assert "weight error max: " in result.stdout
        assert "greedy agreement: " in result.stdout
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    manifest = read_manifest(tmp_path / "first")
    assert (manifest.limits.max_seq_len, manifest.limits.max_input_len) == (1000, 999)
    assert manifest.quantization == Quantization(method="int4", group_size=64)


def test_random_weights_are_always_the_same_and_another_size_s_are_not_needed(tmp_path: Path) -> None:
    folder = without_weights(tmp_path / "model")
    for name in ("first", "second"):
        build(folder, tmp_path / name, recipe("int8", dummy=True))
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    manifest = read_manifest(tmp_path / "first")
    assert manifest.error is not None
    assert manifest.error.keys() == {"weight_error", "weight_error_max"}
    model = load_model(tmp_path / "first", CPU, torch.float32)
    assert {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()} == state_shapes(
        ModelConfig.from_folder(folder), Quantization(method="int8", group_size=GROUP), torch.float32
    )
    weight = model.language.layers[0].qkv_proj.dequantize()
    assert 0.019 < weight.std() < 0.021
    assert torch.equal(model.language.norm.weight, torch.ones(256))


def test_a_published_quantized_checkpoint_keeps_its_integers(tmp_path: Path) -> None:
    folder = without_weights(tmp_path / "model")
    how = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    change_json(
        folder / "config.json", quantization_config={**how, "modules_to_not_convert": ["vpm", "resampler", "lm_head"]}
    )
    weights = {name: t for path in TINY.glob("*.safetensors") for name, t in load_file(path).items()}
    for seed, name in enumerate(list(weights)):
        if name.startswith("llm.model.layers") and weights[name].dim() == 2:
            layer = random_layer(*weights.pop(name).shape, GROUP, seed)
            stem = name.removesuffix(".weight")
            weights |= {f"{stem}.{part}": torch.from_numpy(array) for part, array in awq_tensors(layer).items()}
    save_file(weights, folder / "model.safetensors")
    result = foveate("build", folder, "--output", tmp_path / "out", "--load-on-cpu", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.quantization.method, manifest.quantization.group_size) == ("int4", GROUP)
    assert manifest.error is None
    exact = load_model(folder, CPU, torch.float32).state_dict()
    found = load_model(tmp_path / "out", CPU, torch.float32).state_dict()
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in exact.items())
    result = foveate("build", folder, "--output", tmp_path / "other", "--quantization", "int8", "--load-on-cpu")
    assert result.returncode == 2
    assert "is quantized already" in result.stderr
    # Split, its integers go along under their names.
    result = foveate("split", folder, "--output", tmp_path / "split")
    assert result.returncode == 0, result.stderr
    language = load_file(tmp_path / "split" / "language" / "model-00001-of-00001.safetensors")
    packed = [name for name in weights if name.startswith("llm.") and name.endswith(("qweight", "qzeros", "scales"))]
    assert len(packed) == 3 * 7 * 3
    assert all(torch.equal(language[name.removeprefix("llm.")], weights[name]) for name in packed)
    config = json.loads((tmp_path / "split" / "language" / "config.json").read_text())
    assert config["quantization_config"] == {**how, "modules_to_not_convert": ["lm_head"]}


def test_a_head_that_shares_the_embeddings_is_stored_once(tmp_path: Path) -> None:
    folder = without_weights(tmp_path / "model", tie_word_embeddings=True)
    weights = {name: t for path in TINY.glob("*.safetensors") for name, t in load_file(path).items()}
    del weights["llm.lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    manifest = build(folder, tmp_path / "out", recipe())
    assert "language.lm_head.weight" not in stored(tmp_path / "out")
    assert manifest.parameters["language"] == sum(t.numel() for n, t in weights.items() if n.startswith("llm."))
    model = load_model(tmp_path / "out", CPU, torch.float32)
    assert model.language.lm_head.weight is model.language.embed_tokens.weight
    assert torch.equal(model.language.lm_head.weight, weights["llm.model.embed_tokens.weight"].float())


@pytest.fixture(scope="module")
def large_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A size whose building takes seconds."""
    return without_weights(tmp_path_factory.mktemp("size") / "large", intermediate_size=20000, num_hidden_layers=12)


def in_the_middle(output: Path, size: Path) -> subprocess.Popen[str]:
    """Start a build and wait until some megabytes of it are written."""
    process = started(
        "build",
        "--load-format",
        "dummy",
        "--config",
        size,
        "--output",
        output,
        "--quantization",
        "int8",
        "--load-on-cpu",
    )
    while not any(path.stat().st_size > MIB for path in output.parent.glob(".*.partial-*/*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def test_a_killed_build_leaves_no_directory_and_the_next_one_works(tmp_path: Path, large_size: Path) -> None:
    output = tmp_path / "out"
    with in_the_middle(output, large_size) as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    assert not (left / "engine.json").exists()
    result = foveate("build", TINY, "--output", output, "--load-on-cpu")
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["out"]
    load_model(output, CPU, torch.bfloat16)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, large_size: Path, number: signal.Signals) -> None:
    with in_the_middle(tmp_path / "out", large_size) as process:
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == 130, said
    assert os.listdir(tmp_path) == []


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    folder = large_checkpoint(tmp_path / "model")
    script = (
        "import re, sys\nfrom pathlib import Path\nimport torch\n"
        "from foveate.deploy.checkpoints import build\nimport foveate.checkpoint.build\n"
        "torch.empty(10).normal_()\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "foveate.checkpoint.build.MEASURED_BYTES = 0\n"
        "before = peak()\n"
        "build(sys.argv[1], output=Path(sys.argv[2]), quantization='int8', load_on_cpu=True)\n"
        "print(peak() - before)\n"
    )
    kibibytes = int(python(script, folder, tmp_path / "out").splitlines()[-1])
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written > 180 * MIB
    # Four million numbers are packed at a time, as float32 and several times: 120 to 200 MiB, as malloc reuses them.
    assert kibibytes < 260 * 1024


def test_an_engine_directory_is_replaced_by_force_and_nothing_else(tmp_path: Path) -> None:
    build(TINY, tmp_path / "out", recipe())
    with pytest.raises(ConfigError, match="exists"):
        build(TINY, tmp_path / "out", recipe("int8"))
    build(TINY, tmp_path / "out", recipe("int8"), force=True)
    assert read_manifest(tmp_path / "out").quantization.method == "int8"
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--force keeps it"):
        build(TINY, tmp_path / "out", recipe(), force=True)
    with pytest.raises(ConfigError, match="--force keeps it"):
        build(TINY, Path(shutil.copytree(TINY, tmp_path / "copy")), recipe(), force=True)


def test_an_engine_directory_is_no_checkpoint(tmp_path: Path) -> None:
    build(TINY, tmp_path / "out", recipe())
    for command in ("build", "split"):
        result = foveate(command, tmp_path / "out", "--output", tmp_path / "again")
        assert result.returncode == 3
        assert result.stderr.startswith(f"error: {tmp_path / 'out'}: is an engine directory")


def test_what_is_missing_is_found_before_anything_is_written(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    next(folder.glob("*-00003-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00004\.safetensors: is missing"):
        build(folder, tmp_path / "out", recipe())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        build(folder, tmp_path / "out", recipe())
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-seq-len", "40000"], "--max-seq-len: got 40000, and the model was trained for 32768 tokens at most"),
        (["--quantization", "int2"], "int2"),
        (["--quantize-vision"], "quantize_vision: got true, but nothing is quantized"),
        (["--quantization", "int4", "--group-size", "40"], "group_size: got 40, expected a multiple of 32"),
        (["--group-size", "0"], "--group-size: got 0, expected a multiple of 32"),
        (["--config", "minicpm-v-2_6"], "--config: only goes with --load-format dummy"),
        (["--load-on-cpu", "--device", "cuda"], "--load-on-cpu: does not go with --device cuda"),
        (["--device", "tpu"], "device: got 'tpu'"),
    ],
)
def test_impossible_wishes_are_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    result = foveate("build", TINY, "--output", tmp_path / "out", *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_the_real_size_is_refused_where_it_does_not_fit(small_disk: Path) -> None:
    flags = ("--load-format", "dummy", "--config", "minicpm-v-2_6", "--load-on-cpu")
    result = foveate("build", "--output", small_disk / "out", *flags)
    assert result.returncode == 1
    # As many bytes as the published checkpoint has, and some for the rest.
    needed = f"{16_198_350_304 + 16 * MIB:,}"
    assert result.stderr.startswith(f"error: {small_disk}: has ")
    assert f"bytes free, and {needed} are needed; " in result.stderr
    assert os.listdir(small_disk) == []
