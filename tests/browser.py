"""A headless Chromium for the tests of pages: Debian's, driven by Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_MOST_MS = 90_000


@dataclass
class Watched:
    """A page, and what it did that a user would not see.

    Attributes:
        page: Playwright's.
        requests: every address that it asked for.
        complaints: what it wrote on the console as a warning or an error, and exceptions that nobody caught.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def chromium() -> str:
    """Return the browser's path; skip where there is none, but not in CI."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs Chromium; on Debian: apt install chromium")
    return found


@contextlib.contextmanager
def browser_page(**options: Any) -> Iterator[Watched]:
    """Open an empty page in a browser of its own; skip the test where there is none.

    Playwright keeps an event loop running in this thread meanwhile, so that no ``async`` test can run.

    Args:
        options: of the browser's context, such as ``viewport`` and ``color_scheme``.
    """
    found = chromium()
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_context(**options).new_page()
        # A server that starts again beside other tests takes its time.
        page.set_default_timeout(_MOST_MS)
        watched = Watched(page)
        page.on("request", lambda request: watched.requests.append(request.url))
        page.on("pageerror", lambda error: watched.complaints.append(str(error)))

        def hear(said: Any) -> None:
            if said.type in ("error", "warning"):
                watched.complaints.append(said.text)

        page.on("console", hear)
        try:
            yield watched
        finally:
            browser.close()
