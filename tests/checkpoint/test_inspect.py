"""What ``inspect`` says of each kind of folder, and what it notices."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ENVIRONMENT, foveate
from golden_data import TINY
from serving import ROOT

from foveate.checkpoint.build import Recipe, build
from foveate.checkpoint.engine import Limits
from foveate.checkpoint.hashes import check_files
from foveate.checkpoint.inspect import inspect
from foveate.checkpoint.load import load_model
from foveate.checkpoint.memory import CPU_CACHE_BATCHES, GPU_CACHE_BATCHES, Machine, gpu_of
from foveate.checkpoint.split import split
from foveate.config import EngineSettings
from foveate.engine import runner
from foveate.errors import CheckpointError
from foveate.quantization.scheme import Quantization

CPU = torch.device("cpu")
GIB = 2**30
LIMITS = Limits(max_batch_size=2, max_input_len=500, max_seq_len=1024, max_num_tokens=256, max_image_tokens=400)
PRESET = ROOT / "foveate" / "models" / "presets" / "minicpm-v-2_6"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engine") / "out"
    quantization = Quantization(method="int8")
    build(TINY, output, Recipe(quantization=quantization, dtype="float32", limits=LIMITS, device=CPU))
    return output


def as_json(*args: str | Path) -> dict[str, Any]:
    """What the command says, as JSON."""
    result = foveate("inspect", *args, "--json")
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def on_cpu(memory: int) -> Machine:
    return Machine(device="cpu", memory_bytes=memory, free_bytes=memory, is_gpu=False)


def test_a_published_checkpoint() -> None:
    report = as_json(TINY, "--gpu-memory", "24GiB")
    assert (report["kind"], report["model_type"]) == ("checkpoint", "minicpmv")
    assert report["architecture"]["language"]["hidden_size"] == 256
    assert report["architecture"]["vision"]["num_hidden_layers"] == 3
    assert report["quantization"] == {"method": "none"}
    model = load_model(TINY, CPU, torch.bfloat16)
    for part in ("language", "vision"):
        count = sum(parameter.numel() for parameter in model.get_submodule(part).parameters())
        assert report["parts"][part]["parameters"] == count
        assert report["parts"][part]["bytes"] == sum(report["parts"][part]["bytes_by_dtype"].values())
    assert report["limits"] is report["error"] is report["hashes"] is None
    gpu = report["memory"][-1]
    assert gpu["machine"]["memory_bytes"] == 24 * GIB
    assert gpu["weights"] == {name: part["parameters"] * 2 for name, part in report["parts"].items()}
    assert gpu["kv_tokens"] == gpu["kv_blocks"] * 64
    assert gpu["fits"]


def test_an_engine_directory(engine: Path) -> None:
    report = as_json(engine)
    assert report["kind"] == "engine directory"
    assert (report["dtype"], report["quantization"]["method"]) == ("float32", "int8")
    assert report["limits"]["max_seq_len"] == 1024
    assert report["source"]["name"] == "model"
    assert report["error"]["weight_error"] > 0
    assert report["hashes"] == []
    assert report["parts"]["language"]["parameters"] == as_json(TINY)["parts"]["language"]["parameters"]
    sizes = report["parts"]["language"]["bytes_by_dtype"]
    assert sizes["I8"] > sizes["F32"]
    [*_, plan] = report["memory"]
    assert plan["weights"]["language"] == report["parts"]["language"]["bytes"]
    assert plan["kv_blocks"] == CPU_CACHE_BATCHES * 2 * 64


def test_tables(engine: Path) -> None:
    result = foveate("inspect", engine, "--gpu-memory", "24GiB")
    assert result.returncode == 0, result.stderr
    for text in (
        f"{engine}: engine directory of minicpmv",
        "quantization  int8",
        "max_batch_size 2, max_input_len 500, max_seq_len 1,024, max_num_tokens 256, max_image_tokens 400",
        "built from    model (",
        "gpu (24.0 GiB free)",
        "tokens that they hold",
        "All files match their hashes.",
    ):
        assert text in result.stdout
    result = foveate("inspect", engine, "--no-hashes")
    assert "hashes" not in result.stdout
    assert "dtype         bfloat16" in foveate("inspect").stdout


def test_the_parts_of_a_split(tmp_path: Path) -> None:
    split(TINY, tmp_path / "out", shard_bytes=GIB)
    whole = inspect(TINY, [])
    language, vision = (inspect(tmp_path / "out" / part, []) for part in ("language", "vision"))
    assert (language.kind, language.model_type) == ("language part", "qwen2")
    assert language.parts == {"language": whole.parts["language"]}
    assert language.architecture == {"language": whole.architecture["language"]}
    assert (vision.kind, vision.model_type) == ("vision part", "minicpmv")
    assert vision.parts == {"vision": whole.parts["vision"]}
    assert inspect(tmp_path / "out" / "language", [on_cpu(GIB)]).memory == []


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "copy"))


def test_a_changed_byte_is_found_and_its_file_named(copy: Path) -> None:
    path = copy / "engine-00002-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = foveate("inspect", copy)
    assert result.returncode == 3
    assert result.stderr.startswith(f"error: {path}: has the SHA-256 ")
    assert result.stderr.count("\n") == 1
    assert "All files match" not in result.stdout
    assert foveate("inspect", copy, "--no-hashes").returncode == 0
    report = json.loads(foveate("inspect", copy, "--json").stdout)
    assert len(report["hashes"]) == 1


def test_all_that_is_wrong_is_said_at_once(copy: Path) -> None:
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    (copy / "tokenizer.json").unlink()
    (copy / "chat_template.jinja").write_text("{{ surprise }}")
    (copy / "engine.safetensors.index.json").rename(copy / "sub")
    result = foveate("inspect", copy)
    assert result.returncode == 3
    lines = [line.removeprefix(f"error: {copy}/") for line in result.stderr.splitlines()]
    assert [line.split(":")[0] for line in lines] == [
        "chat_template.jinja", "sub", "config.json", "engine.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    assert lines[0] == "chat_template.jinja: is not one of the files of engine.json"
    assert lines[2] == "config.json: has 1,324 bytes instead of 1,323"
    assert lines[3] == "engine.safetensors.index.json: is missing"


def test_hashing_says_how_far_it_is(engine: Path) -> None:
    from foveate.checkpoint.engine import read_manifest

    manifest = read_manifest(engine)
    calls: list[tuple[int, int]] = []
    assert check_files(engine, manifest, lambda *count: calls.append(count)) == []
    total = sum(record.bytes for record in manifest.files.values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        inspect(tmp_path, [])
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        inspect(tmp_path, [])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is missing"):
        inspect(tmp_path, [])


def test_bad_sizes() -> None:
    result = foveate("inspect", TINY, "--gpu-memory", "lots")
    assert result.returncode == 2
    assert result.stderr == "error: --gpu-memory: got 'lots', expected a number of bytes, such as 4GiB\n"


def test_torch_is_not_needed(engine: Path) -> None:
    script = (
        "import sys\nfrom foveate.cli import main\n"
        "try:\n    main(['inspect', sys.argv[1]])\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(engine)]
    assert subprocess.run(command, env=ENVIRONMENT, check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_the_plan_is_the_engine_s(engine: Path) -> None:
    [plan] = inspect(engine, [on_cpu(8 * GIB)]).memory
    settings = EngineSettings(max_batch_size=2, max_num_tokens=256)
    made = runner.ModelRunner(load_model(engine, CPU, torch.float32).language, settings, 1024)
    assert (made.num_blocks, made.block_size) == (plan.kv_blocks, 16)
    assert made.kv_cache.nbytes == plan.kv_blocks * plan.kv_block
    weights = sum(t.nbytes for t in load_model(engine, CPU, torch.float32).state_dict().values())
    assert weights == sum(plan.weights.values())


def test_what_does_not_fit() -> None:
    little, more, enough = inspect(TINY, [gpu_of(GIB), gpu_of(4 * GIB), gpu_of(80 * GIB)]).memory
    assert (little.kv_blocks, little.fits) == (0, False)
    assert 0 < more.kv_blocks < enough.kv_blocks
    assert enough.kv_blocks == GPU_CACHE_BATCHES * 8 * 512
