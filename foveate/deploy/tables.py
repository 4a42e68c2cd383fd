"""How the commands on checkpoints show what they found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from foveate.checkpoint.inspect import Report
from foveate.checkpoint.memory import MemoryPlan, binary
from foveate.checkpoint.stage import Stage


def show_report(report: Report) -> None:
    """Print a folder's report as tables, on standard output."""
    console = Console(highlight=False)
    console.print(f"[bold]{report.folder}[/bold]: {report.kind} of {report.model_type}", soft_wrap=True)
    console.print(_facts(report))
    if report.parts:
        console.print(_parts(report))
    if report.memory:
        console.print(_memory(report.memory))
    if report.hashes is not None:
        whole = "All files match their hashes." if not report.hashes else "The files are not those that were written."
        console.print(whole)


def show_stages(title: str, stages: Sequence[Stage]) -> None:
    """Print a comparison, on standard output."""
    console = Console(highlight=False)
    console.print(title, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("stage", "measured", "bound", ""):
        table.add_column(heading)
    for stage in stages:
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in stage.values.items())
        side = "at least" if stage.measure == "agreement" else "at most"
        bound = f"{stage.measure.replace('_', ' ')} {side} {stage.bound:g}"
        table.add_row(stage.name, shown, bound, "ok" if stage.ok else "OUTSIDE")
    console.print(table)


def _plain(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)


def _facts(report: Report) -> Table:
    table = _plain()
    for part in ("language", "vision"):
        if sizes := report.architecture.get(part):
            table.add_row(part, _sizes(sizes))
    table.add_row("dtype", report.dtype)
    table.add_row("quantization", _words(report.quantization))
    if report.limits is not None:
        limits = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_image_tokens")
        table.add_row("limits", ", ".join(f"{name} {getattr(report.limits, name):,}" for name in limits))
    if report.source is not None:
        table.add_row(
            "built from", f"{report.source.name} ({report.source.identity[:16]}), by Foveate {report.foveate}"
        )
    if report.error is not None:
        table.add_row("error", ", ".join(f"{name} {value:.3g}" for name, value in report.error.items()))
    return table


def _sizes(sizes: dict[str, Any]) -> str:
    shown = {
        "num_hidden_layers": "layers", "hidden_size": "hidden", "intermediate_size": "intermediate",
        "num_attention_heads": "heads", "num_key_value_heads": "kv heads", "vocab_size": "vocabulary",
        "max_position_embeddings": "positions", "patch_size": "pixels a patch",
    }  # fmt: skip
    return ", ".join(f"{sizes[key]:,} {word}" for key, word in shown.items() if key in sizes)


def _words(quantization: dict[str, Any]) -> str:
    """Say how weights are stored, without what does not matter for the method."""
    method = quantization["method"]
    without = {"method"} | ({"group_size"} if method in ("int8", "fp8") else set())
    if method == "none":
        return "none"
    rest = [
        f"{key} {value}"
        for key, value in quantization.items()
        if key not in without and value not in (None, False, [], ())
    ]
    return ", ".join([method, *rest])


def _parts(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("part", "parameters", "on disk"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    table.add_column("of it")
    for name, part in report.parts.items():
        kinds = ", ".join(f"{dtype} {binary(count)}" for dtype, count in sorted(part.bytes_by_dtype.items()))
        table.add_row(name, f"{part.parameters:,}", binary(part.bytes), kinds)
    return table


def _memory(plans: list[MemoryPlan]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("memory")
    for plan in plans:
        table.add_column(f"{plan.machine.device} ({binary(plan.machine.free_bytes)} free)", justify="right")
    rows: dict[str, list[str]] = {
        "as": [plan.dtype for plan in plans],
        **{name: [binary(dict(plan.parts())[name]) for plan in plans] for name, _ in plans[0].parts()},
        "a block of keys and values": [binary(plan.kv_block) for plan in plans],
        "blocks": [f"{plan.kv_blocks:,}" for plan in plans],
        "tokens that they hold": [f"{plan.kv_tokens:,}" for plan in plans],
        "keys and values": [binary(plan.kv_block * plan.kv_blocks) for plan in plans],
        "holds the longest sequence": ["yes" if plan.fits else "no" for plan in plans],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table
