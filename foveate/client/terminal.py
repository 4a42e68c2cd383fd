"""What is written to the terminal, or to whatever stands in its place."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from foveate.client.stream import Answer, harmless

STAGE_NAMES: Mapping[str, str] = {
    "fetch": "pictures fetched",
    "picture_decode": "pictures decoded",
    "slice": "pictures cut into slices",
    "queue": "waited for the encoder",
    "encode": "pictures encoded",
    "write": "embeddings written",
    "wait": "waited for the engine",
    "read": "embeddings read",
    "prefill": "prompt computed",
    "decode": "answer generated",
}
_AFTER_FIRST_TOKEN = ("decode", "total")


class Output:
    """A context for writing to standard output.

    A character that its encoding lacks becomes a question mark. When its reader has gone, as ``head`` goes, the
    context ends quietly.
    """

    def __enter__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None:
            try:
                sys.stdout.flush()
            except BrokenPipeError as broken:
                error = broken
        if not isinstance(error, BrokenPipeError):
            return False
        # The interpreter flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


class Screen:
    """Shows answers as they come: made harmless on a terminal, as they are anywhere else."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self._notes = Console(stderr=True, highlight=False, markup=False)
        self._out = Console(highlight=False, markup=False)
        self._ended_line = True

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Callable[[], None]]:
        """Show that something is under way, where somebody may be watching; yield what ends that."""
        if self.is_terminal and self._notes.is_terminal:
            with self._notes.status("", spinner="dots") as status:
                yield status.stop
        else:
            yield lambda: None

    def write(self, text: str) -> None:
        """Write a piece of an answer, at once."""
        if not text:
            return
        sys.stdout.write(harmless(text) if self.is_terminal else text)
        sys.stdout.flush()
        self._ended_line = text.endswith("\n")

    def end_line(self) -> None:
        """Begin a new line, unless one has begun."""
        if not self._ended_line:
            self.write("\n")

    def note(self, text: str, style: str = "dim") -> None:
        """Write a line beside the answers, to standard error."""
        self._notes.print(harmless(text), style=style, soft_wrap=True)

    def timings(self, answer: Answer) -> None:
        """Write the answer's tokens and times."""
        (self._out if self.is_terminal else self._notes).print(timings_table(answer))


def timings_table(answer: Answer) -> Table:
    """Return a table of an answer's tokens and of where its time went, as far as the server tells."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    usage, timings = answer.usage or {}, answer.timings or {}
    details: Mapping[str, Any] = usage.get("prompt_tokens_details") or {}
    _tokens(table, "prompt", usage.get("prompt_tokens"))
    _tokens(table, "  of pictures", details.get("image_tokens"))
    _tokens(table, "  from the prefix cache", details.get("cached_tokens"))
    _tokens(table, "answer", usage.get("completion_tokens"))
    if answer.first_token_seconds is not None:
        table.add_row("time to first token", _milliseconds(answer.first_token_seconds))
    for stage, seconds in timings.items():
        if stage not in _AFTER_FIRST_TOKEN:
            table.add_row(f"  {STAGE_NAMES.get(stage, harmless(stage))}", _milliseconds(seconds))
    if answer.tokens_per_second is not None:
        table.add_row("after that", f"{answer.tokens_per_second:.1f} tokens/s")
    table.add_row("in all", _milliseconds(answer.seconds))
    return table


def _tokens(table: Table, name: str, count: int | None) -> None:
    if count is not None:
        table.add_row(name, f"{count:,} tokens")


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"
