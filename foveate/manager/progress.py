"""What a command shows to who waits for it: one line that changes, where there is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape


@contextmanager
def progress_line(text: str) -> Iterator[Callable[[str], None]]:
    """Show a line on standard error while the context lasts; gives what changes it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(text, file=sys.stderr, flush=True)
        yield lambda text: None
        return
    with console.status(escape(text)) as status:
        yield lambda text: status.update(escape(text))


def fail(message: str, code: int) -> int:
    """Print why a command fails, as the other commands do, and return its exit code."""
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code
