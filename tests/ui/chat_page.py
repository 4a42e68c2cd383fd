"""The web chat as its visitor sees it, in a real browser."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import chromium
from playwright.sync_api import Browser, Locator, Page, Request, expect, sync_playwright
from serving import ROOT

PICTURES = ROOT / "foveate" / "demo" / "pictures"
BOX = "#fv-box textarea"
PATIENCE = 20_000
"""Milliseconds for what the machine may be slow at."""
# The camera is Chromium's own test picture.
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]

expect.set_options(timeout=PATIENCE)


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    """Start Chromium without a window; skip where there is none, but not in CI."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def running_ui(folder: Path, *arguments: str) -> Iterator[str]:
    """Run ``foveate ui``; yields its address, and sees to it that it ends well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log = folder / "ui.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "foveate.cli", "ui", *arguments, "--port", "0"],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _ready(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    assert code == 0, log.read_text(errors="replace")
    assert "Traceback" not in log.read_text(errors="replace"), log.read_text(errors="replace")


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(600):
        if found := re.search(r"ready: (http\S+)", log.read_text(errors="replace")):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"the web chat is not ready:\n{log.read_text(errors='replace')}")


class ChatPage:
    """An open page.

    Attributes:
        page: Playwright's.
        hosts: of all that the page asked for, beside data: and blob: URLs.
        problems: what went wrong in its scripts.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.hosts: set[str] = set()
        self.problems: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        for _ in range(60):
            answer = page.goto(url)
            if answer is not None and answer.ok:
                break
            # The page says that the chat is starting, and would load itself again.
            page.wait_for_timeout(500)
        page.wait_for_selector(BOX)

    def _note(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.netloc)

    def find(self, selector: str) -> Locator:
        return self.page.locator(selector)

    @property
    def questions(self) -> Locator:
        """The words of all questions."""
        return self.find("#fv-chat .user-row .message-content")

    @property
    def pictures(self) -> Locator:
        """What was shown to the model."""
        return self.find("#fv-chat .user-row img")

    @property
    def answers(self) -> Locator:
        """The words of all answers."""
        return self.find("#fv-chat .bot-row .message-content")

    def attach(self, *pictures: Path | dict[str, object]) -> None:
        """Upload pictures, and wait until they are there."""
        with self.page.expect_file_chooser() as chooser:
            self.page.click("#fv-box .upload-button")
        chooser.value.set_files(pictures)  # type: ignore[arg-type]
        expect(self.find(".fv-option")).to_have_count(len(pictures))

    def ask(self, question: str) -> None:
        """Send a question, once the answer before it has ended."""
        expect(self.find("#fv-box .submit-button")).to_be_visible()
        self.page.fill(BOX, question)
        self.page.press(BOX, "Enter")

    def expect_answer(self, text: str, number: int = -1) -> Locator:
        """Wait for an answer's words, and for its facts, which are returned."""
        expect(self.answers.nth(number)).to_contain_text(text)
        facts = self.find("#fv-chat .fv-facts").nth(number)
        expect(facts).to_be_visible()
        return facts

    def clear(self) -> None:
        """Begin a new chat."""
        self.page.click("#fv-new")
        expect(self.questions).to_have_count(0)
        expect(self.find(".fv-option")).to_have_count(0)

    def open_settings(self) -> None:
        """Open what stands beside the chat."""
        if not self.find("#fv-settings.open").count():
            self.page.click("#fv-settings .toggle-button")
        self.page.wait_for_selector("#fv-key input", state="visible")
