"""Engine directories: what was streamed into them comes back, and whatever does not fit is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from golden_data import TINY
from safetensors.torch import load_file, save_file

from foveate.checkpoint.engine import FORMAT, MANIFEST, FileRecord, Limits, Manifest, Source, is_engine, read_manifest
from foveate.checkpoint.files import ENGINE_INDEX
from foveate.checkpoint.identity import identity
from foveate.checkpoint.load import Part, load_model, stream_parameters
from foveate.checkpoint.place import pick_quantization
from foveate.config import ModelSettings
from foveate.errors import CheckpointError, ConfigError
from foveate.quantization.scheme import Method, Quantization

torch.set_num_threads(1)
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HOWS = [
    Quantization(),
    Quantization(method="int8", vision=True),
    Quantization(method="fp8"),
    Quantization(method="int4", group_size=32, keep=("lm_head",)),
]
NAME = "language.layers.1.gate_up_proj.qweight"
SHARDS = {"language": "engine-00001-of-00002.safetensors", "vision": "engine-00002-of-00002.safetensors"}
Tensors = dict[str, torch.Tensor]


def write(folder: Path, how: Quantization, dtype: str = "float32", source: Path = TINY) -> Path:
    """Write an engine directory of two files. Their hashes are made up: nobody checks them while loading."""
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(source / name, folder)
    files = {}
    for part, file in SHARDS.items():
        tensors = dict(stream_parameters(source, DTYPES[dtype], part=part, quantization=how))  # type: ignore[arg-type]
        save_file(tensors, folder / file)
        files[file] = FileRecord(bytes=(folder / file).stat().st_size, sha256=part * 8)
    limits = Limits(max_batch_size=1, max_input_len=1, max_seq_len=2, max_num_tokens=1, max_image_tokens=1)
    manifest = Manifest(
        format=FORMAT, foveate="0", model_type="minicpmv", dtype=dtype, quantization=how, limits=limits, parameters={},
        error=None, source=Source(name="x", identity="y"), files=files,
    )  # fmt: skip
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    reindex(folder)
    return folder


def reindex(folder: Path) -> None:
    weight_map = {name: file for file in SHARDS.values() for name in load_file(folder / file)}
    (folder / ENGINE_INDEX).write_text(json.dumps({"weight_map": weight_map}))


def change_shard(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / SHARDS["language"])
    change(tensors)
    save_file(tensors, folder / SHARDS["language"])
    reindex(folder)


def change_manifest(folder: Path, **values: Any) -> None:
    manifest = msgspec.structs.replace(read_manifest(folder), **values)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def states_agree(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("part", ["all", "language", "vision"])
def test_it_is_the_checkpoint_it_was_built_from(how: Quantization, part: Part, tmp_path: Path) -> None:
    folder = write(tmp_path / "engine", how)
    calls: list[tuple[int, int]] = []
    loaded = load_model(folder, CPU, torch.float32, part=part, progress=lambda *call: calls.append(call))
    expected = load_model(TINY, CPU, torch.float32, part=part, quantization=how)
    for name in ("language", "vision") if part == "all" else (part,):
        assert states_agree(loaded.get_submodule(name), expected.get_submodule(name))
    count = sum(len(load_file(folder / file)) for name, file in SHARDS.items() if part in ("all", name))
    assert calls == [(done, count) for done in range(1, count + 1)]


def test_only_what_is_not_quantized_becomes_another_type(tmp_path: Path) -> None:
    how = Quantization(method="int8")
    loaded = load_model(write(tmp_path / "engine", how, "bfloat16"), CPU, torch.float32)
    assert loaded.language.norm.weight.dtype == loaded.language.layers[0].qkv_proj.bias.dtype == torch.float32
    exact = load_model(TINY, CPU, torch.float32, quantization=how)
    assert torch.equal(loaded.language.lm_head.scale, exact.language.lm_head.scale)
    assert torch.equal(loaded.language.embed_tokens.weight, exact.language.embed_tokens.weight.bfloat16().float())


def test_a_shared_head(tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "tied"))
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    tensors = {name: t for shard in TINY.glob("*.safetensors") for name, t in load_file(shard).items()}
    del tensors["llm.lm_head.weight"]
    (source / "model.safetensors.index.json").unlink()
    save_file(tensors, source / "model.safetensors")
    plain = load_model(write(tmp_path / "plain", Quantization(), source=source), CPU, torch.float32)
    assert plain.language.lm_head.weight is plain.language.embed_tokens.weight
    how = Quantization(method="int8")
    packed = load_model(write(tmp_path / "packed", how, source=source), CPU, torch.float32)
    assert states_agree(packed, load_model(source, CPU, torch.float32, quantization=how))


def test_an_unquantized_one_can_be_quantized_while_loading(tmp_path: Path) -> None:
    how = Quantization(method="int8")
    loaded = load_model(write(tmp_path / "engine", Quantization()), CPU, torch.float32, quantization=how)
    assert states_agree(loaded, load_model(TINY, CPU, torch.float32, quantization=how))


def test_what_config_json_says_of_the_source_does_not_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "engine", Quantization(method="int4", group_size=64, keep=("lm_head",)))
    raw = json.loads((folder / "config.json").read_text())
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": awq}))
    load_model(folder, CPU, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), rf"1 tensors are missing: {NAME}"),
        (lambda t: t.update({"language.extra": torch.ones(1)}), r"language\.extra does not belong to a minicpmv"),
        (lambda t: t.update({NAME: t[NAME][:-1].clone()}), rf"{NAME} has shape \[383, 256\], expected \[384, 256\]"),
        (lambda t: t.update({NAME: t[NAME].short()}), rf"{NAME} holds I16, expected I8"),
        (lambda t: t.update({"language.norm.weight": torch.ones(256).half()}), r"norm\.weight holds F16, expected F32"),
        (
            lambda t: t.update({"language.layers.1.gate_up_proj.weight": torch.ones(384, 256)}),
            r"gate_up_proj\.weight does not belong",
        ),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[Tensors], object], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "engine", Quantization(method="int8"))
    change_shard(folder, change)
    parts: list[Part] = ["all", "language", "vision"]
    for part in parts:
        with pytest.raises(CheckpointError, match=message):
            load_model(folder, CPU, torch.float32, part=part)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float16"}, r"engine\.json: dtype is 'float16', expected float32 or bfloat16"),
        ({"dtype": "bfloat16"}, r"holds F32, expected BF16"),
        ({"model_type": "llava"}, r"engine\.json: model_type is 'llava', expected minicpmv"),
        ({"quantization": Quantization(method="int8", keep=("x",))}, r"engine\.json: quantization: keep names 'x'"),
        ({"quantization": Quantization(method="int4", group_size=7)}, r"engine\.json: quantization_group_size: got 7"),
        ({"quantization": Quantization(method="int4")}, r"scale has shape"),
    ],
)
def test_manifests_that_do_not_fit(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "engine", Quantization(method="int8"))
    change_manifest(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, CPU, torch.float32)


def test_an_index_is_needed(tmp_path: Path) -> None:
    folder = write(tmp_path / "engine", Quantization())
    (folder / ENGINE_INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"engine\.safetensors\.index\.json"):
        load_model(folder, CPU, torch.float32)


def test_it_cannot_be_quantized_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "engine", Quantization(method="int8", keep=("lm_head",)))
    methods: list[Method] = ["none", "fp8", "int4"]
    for method in methods:
        with pytest.raises(ConfigError, match=r"is quantized already \(int8\) and cannot become"):
            load_model(folder, CPU, torch.float32, quantization=Quantization(method=method))
    stored = pick_quantization(ModelSettings(), folder)
    assert stored == pick_quantization(ModelSettings(quantization="int8"), folder) == read_manifest(folder).quantization
    load_model(folder, CPU, torch.float32, quantization=Quantization(method="int8"))


def test_its_name_says_how_it_is_quantized(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(number), how) for number, how in enumerate(HOWS)]
    assert all(is_engine(folder) for folder in folders)
    names = {identity(folder, dummy=False) for folder in (*folders, TINY)}
    assert len(names) == len(HOWS) + 1
    copy = Path(shutil.copytree(folders[1], tmp_path / "elsewhere"))
    assert identity(copy, dummy=False) == identity(folders[1], dummy=False)
    record = FileRecord(bytes=(copy / SHARDS["vision"]).stat().st_size, sha256="0" * 64)
    change_manifest(copy, files=read_manifest(copy).files | {SHARDS["vision"]: record})
    assert identity(copy, dummy=False) != identity(folders[1], dummy=False)


def test_a_file_that_the_manifest_does_not_know_has_no_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "engine", Quantization())
    with (folder / SHARDS["vision"]).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=rf"{SHARDS['vision']}: is not the file that engine\.json names"):
        identity(folder, dummy=False)
    change_manifest(folder, files={})
    with pytest.raises(CheckpointError, match=rf"{SHARDS['language']}: is not the file that engine\.json names"):
        identity(folder, dummy=False)
