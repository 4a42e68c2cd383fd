"""The script that sends thousands of requests: that it sends them, notices what fails, and judges what it saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from serving import ROOT, TINY_MODEL

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("memory_samples")


@pytest.mark.parametrize(
    ("name", "values", "ok"),
    [
        ("engine: resident", (100, 120, 129), True),
        ("engine: resident", (100, 90, 131), False),
        ("engine: resident", (1000, 1020, 1049), True),
        ("engine: resident", (1000, 1020, 1051), False),
        ("engine: GPU", (70_000, 70_010, 70_060), True),
        ("GPU 0", (70_000, 70_010, 70_070), False),
        ("GPU 0", (70_000, 70_010, 69_900), False),
    ],
)
def test_bytes_that_may_come_on_top(samples: ModuleType, name: str, values: tuple[int, ...], ok: bool) -> None:
    idle = [samples.Sample(0.0, 0, {name: value * 2**20}) for value in values]
    [verdict] = samples.judge(idle)
    assert (verdict.name, verdict.ok) == (name, ok)


def test_nothing_may_stay_in_use(samples: ModuleType) -> None:
    def is_ok(*values: float) -> bool:
        [verdict] = samples.judge([samples.Sample(0.0, 0, {"KV blocks in use": value}) for value in values])
        return bool(verdict.ok)

    assert is_ok(3, 0, 0)
    assert not is_ok(3, 3, 3)
    assert not samples.judge([samples.Sample(0, 0, {"arena blocks in use": 0.0}), samples.Sample(0, 0, {})])[0].ok


def test_a_short_run(tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    command = [sys.executable, str(FOLDER / "memory.py"), "--json", str(output)]
    command += ["--requests", "24", "--clients", "4", "--settle", "0"]
    flags = ["--model", str(TINY_MODEL), "--device", "cpu", "--num-kv-blocks", "512", "--max-batch-size", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": "", "TMPDIR": "/tmp"}
    result = subprocess.run([*command, *flags], env=environment, check=False, capture_output=True, text=True)
    found = json.loads(output.read_text())
    # Of so few requests none is a warm-up: the memory may still grow.
    assert result.returncode == (0 if found["ok"] else 1), result.stderr
    assert found["requests"] == sum(found["ends"].values()) == 24
    assert found["wrong"] == {}
    assert "200" in found["ends"]
    assert set(found["ends"]) <= {"200", "400", "503", "given up"}
    verdicts = {verdict["name"]: verdict for verdict in found["verdicts"]}
    assert {f"{name}: resident" for name in ("API", "engine", "vision")} <= set(verdicts)
    for name in ("KV blocks in use", "arena blocks in use"):
        assert verdicts[name]["ok"]
