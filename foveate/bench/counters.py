"""What a server's engine has counted, from its ``/metrics``."""

from __future__ import annotations

import re
from typing import NamedTuple

import httpx

_SAMPLE = re.compile(r"^foveate_engine_(draft|accepted)_tokens_total (\S+)$", re.MULTILINE)


class Guesses(NamedTuple):
    """Tokens that were guessed ahead, and how many of them were right."""

    draft_tokens: int = 0
    accepted_tokens: int = 0

    def since(self, before: Guesses) -> Guesses:
        """Return what has come to those of a time before."""
        return Guesses(self.draft_tokens - before.draft_tokens, self.accepted_tokens - before.accepted_tokens)


async def guesses(client: httpx.AsyncClient) -> Guesses:
    """Ask a server for what it has counted so far; nothing if it does not say."""
    try:
        response = await client.get("/metrics")
    except httpx.HTTPError:
        return Guesses()
    found = {name: int(float(value)) for name, value in _SAMPLE.findall(response.text)}
    return Guesses(found.get("draft", 0), found.get("accepted", 0))
