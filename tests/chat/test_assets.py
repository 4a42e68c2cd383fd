"""A checkpoint's small files: what is read of them, and how bad ones are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.chat.assets import GenerationDefaults, ModelAssets
from foveate.chat.pieces import TemplateText, UserText
from foveate.chat.template import Message, TextPart
from foveate.errors import CheckpointError

TINY = Path(__file__).parents[1] / "golden" / "tiny" / "model"
PRESET = Path(__file__).parents[2] / "foveate" / "models" / "presets" / "minicpm-v-2_6"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in TINY.glob("*.json"):
        shutil.copy(file, tmp_path)
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ``...`` removes one."""
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def test_the_published_checkpoint() -> None:
    assets = ModelAssets.from_folder(str(PRESET))
    assert assets.name == "minicpm-v-2_6"
    assert (assets.vocab_size, assets.hidden_size, assets.max_position_embeddings) == (151666, 3584, 32768)
    assert assets.eos_token_ids == [151645, 151643]
    pictures = assets.pictures
    assert (pictures.query_num, pictures.max_slice_nums, pictures.scale_resolution) == (64, 9, 448)
    assert (pictures.unk, pictures.im_id_end, pictures.use_image_id) == ("<unk>", "</image_id>", True)
    assert assets.generation == GenerationDefaults(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=100, repetition_penalty=1.05
    )


def test_without_generation_config_all_is_neutral(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assets = ModelAssets.from_folder(folder)
    assert assets.generation == GenerationDefaults(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    assert assets.eos_token_ids == [702]  # config.json's


def test_one_eos_token(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=700, top_k=...)
    assets = ModelAssets.from_folder(folder)
    assert assets.eos_token_ids == [700]
    assert assets.generation.top_k == 0


def test_a_template_file_wins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% broken")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: .*not valid Jinja"):
        ModelAssets.from_folder(folder)


def test_the_default_of_several_templates(folder: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "{% broken"},
        {"name": "default", "template": "{{ bos_token + messages[0].content }}"},
    ]
    edit(folder / "tokenizer_config.json", chat_template=templates, bos_token={"content": "<|im_start|>"})
    assets = ModelAssets.from_folder(folder)
    pieces = assets.template.render([Message("user", [TextPart("hi")])], assets.pictures)
    assert pieces == [TemplateText("<|im_start|>"), UserText("hi"), TemplateText("")]
    edit(folder / "tokenizer_config.json", chat_template=templates[:1])
    with pytest.raises(CheckpointError, match="chat_template is missing"):
        ModelAssets.from_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda file: file.write_bytes(b"{"), lambda file: file.write_bytes(b"[\xff]")]
)
def test_a_bad_file_is_named(folder: Path, name: str, spoil: Callable[[Path], Any]) -> None:
    spoil(folder / name)
    with pytest.raises(CheckpointError, match=name):
        ModelAssets.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("config.json", {"vocab_size": "723"}, "vocab_size"),
        ("config.json", {"hidden_size": ...}, "hidden_size"),
        ("config.json", {"max_position_embeddings": 0}, "max_position_embeddings"),
        ("config.json", {"vocab_size": 722}, "vocab_size 722"),
        ("config.json", {"query_num": 32}, "image_feature_size 64 is not .* query_num 32"),
        ("generation_config.json", {"eos_token_id": 9999}, "eos_token_id 9999"),
        ("generation_config.json", {"temperature": -1}, "temperature"),
        ("generation_config.json", {"top_p": "high"}, "top_p"),
        ("tokenizer_config.json", {"chat_template": ...}, "chat_template"),
        ("preprocessor_config.json", {"image_feature_size": ...}, "image_feature_size"),
        ("preprocessor_config.json", {"slice_start": "<piece>"}, "slice_start '<piece>'"),
    ],
)
def test_a_bad_key_is_named(folder: Path, name: str, changes: dict[str, Any], complaint: str) -> None:
    edit(folder / name, **changes)
    with pytest.raises(CheckpointError, match=complaint):
        ModelAssets.from_folder(folder)


def test_an_answer_must_end_somehow(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=...)
    edit(folder / "config.json", eos_token_id=...)
    with pytest.raises(CheckpointError, match="eos_token_id is missing"):
        ModelAssets.from_folder(folder)


def test_torch_is_not_imported() -> None:
    modules = "foveate.chat.assets, foveate.media.fetch, foveate.media.image"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
