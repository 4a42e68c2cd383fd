"""The parts of a split checkpoint: what transformers makes of the one, and what is in the other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import change_json, contents, foveate, large_checkpoint, python
from golden_data import CASES, TINY, tensors
from safetensors.torch import load_file, save_file

from foveate.chat.assets import ModelAssets
from foveate.checkpoint.load import load_model
from foveate.checkpoint.split import qwen2_config, split
from foveate.checkpoint.verify import OwnModel
from foveate.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")
MIB = 2**20


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's folder, by its name."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in set(index.values()):
        found |= load_file(folder / file)
    assert found.keys() == index.keys()
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("split") / "out"
    result = foveate("split", TINY, "--output", output, "--shard-size", "1MB")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^Wrote .*/out: 0\.00 GB in [\d.]+ s \(\d+ MB/s\)$", result.stdout, re.MULTILINE)
    return output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_tensor_is_in_one_part_as_it_was(parts: Path) -> None:
    whole = all_tensors(TINY)
    language, vision = all_tensors(parts / "language"), all_tensors(parts / "vision")
    found = {f"llm.{name}": tensor for name, tensor in language.items()} | vision
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in whole.items())
    assert all(name.startswith(("vpm.", "resampler.")) for name in vision)
    assert all(name.startswith("model.") or name == "lm_head.weight" for name in language)
    sizes = [path.stat().st_size for path in parts.rglob("*.safetensors")]
    assert len(sizes) >= 4
    assert max(sizes) < 1.1e6


def test_the_vision_part_has_its_configurations(parts: Path) -> None:
    files = {name: data for name, data in contents(parts / "vision").items() if "model" not in name}
    assert files == {name: (TINY / name).read_bytes() for name in ("config.json", "preprocessor_config.json")}


@pytest.mark.usefixtures("threads")
def test_transformers_loads_the_language_model_and_gets_the_same_logits_and_answers(parts: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    theirs, report = AutoModelForCausalLM.from_pretrained(
        parts / "language", dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert type(theirs).__name__ == "Qwen2ForCausalLM"
    assert isinstance(theirs.generation_config, GenerationConfig)
    assert theirs.generation_config.eos_token_id == [702, 700]
    ours = OwnModel(load_model(TINY, CPU, torch.float32))
    for case in ("text_only", "bang_text"):
        ids = tensors(case)["input_ids"]
        with torch.inference_mode():
            expected = theirs.eval()(ids[None]).logits[0]
            found = ours.logits(ids.tolist(), [], torch.empty(0), len(ids))
        assert (expected - found).abs().max() < 1e-4
        greedy = tensors(case).get("greedy_ids_fullmask", tensors(case)["greedy_ids"])
        answer = theirs.generate(
            ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=len(greedy), do_sample=False,
            repetition_penalty=1.0, eos_token_id=-1, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        assert answer[0, len(ids) :].tolist() == greedy.tolist()


def test_transformers_tokenizer_gives_the_same_ids(parts: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(parts / "language", local_files_only=True)
    ours = ModelAssets.from_folder(TINY).tokenizer
    texts = ["Hello, world! 12345", "  左上角是什么？\n\n", "def f(x):\n\treturn x", "ÄÖÜ éè 😀"]
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode_text(text), text
    prompt = theirs.apply_chat_template(
        CASES["text_only"]["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert prompt == tensors("text_only")["input_ids"].tolist()
    assert theirs.convert_tokens_to_ids("<image>") == ours.token_id("<image>")


def test_the_configuration_has_what_qwen2_knows_and_nothing_else(parts: Path) -> None:
    from transformers import Qwen2Config

    config = json.loads((parts / "language" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Qwen2ForCausalLM"], "qwen2")
    # Of transformers before version 5; the newer one reads them as well.
    older = {"rope_theta", "rope_scaling", "torch_dtype"}
    assert config.keys() <= Qwen2Config().to_dict().keys() | older
    known = Qwen2Config.from_pretrained(parts / "language")
    assert known.rope_parameters["rope_theta"] == 1e6
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(known, key) == config[key] == json.loads((TINY / "config.json").read_text())[key]
    tokenizer = json.loads((parts / "language" / "tokenizer_config.json").read_text())
    assert "auto_map" not in tokenizer
    assert tokenizer["chat_template"] == json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]


def test_what_is_there_stays(parts: Path) -> None:
    before = contents(parts)
    result = foveate("split", TINY, "--output", parts)
    assert result.returncode == 2
    assert result.stderr == f"error: --output: {parts} exists; name another folder, or replace it with --force\n"
    assert contents(parts) == before


def test_force_replaces_a_split_and_nothing_else(tmp_path: Path) -> None:
    split(TINY, tmp_path / "out", shard_bytes=MIB)
    split(TINY, tmp_path / "out", shard_bytes=2**30, force=True)
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 2
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--force keeps it"):
        split(TINY, tmp_path / "out", shard_bytes=2**30, force=True)


def test_tied_embeddings(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"].pop("llm.lm_head.weight")
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "llm.lm_head.weight"}, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: llm\.lm_head\.weight"):
        split(folder, tmp_path / "out", shard_bytes=MIB)
    assert not (tmp_path / "out").exists()
    change_json(folder / "config.json", tie_word_embeddings=True)
    split(folder, tmp_path / "out", shard_bytes=MIB)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "language", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, all_tensors(folder)["llm.model.embed_tokens.weight"].float())


def test_what_does_not_belong_is_named(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "vpm.post_layernorm.weight"
    path = folder / index["weight_map"][name]
    save_file({**load_file(path), "audio.weight": torch.zeros(2)}, path)
    index["weight_map"]["audio.weight"] = path.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{path.name}: tensor audio\.weight does not belong"):
        split(folder, tmp_path / "out", shard_bytes=MIB)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer_config.json", "config.json"])
def test_a_missing_file_is_named_and_nothing_is_left(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read"):
        split(folder, tmp_path / "out", shard_bytes=MIB)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_settings_of_a_quantization_go_with_the_language_model_and_lose_the_prefix() -> None:
    raw = {
        "vocab_size": 10, "vision_config": {}, "query_num": 64,
        "quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True,
            "modules_to_not_convert": ["vpm", "resampler", "llm.lm_head"],
            "block_name_to_quantize": "llm.model.layers",
        },
    }  # fmt: skip
    config = qwen2_config(raw)
    assert config["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True,
        "modules_to_not_convert": ["lm_head"], "block_name_to_quantize": "model.layers",
    }  # fmt: skip
    raw["quantization_config"] = {"modules_to_not_convert": ["vpm", "resampler"]}
    assert qwen2_config(raw)["quantization_config"] == {"modules_to_not_convert": None}
    assert not {"vision_config", "query_num"} & config.keys()


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    folder = large_checkpoint(tmp_path / "model")
    script = (
        "import re, sys\nfrom pathlib import Path\nfrom foveate.checkpoint.split import split\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "split(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes=2**30)\n"
        "print(peak() - before)\n"
    )
    kibibytes = int(python(script, folder, tmp_path / "out"))
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    assert written > 350 * MIB
    assert kibibytes < 40 * 1024


def test_bad_flags(tmp_path: Path) -> None:
    for size in ("4 gigs", "0", "4 XB"):
        result = foveate("split", TINY, "--output", tmp_path / "out", "--shard-size", size)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: --shard-size: got '{size}', expected ")
    assert foveate("split", TINY).returncode == 2
    assert foveate("split", tmp_path / "nowhere", "--output", tmp_path / "out").returncode == 3
