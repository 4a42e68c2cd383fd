from __future__ import annotations

from pathlib import Path

import pytest

from foveate.config import ModelSettings
from foveate.deploy import resolve
from foveate.deploy.resolve import PRESETS, resolve_model
from foveate.errors import CheckpointError, ConfigError

TINY = Path(__file__).parents[1] / "golden" / "tiny" / "model"


def test_a_folder_is_served_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY.parent)
    model = resolve_model(ModelSettings(model="./model"))
    assert (model.folder, model.name) == (TINY, "model")


def test_another_name_can_be_chosen() -> None:
    assert resolve_model(ModelSettings(model=str(TINY), served_model_name="tiny")).name == "tiny"


def test_a_preset_is_the_folder_of_a_dummy() -> None:
    model = resolve_model(ModelSettings(load_format="dummy", config="minicpm-v-2_6"))
    assert (model.folder, model.name) == (PRESETS / "minicpm-v-2_6", "minicpm-v-2_6")


def test_a_folder_gives_the_size_of_a_dummy() -> None:
    model = resolve_model(ModelSettings(load_format="dummy", config=str(TINY)))
    assert model.folder == TINY


def test_an_unknown_preset_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'nope', expected a preset \(minicpm-v-2_6\)"):
        resolve_model(ModelSettings(load_format="dummy", config="nope"))


@pytest.mark.parametrize("name", ["./nope", "/nope/nope", "~/nope-nope", "a/b/c"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"there is no such folder$"):
        resolve_model(ModelSettings(model=name))


def test_a_file_is_no_folder() -> None:
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        resolve_model(ModelSettings(model=str(TINY / "config.json")))


def test_a_missing_demo_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resolve, "DEMO", tmp_path)
    with pytest.raises(CheckpointError, match="name a model"):
        resolve_model(ModelSettings())
