"""``python -m foveate.api.metrics_reference > docs/metrics.md``: the table of all metrics, made of the metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from foveate.machine import Gpu, ProcessUse
from foveate.telemetry import Metrics

INTRODUCTION = """\
# Metrics

<!-- Made by `make docs-reference` from foveate/telemetry.py and foveate/collectors.py: change it there. -->

Everything in `/metrics`; [monitoring.md](monitoring.md) says what to do with it. Times are in seconds, sizes in bytes.
Counters only grow, and begin at 0 again with the process that counts: for `foveate_engine_` that is the engine, for
`foveate_vision_` the vision service, else the server. Each counter and histogram also has a `_created` sample, the
Unix time of its beginning. A histogram has `_bucket`, `_sum` and `_count`.

`foveate_engine_` and `foveate_vision_` are missing (but for `_up`) while that process is away,
`foveate_vision_cuda_ipc_` unless rows go to the engine through a GPU's memory, and `foveate_gpu_` has no samples
without an NVIDIA driver.

| metric | type | labels | meaning |
| --- | --- | --- | --- |
"""


def everything() -> Metrics:
    """Return metrics in which all that there can be is there."""
    metrics = Metrics()
    metrics.info.info({"version": "1", "model": "model"})
    metrics.requests.labels("/", "200")
    metrics.errors.labels("overloaded")
    metrics.engine.update(dict.fromkeys([*metrics.engine.COUNTERS, *metrics.engine.GAUGES], 1))
    metrics.vision.update({"own": dict.fromkeys(metrics.vision.HELPS, 1.0)}, {"own": "arena"})
    metrics.machine.update([Gpu(0, "GPU", 0.5, 1, 2)], [ProcessUse("api", 1.0, 1)])
    return metrics


def families(text: str) -> Iterator[tuple[str, Metric]]:
    """Yield each metric of a ``/metrics`` page with the name under which its samples are found."""
    for family in text_string_to_metric_families(text):
        if not family.name.endswith("_created"):
            yield family.name + ("_total" if family.type == "counter" else ""), family


def page() -> str:
    """Return the whole page."""
    rows = []
    for name, family in families(everything().render().decode()):
        labels = {label: None for sample in family.samples for label in sample.labels if label != "le"}
        rows.append(
            f"| `{name}` | {family.type} | {' '.join(f'`{label}`' for label in labels)} | {family.documentation} |\n"
        )
    return INTRODUCTION + "".join(sorted(rows))


if __name__ == "__main__":
    print(page(), end="")
