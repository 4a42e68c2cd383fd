"""Whether a command printed what its document shows: the same, but for times, process ids, ports and rounding."""

from __future__ import annotations

import re
from collections.abc import Sequence

ANYTHING = "..."
"""A line of the document that stands for any number of lines."""
_TOLERANCE = 0.1
_DIFFERENT_EACH_TIME = (
    (re.compile(r"\b\d+(?:\.\d+)? ?m?s\b"), "TIME"),
    (re.compile(r"\b\d+ MB/s"), "RATE"),
    (re.compile(r"(?<=127\.0\.0\.1:)\d+"), "PORT"),
    (re.compile(r"^\d+(?=,(?:-|unix)\s)"), "PORT"),
    (re.compile(r"(?<=\s)\d+(?=\s+(?:ready|degraded|starting|stopped)\s)"), "PID"),
    (re.compile(r"\b[\d.]+ GiB free\b"), "FREE"),
    (re.compile(r"chatcmpl-[0-9a-f]{32}"), "ID"),
    (re.compile(r'(?<="created":)\d+'), "CREATED"),
    (re.compile(r"\bfv_[0-9a-f]+"), "FINGERPRINT"),
)
_NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?)")


def difference(shown: str, printed: str) -> str | None:
    """Say how what was printed differs from what a document shows; None if it does not.

    Blanks count as one, a line ``...`` stands for any lines. Numbers of more than three digits or with a point may
    differ by a tenth, as processors and folders' names do; others may not.
    """
    wanted, found = _lines(shown), _lines(printed)
    if _match(wanted, found):
        return None
    return f"shown:\n{shown}\nprinted:\n{printed}"


def _lines(text: str) -> list[str]:
    lines = [" ".join(line.split()) for line in text.strip().splitlines()]
    for pattern, name in _DIFFERENT_EACH_TIME:
        lines = [pattern.sub(name, line) for line in lines]
    return lines


def _match(wanted: Sequence[str], found: Sequence[str]) -> bool:
    if not wanted:
        return not found
    if wanted[0] == ANYTHING:
        return any(_match(wanted[1:], found[start:]) for start in range(len(found) + 1))
    return bool(found) and _same(wanted[0], found[0]) and _match(wanted[1:], found[1:])


def _same(wanted: str, found: str) -> bool:
    """Compare two lines, whose odd pieces are numbers."""
    left, right = _NUMBER.split(wanted), _NUMBER.split(found)
    if len(left) != len(right) or left[::2] != right[::2]:
        return False
    return all(_close(one, other) for one, other in zip(left[1::2], right[1::2], strict=True))


def _close(wanted: str, found: str) -> bool:
    if wanted == found:
        return True
    if not {",", "."} & {*wanted, *found}:
        return False
    one, other = (float(text.replace(",", "") or "nan") for text in (wanted, found))
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other))
