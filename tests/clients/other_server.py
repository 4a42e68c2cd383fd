"""What a test tells a server of another kind to say, and what that one was sent."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Other:
    """Another kind of server.

    Attributes:
        url: its address.
        replies: status and body by path; whatever else is asked for is not there.
        bodies: the JSON that it was sent.
        keys: the ``Authorization`` header of each request.
    """

    url: str = ""
    replies: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def answers(self, *events: dict[str, Any], done: bool = True) -> None:
        """Answer questions with these events."""
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        body = "".join([": keep-alive\n\n", *lines, "data: [DONE]\n\n" if done else ""])
        self.replies["/v1/chat/completions"] = (200, body.encode())
