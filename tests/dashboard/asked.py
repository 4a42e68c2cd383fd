"""Requests that give the dashboard something to show."""

from __future__ import annotations

import httpx
from serving import ROOT, TINY_MODEL

PICTURES = sorted((ROOT / "foveate" / "demo" / "pictures").glob("*.png"))


def ask(url: str, content: object, *, model: str = TINY_MODEL.name, key: str | None = None) -> httpx.Response:
    """Send one chat completion."""
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8, "ignore_eos": True}
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def pictured(address: str) -> list[dict[str, object]]:
    """Content of one picture and a question."""
    return [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "What is it?"}]
