"""How ``foveate top`` shows a :class:`Snapshot`: as a few lines and a table of times."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.client.metrics import share
from foveate.client.snapshot import Latency, Percentiles, Recent, Snapshot
from foveate.client.stream import harmless
from foveate.client.terminal import STAGE_NAMES

UNKNOWN = "-"
_BARS = "▁▂▃▄▅▆▇█"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def panel(title: str, shown: Snapshot, history: Sequence[float] = ()) -> RenderableType:
    """Return everything of a snapshot, for a terminal of 80 columns.

    Args:
        title: which server it is.
        shown: its numbers.
        history: output tokens each second in the last intervals, oldest first.
    """
    lines = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column()
    for name, words in _lines(shown, history):
        lines.add_row(name, Text(harmless(words)))
    return Group(Text(harmless(title), style="bold cyan"), lines, Text(), _times(shown))


def _lines(shown: Snapshot, history: Sequence[float]) -> list[tuple[str, str]]:
    """Return each line's name and words. What is in brackets counts since the server's start."""
    kv_share = _percent(share(shown.kv_blocks_used, shown.kv_blocks))
    lines = [
        (
            "requests",
            f"{_count(shown.requests_running)} running, {_count(shown.requests_queued)} queued, "
            f"{_number(shown.requests_per_second)} answered/s",
        ),
        (
            "ended badly",
            f"refused {_counts(shown.refused)}, failed {_counts(shown.failed)}, hung up {_counts(shown.hung_up)}",
        ),
    ]
    if shown.errors:
        lines.append(("  errors", ", ".join(f"{name} ({_count(count)})" for name, count in shown.errors.items())))
    if any(shown.restarts.values()):
        lines.append(("  died", ", ".join(f"{name} ({_count(count)})" for name, count in shown.restarts.items())))
    lines += [
        (
            "tokens/s",
            f"prompt {_number(shown.prompt_tokens_per_second)}, output {_number(shown.output_tokens_per_second)}  "
            f"{sparkline(history)}",
        ),
        (
            "batch",
            f"{_count(shown.batch_size)} sequences, {_number(shown.tokens_per_step)} tokens/step, "
            f"preempted {_counts(shown.preemptions)}, aborted {_counts(shown.aborted)}",
        ),
        (
            "KV blocks",
            f"{_count(shown.kv_blocks_used)} of {_count(shown.kv_blocks)} in use ({kv_share}), "
            f"{_count(shown.kv_blocks_cached)} cached",
        ),
        ("prefix cache", f"hits {_percents(shown.prefix_hit_rate)} of prompt tokens"),
        (
            "vision",
            f"{_count(shown.vision_services_up)} of {_count(shown.vision_services)} services up, "
            f"pictures: {_count(shown.pictures_running)} running, {_count(shown.pictures_waiting)} waiting",
        ),
        (
            "  batches",
            f"{_number(shown.vision_batches_per_second)}/s of {_number(shown.slices_per_batch)} slices; "
            f"embeddings cached: hits {_percents(shown.embedding_hit_rate)}",
        ),
        ("arena", f"{_percent(shown.arena_used)} of {_bytes(shown.arena_bytes)} in use"),
    ]
    for gpu in shown.gpus:
        memory = f"{_bytes(gpu.memory_used_bytes)} of {_bytes(gpu.memory_bytes)}"
        lines.append((f"GPU {gpu.gpu}", f"{_percent(gpu.utilization)} busy, memory {memory}  {gpu.name}"))
    if not shown.gpus:
        lines.append(("GPU", UNKNOWN))
    return lines


def _times(shown: Snapshot) -> Table:
    last = "last interval" if shown.seconds is None else f"last {shown.seconds:.3g} s"
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(f"ms, {last} and\n(since the start)", no_wrap=True)
    for heading in ("p50", "p95", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("(p50)", "(p95)", "(p99)"):
        table.add_column(heading, justify="right", no_wrap=True, style="dim")
    names = {"first_token": "first token", "output_token": "each further token", "request": "whole answer"}
    for key, latency in shown.latencies.items():
        stage = STAGE_NAMES.get(key)
        table.add_row(names.get(key) or f"  {stage or harmless(key)}", *_cells(latency))
    return table


def _cells(latency: Latency) -> list[str]:
    return [cell for one in (latency.interval, latency.start) for cell in _percentile_cells(one)]


def _percentile_cells(one: Percentiles | None) -> list[str]:
    values = (one.p50, one.p95, one.p99) if one else (None, None, None)
    return [UNKNOWN if value is None else f"{1000 * value:,.1f}" for value in values]


def sparkline(values: Sequence[float]) -> str:
    """Draw numbers of at least 0 as bars, of which the largest is the tallest."""
    largest = max(values, default=0.0)
    if largest <= 0:
        return ""
    return "".join(_BARS[min(int(value / largest * len(_BARS)), len(_BARS) - 1)] for value in values)


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.1f}"


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def _counts(value: Recent) -> str:
    return f"{_count(value.interval)} ({_count(value.start)})"


def _percents(value: Recent) -> str:
    return f"{_percent(value.interval)} ({_percent(value.start)})"


def _bytes(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}"
