"""Quantized models behind a real server: from a checkpoint and from an engine directory, or refused."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import ROOT, RunningServer, running_server

PICTURE = ROOT / "foveate" / "demo" / "pictures" / "shapes.png"


def foveate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "foveate.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=80)


def described(server: RunningServer) -> str:
    """What the model says about the sample picture."""
    url = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many shapes are there?"}]
    body = {"model": server.model, "messages": [{"role": "user", "content": parts}], "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as an engine directory, both parts in 8-bit integers."""
    folder = tmp_path_factory.mktemp("built") / "engine"
    flags = ("--quantization", "int8", "--quantize-vision", "--dtype", "float32", "--load-on-cpu")
    done = foveate("build", "--output", str(folder), *flags)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("method", ["int8", "fp8", "int4"])
def test_the_demo_model_still_counts(method: str, tmp_path: Path) -> None:
    with running_server(tmp_path, "--quantization", method, "--quantize-vision", model=None) as server:
        assert described(server) == "There are 4 shapes."


def test_an_engine_directory_is_served(engine: Path, tmp_path: Path) -> None:
    with running_server(tmp_path, model=engine) as server:
        assert described(server) == "There are 4 shapes."


def test_what_is_quantized_is_not_quantized_again(engine: Path) -> None:
    done = foveate("serve", str(engine), "--quantization", "int4", "--device", "cpu", "--port", "0")
    assert done.returncode == 2
    assert "is quantized already (int8, the vision encoder too) and cannot become int4 in groups of 128" in done.stderr
