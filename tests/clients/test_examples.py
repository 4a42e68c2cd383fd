"""Every example, as its reader runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from serving import ROOT, RunningServer
from typed import environment

EXAMPLES = ROOT / "examples"
OUTPUT = {
    "openai_client.py": [
        "There are 4 shapes.",
        "The second picture.",
        "165 tokens were read, * s in all",
        "What is at the top right? A green circle.",
        "And what colour is it? It is green.",
    ],
    "requests_client.py": ["The total is 66.89.", "{'prompt_tokens': 95, *}", "The total is 66.89."],
    "langchain_client.py": ["MAR is 11.", "S7 is 19.", "79D2 is 77."],
}


@pytest.mark.parametrize("name", OUTPUT)
def test_it_says_what_is_in_the_pictures(demo: RunningServer, name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), demo.url],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(OUTPUT[name])
    for line, expected in zip(lines, OUTPUT[name], strict=True):
        start, any_text, end = expected.partition("*")
        assert line == expected if not any_text else line.startswith(start) and line.endswith(end)


def test_all_of_them_are_tested_and_described() -> None:
    files = {file.name for file in EXAMPLES.glob("*.py")}
    assert files == OUTPUT.keys()
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}]({name})" in readme for name in files)
