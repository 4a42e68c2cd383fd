"""Messages for the tests of the API, made of texts, pictures and the golden data."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent.parent / "golden"


def data_url(name: str) -> str:
    """A picture of the golden data as a data: URL."""
    kind = "jpeg" if name.endswith(".jpg") else "png"
    content = base64.b64encode((GOLDEN / "assets" / name).read_bytes()).decode()
    return f"data:image/{kind};base64,{content}"


def picture(name: str, **image_url: Any) -> dict[str, Any]:
    """A picture part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(name), **image_url}}


def text(words: str) -> dict[str, Any]:
    """A text part of a message."""
    return {"type": "text", "text": words}


def user(*content: Any) -> dict[str, Any]:
    """A user's message of texts and parts."""
    parts = [text(part) if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


def golden_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation of the golden data as a request has it."""
    made = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [picture(part[1:]) if part.startswith("@") else text(part) for part in content]
        made.append({"role": message["role"], "content": content})
    return made


def golden_cases() -> dict[str, Any]:
    """Every case of the tiny model: messages, token counts, and the file with the answers."""
    cases: dict[str, Any] = json.loads((GOLDEN / "tiny" / "cases.json").read_text())["cases"]
    return cases
