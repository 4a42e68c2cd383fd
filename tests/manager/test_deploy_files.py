"""The systemd unit, the Dockerfile and the compose file, as far as they can be checked without running them."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from deploy_files import DEPLOY, dockerfile
from serving import ROOT

from foveate.cli import EXIT_INTERRUPTED
from foveate.config import HttpSettings
from foveate.deploy.fields import flags
from foveate.errors import CheckpointError, ConfigError

HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that is there."""
    path = tmp_path / "foveate.service"
    path.write_text((DEPLOY / "foveate.service").read_text().replace("/opt/foveate/bin/foveate", "/bin/true"))
    return path


def service() -> dict[str, str]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "foveate.service")
    return dict(parser["Service"])


@needs_systemd
def test_systemd_understands_the_unit(unit: Path) -> None:
    result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=gently"))
    result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "gently" in result.stderr


@needs_systemd
def test_systemd_finds_the_unit_well_confined(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(unit)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in result.stderr:
        pytest.skip("this systemd-analyze cannot judge a unit that is not loaded")
    assert result.returncode == 0, result.stdout


def test_the_unit_fits_the_server() -> None:
    values = service()
    # It has to have the time that the server takes to drain and to end its children.
    assert float(values["TimeoutStopSec"]) >= HttpSettings().shutdown_seconds + 15
    assert values["KillMode"] == "mixed"
    assert values["RestartPreventExitStatus"].split() == [
        str(ConfigError.exit_status),
        str(CheckpointError.exit_status),
    ]
    assert EXIT_INTERRUPTED not in map(int, values["RestartPreventExitStatus"].split())
    assert values["DynamicUser"] == values["NoNewPrivileges"] == "yes"


def words(name: str) -> list[str]:
    return [one.rest for one in dockerfile() if one.word == name]


def test_the_dockerfile_has_known_instructions_in_order() -> None:
    instructions = dockerfile()
    known = {
        "ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
        "ENTRYPOINT", "CMD",
    }  # fmt: skip
    assert {one.word for one in instructions} <= known
    assert [one.word for one in instructions][:2] == ["ARG", "FROM"]
    for word in ("HEALTHCHECK", "ENTRYPOINT", "CMD", "STOPSIGNAL"):
        assert len(words(word)) == 1


def test_the_container_is_nobodys_root() -> None:
    last_stage = [one.word for one in dockerfile()]
    last_stage = last_stage[len(last_stage) - last_stage[::-1].index("FROM") :]
    assert words("USER") == ["10001"]
    assert last_stage.index("USER") < last_stage.index("ENTRYPOINT")
    assert "useradd --system --uid 10001" in words("RUN")[-1]


def test_images_and_packages_are_not_whatever_is_newest() -> None:
    for image in words("FROM"):
        tag = image.split()[0].partition(":")[2]
        assert tag
        assert tag != "latest"
    for command in words("RUN"):
        if "apt-get install" in command:
            assert "--no-install-recommends" in command
            assert "rm -rf /var/lib/apt/lists" in command
        if "pip install" in command:
            assert "--no-cache-dir" in command
        assert "sudo" not in command


def test_programs_are_started_without_a_shell() -> None:
    for text in (*words("ENTRYPOINT"), *words("CMD"), words("HEALTHCHECK")[0].partition("CMD ")[2]):
        arguments = json.loads(text)
        assert all(isinstance(argument, str) for argument in arguments)
    assert json.loads(words("ENTRYPOINT")[0]) == ["foveate"]


def test_what_is_copied_and_set_exists() -> None:
    (sources,) = [rest.split()[:-1] for rest in words("COPY") if rest.startswith("pyproject")]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    for name in (*sources, "foveate"):
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    names = {flag.environment for flag in flags()}
    used = set(re.findall(r"\bFOVEATE_[A-Z_]+", (DEPLOY / "Dockerfile").read_text()))
    assert used
    assert used <= names


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint")
def test_hadolint_finds_nothing() -> None:
    # DL3008: the packages come from the builder's command line.
    assert HADOLINT is not None
    command = [HADOLINT, "--ignore", "DL3008", str(DEPLOY / "Dockerfile")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_compose_file_fits_the_dockerfile() -> None:
    (one,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    assert (DEPLOY / one["build"]["context"]).resolve() == ROOT
    assert (ROOT / one["build"]["dockerfile"]).is_file()
    assert set(one["environment"]) <= {flag.environment for flag in flags()}
    assert one["ports"] == [f"127.0.0.1:{words('EXPOSE')[0]}:{words('EXPOSE')[0]}"]
    volume, folder = one["volumes"][0].split(":")
    assert folder in words("VOLUME")
    assert volume == "hub"
