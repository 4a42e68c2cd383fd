"""The command as it is typed: what it imports, what it says, and how it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import foveate
from foveate.cli import app
from foveate.deploy.flags import flags

EXIT_CONFIG, EXIT_CHECKPOINT = 2, 3  # As the README tells them.
ROOT = Path(foveate.__file__).parent.parent
TINY = Path(__file__).parent / "golden" / "tiny" / "model"


def foveate_command(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FOVEATE_")}
    return subprocess.run(
        [sys.executable, "-m", "foveate.cli", *args],
        env={**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "300", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def modules_after(*args: str) -> set[str]:
    script = (
        "import sys\nfrom foveate.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stderr.split())


def test_help_imports_nothing_heavy() -> None:
    modules = modules_after("--help")
    assert "foveate.cli" in modules
    assert not modules & {
        "torch",
        "numpy",
        "pydantic",
        "fastapi",
        "uvicorn",
        "httpx",
        "PIL",
        "foveate.config",
    }


def test_help_of_serve_imports_no_torch() -> None:
    modules = modules_after("serve", "--help")
    assert "foveate.deploy.serve" in modules
    assert not modules & {"torch", "numpy", "fastapi"}


def test_help_names_every_command() -> None:
    result = foveate_command("--help")
    assert result.returncode == 0
    for command in ("serve", "build", "start", "stop", "doctor", "bench", "version"):
        assert f" {command} " in result.stdout


def test_help_of_a_command_is_its_whole_text() -> None:
    result = foveate_command("reload", "--help")
    assert "A second server is started beside the one that runs" in result.stdout
    assert "Exit codes: 0 done" in result.stdout


def test_version_is_the_same_both_ways() -> None:
    flag, command = foveate_command("--version"), foveate_command("version")
    assert flag.returncode == command.returncode == 0
    assert flag.stdout.split()[0] == "foveate"
    assert flag.stdout.strip() == command.stdout.strip()


def test_every_flag_is_in_the_help_with_its_variable() -> None:
    text = foveate_command("serve", "--help").stdout
    for flag in flags():
        if flag.field == "listen":
            # Only a vision service by itself listens for others.
            assert flag.name not in text
            continue
        assert flag.name in text
        assert flag.environment in text
        assert flag.help.split(".")[0].split("\n")[0] in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-seq-len", "x"], "error: --max-seq-len: got 'x', expected an integer greater than 0\n"),
        (["--dtype", "half"], "error: --dtype: got 'half', expected one of auto, float32, bfloat16\n"),
        (["--prot", "1"], "Did you mean --port?"),
        (["--port"], "--port requires an argument"),
        (["--port", "1", "--port", "2"], "--port specified multiple times"),
        (["one", "two"], "'two'"),
        (["--host", "0.0.0.0"], "set one with --api-key or FOVEATE_API_KEY"),
        (["--api-key", ""], "error: --api-key: got an empty key"),
        (["--config", "minicpm-v-2_6"], "error: --config: only goes with --load-format dummy"),
        (["--config", "none", "--load-format", "dummy"], "expected a preset (minicpm-v-2_6) or a folder"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(args: list[str], message: str) -> None:
    result = foveate_command("serve", "--port", "0", *args) if "--port" not in args else foveate_command("serve", *args)
    assert result.returncode == EXIT_CONFIG
    assert message in result.stderr
    assert result.stderr.count("error: ") == result.stderr.count("\n") == 1


def test_every_bad_value_is_named_at_once() -> None:
    result = foveate_command("serve", "--max-seq-len", "0", FOVEATE_PORT="x")
    assert result.returncode == EXIT_CONFIG
    assert sorted(result.stderr.splitlines()) == [
        "error: --max-seq-len: got '0', expected an integer greater than 0",
        "error: FOVEATE_PORT: got 'x', expected an integer of at least 0 and at most 65535",
    ]


def test_a_busy_port_is_found_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = foveate_command("serve", str(TINY), "--port", str(port))
    assert result.returncode == EXIT_CONFIG
    assert f"error: --port: {port} on 127.0.0.1 is in use by another program" in result.stderr
    assert "Loading" not in result.stdout


def test_a_missing_folder_is_no_hub_name() -> None:
    result = foveate_command("serve", "./nowhere", "--port", "0")
    assert result.returncode == EXIT_CHECKPOINT
    assert result.stderr == "error: ./nowhere: there is no such folder\n"


def test_an_unreachable_hub_gives_both_reasons() -> None:
    result = foveate_command("serve", "nobody/nothing", "--port", "0")
    assert result.returncode == EXIT_CHECKPOINT
    assert "error: nobody/nothing: there is no such folder, and the hub says: " in result.stderr


def test_an_unknown_command_is_refused() -> None:
    result = foveate_command("serv")
    assert result.returncode == EXIT_CONFIG
    assert result.stderr.startswith("error: ")
    assert "serve" in result.stderr
    assert "Traceback" not in result.stderr


def test_every_command_can_be_imported() -> None:
    for command in (app["serve"], app["bench"]["serve"], app["bench"]["kernels"], app["tune"], app["version"]):
        assert callable(command.default_command)
