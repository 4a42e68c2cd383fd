"""``PYTHONPATH=.:tests python tests/dashboard/screenshots.py``: makes docs/images/dashboard.png and dashboard-dark.png.

It serves the demo model, asks it about its pictures for a while, and looks at the dashboard.
"""

from __future__ import annotations

import base64
import io
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from asked import PICTURES, ask, pictured
from browser import chromium
from PIL import Image
from playwright.sync_api import sync_playwright
from serving import ROOT, running_server

IMAGES = ROOT / "docs" / "images"
SECONDS = 100.0
CLIENTS = 5
SIZE: Any = {"width": 1280, "height": 800}
SCHEMES: dict[Any, str] = {"light": "dashboard.png", "dark": "dashboard-dark.png"}
QUESTIONS = ("Describe the picture.", "How many shapes are there?", "What is at the top left?")


def keep_asking(url: str, seed: int, until: float) -> None:
    """Ask about pictures, half of them never seen before, with pauses."""
    chance = random.Random(seed)
    with httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < until:
            content = pictured("data:image/png;base64," + base64.b64encode(some_picture(chance)).decode())
            content[1]["text"] = chance.choice(QUESTIONS)
            body = {"model": "foveate-demo", "messages": [{"role": "user", "content": content}]}
            client.post("/v1/chat/completions", json=body).raise_for_status()
            time.sleep(chance.expovariate(0.8))


def some_picture(chance: random.Random) -> bytes:
    """One of the demo's pictures, which may be given a corner of its own."""
    file = chance.choice(PICTURES)
    if chance.random() < 0.5:
        return file.read_bytes()
    picture = Image.open(file).convert("RGB")
    picture.putpixel((0, 0), (chance.randrange(256), chance.randrange(256), chance.randrange(256)))
    made = io.BytesIO()
    picture.save(made, "PNG")
    return made.getvalue()


def store(png: bytes, file: Path) -> None:
    """Write a screenshot with few colours: it has no others, and is half the size."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(file, optimize=True)


def main() -> None:
    """Make both."""
    IMAGES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), model=None) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        pages: dict[str, Any] = {}
        for scheme in SCHEMES:
            pages[scheme] = browser.new_context(viewport=SIZE, color_scheme=scheme).new_page()
            pages[scheme].goto(server.url)
        until = time.monotonic() + SECONDS
        askers = [threading.Thread(target=keep_asking, args=(server.url, seed, until)) for seed in range(CLIENTS)]
        for asker in askers:
            asker.start()
        ask(server.url, pictured("data:image/png;base64,aGVsbG8="), model="foveate-demo")
        ask(server.url, "Hello", model="gpt-4o")
        pages["light"].wait_for_timeout((SECONDS - 2) * 1000)
        for scheme, name in SCHEMES.items():
            store(pages[scheme].screenshot(), IMAGES / name)
        for asker in askers:
            asker.join()
        browser.close()


if __name__ == "__main__":
    main()
