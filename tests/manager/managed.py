"""Services for the tests: started with the command as a user starts them, with the tiny model."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import psutil
from PIL import Image
from serving import ROOT, TINY_MODEL

SECONDS = 120
SETTINGS = ("device=cpu", "dtype=float32", "threads=1", "num_kv_blocks=2048", "port=0")
VISION_SETTINGS = ("device=cpu", "dtype=float32", "threads=1")


def sets(*pairs: str) -> list[str]:
    """Return the flags that set settings."""
    return [f"--set={pair}" for pair in pairs]


TINY = (str(TINY_MODEL), *sets(*SETTINGS))
"""What is started: the tiny model on a free port."""


class Home:
    """A ``FOVEATE_HOME`` of one's own, with a runtime folder beside it.

    Args:
        folder: both lie there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "home"
        self.runtime = folder / "run"
        self.runtime.mkdir()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FOVEATE_")}
        self.environment = {
            **inherited,
            "PYTHONPATH": str(ROOT),
            "FOVEATE_HOME": str(self.path),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "HF_HUB_OFFLINE": "1",
        }

    def popen(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        """Start ``foveate`` with some arguments."""
        command = [sys.executable, "-m", "foveate.cli", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.Popen(command, env=self.environment, text=True, **pipes)

    def run(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Run ``foveate`` to its end, see that it ends with a code, and return what it printed on both outputs."""
        result = subprocess.run(
            [sys.executable, "-m", "foveate.cli", *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert result.returncode == code, f"{arguments}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout + result.stderr

    def services(self) -> dict[str, dict[str, Any]]:
        """Return what ``foveate ps --json`` says, by name."""
        return {row["name"]: row for row in json.loads(self.run("ps", "--json"))}

    def service(self, name: str) -> dict[str, Any]:
        """Return what ``foveate ps --json`` says of one."""
        return self.services()[name]

    def record(self, name: str) -> dict[str, Any]:
        """Return what is written down about a service."""
        found: dict[str, Any] = json.loads((self.path / "services" / name / "service.json").read_bytes())
        return found

    def supervisor(self, name: str) -> psutil.Process:
        """Return a service's supervisor."""
        return psutil.Process(self.record(name)["supervisor"]["pid"])

    def process(self, name: str, module: str) -> psutil.Process:
        """Return the one process of a service that runs a module."""
        (found,) = [one for one in self.supervisor(name).children(recursive=True) if runs(one, module)]
        return found

    def family(self, name: str) -> list[psutil.Process]:
        """Return all processes of a service."""
        supervisor = self.supervisor(name)
        return [supervisor, *supervisor.children(recursive=True)]

    def processes(self) -> list[psutil.Process]:
        """Return every process that has this home in its environment and is no command's."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("FOVEATE_HOME") == str(self.path)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def runs(process: psutil.Process, module: str) -> bool:
    """Whether a process runs a module."""
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


def ended(processes: list[psutil.Process]) -> bool:
    """Whether processes have ended; nobody may have reaped them."""
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


def picture(width: int = 64) -> dict[str, Any]:
    """Return a message's part: a picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, width), (200, 30, 30)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def question(*pictures: dict[str, Any], tokens: int = 8, **more: Any) -> dict[str, Any]:
    """Return the fields of a greedy request of so many tokens."""
    content = [*pictures, {"type": "text", "text": "What is it?"}]
    return {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
        **more,
    }


def client(url: str) -> openai.OpenAI:
    """Return OpenAI's own client, which does not try again."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)


def ask(url: str, *pictures: dict[str, Any]) -> str:
    """Ask about pictures, or about nothing, and return the answer's text."""
    with client(url) as made:
        answer = made.chat.completions.create(**question(*pictures))
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content is not None
    return answer.choices[0].message.content
