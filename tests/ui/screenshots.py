"""Make the pictures of the web chat in docs/images: ``make screenshots``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from chat_page import PICTURES, ChatPage, running_browser
from playwright.sync_api import Browser
from serving import ROOT, running_server

IMAGES = ROOT / "docs" / "images"
DESKTOP, PHONE = (1280, 800), (390, 844)


def talk(browser: Browser, url: str, file: str, size: tuple[int, int], scheme: str) -> None:
    """Ask about a picture with slices, unfold what is known of the answer, and keep what is seen."""
    viewport = {"width": size[0], "height": size[1]}
    context = browser.new_context(viewport=viewport, color_scheme=scheme, locale="en-US")  # type: ignore[arg-type]
    chat = ChatPage(context.new_page(), url)
    chat.attach(PICTURES / "small-print.png", PICTURES / "receipt.png")
    chat.ask("Read the number in the first picture.")
    facts = chat.expect_answer("")
    facts.locator("summary").click()
    chat.page.mouse.move(0, 0)
    chat.page.wait_for_timeout(1000)
    chat.page.screenshot(path=IMAGES / file)
    context.close()


def main() -> None:
    """Serve the demo model and take the pictures."""
    IMAGES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), "--ui", model=None) as server,
        running_browser() as browser,
    ):
        url = f"{server.url}/ui/"
        talk(browser, url, "web-chat-light.png", DESKTOP, "light")
        talk(browser, url, "web-chat-dark.png", DESKTOP, "dark")
        talk(browser, url, "web-chat-phone.png", PHONE, "light")


if __name__ == "__main__":
    main()
