"""The arithmetic of ``foveate top``: percentiles, rates and shares of two samples."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client import Histogram as Observed

from foveate.client.metrics import Histogram, Interval, Sample, share
from foveate.client.panel import sparkline
from foveate.client.snapshot import snapshot
from foveate.errors import FoveateError
from foveate.telemetry import Metrics

BOUNDS = (0.1, 0.5, 1.0, math.inf)


@pytest.mark.parametrize(
    ("counts", "q", "expected"),
    [
        ((0, 0, 0, 0), 0.5, None),
        ((10, 10, 10, 10), 0.5, 0.05),  # spread evenly from 0
        ((0, 10, 10, 10), 0.5, 0.3),
        ((0, 10, 10, 10), 1.0, 0.5),
        ((4, 8, 10, 10), 0.5, 0.2),  # the first of four between 0.1 and 0.5
        ((4, 4, 10, 10), 0.4, 0.1),  # exactly a bound
        ((0, 0, 0, 10), 0.5, 1.0),  # above every finite bound
        ((0, 5, 9, 10), 0.95, 1.0),
        ((0, 0, 1, 1), 0.0, 0.5),
    ],
)
def test_a_quantile_by_hand(counts: tuple[float, ...], q: float, expected: float | None) -> None:
    assert Histogram(BOUNDS, counts).quantile(q) == (None if expected is None else pytest.approx(expected))


@given(st.lists(st.floats(0.001, 50), min_size=1, max_size=60), st.floats(0.01, 1))
def test_a_quantile_is_in_the_bucket_of_the_true_one(values: list[float], q: float) -> None:
    registry = CollectorRegistry()
    observed = Observed("x", "x", buckets=(0.1, 0.5, 1, 5, 20), registry=registry)
    for value in values:
        observed.observe(value)
    histogram = Sample.parse(generate_latest(registry).decode(), 0.0).histogram("x")
    assert histogram is not None
    assert histogram.count == len(values)
    true = sorted(values)[math.ceil(q * len(values)) - 1]
    index = next(i for i, bound in enumerate(histogram.bounds) if true <= bound)
    lower = histogram.bounds[index - 1] if index else 0.0
    estimate = histogram.quantile(q)
    assert estimate is not None
    assert lower <= estimate <= min(histogram.bounds[index], 20)


def test_only_what_came_since_counts() -> None:
    before, now = Histogram(BOUNDS, (4, 4, 4, 4)), Histogram(BOUNDS, (4, 4, 6, 6))
    assert now.since(before) == Histogram(BOUNDS, [0, 0, 2, 2])
    assert now.since(None) == now
    assert now.since(now).quantile(0.5) is None


def test_a_server_that_was_started_again_has_only_new_observations() -> None:
    before = Histogram(BOUNDS, (4, 9, 9, 9))
    # More than before in the first bucket alone: still all of it is new.
    now = Histogram(BOUNDS, (5, 5, 5, 5))
    assert now.since(before) == now
    assert now.since(Histogram((1.0, math.inf), (1, 1))) == now


def test_counters_over_labels_and_restarts() -> None:
    registry = CollectorRegistry()
    counter = Counter("hits", "h", ["kind", "route"], registry=registry)
    counter.labels("a", "/x").inc(3)
    counter.labels("b", "/x").inc(4)
    before = Sample.parse(generate_latest(registry).decode(), 10.0)
    counter.labels("a", "/x").inc(2)
    counter.labels("c", "/y").inc(5)
    now = Sample.parse(generate_latest(registry).decode(), 14.0)
    interval = Interval(before, now)
    assert interval.increase("hits_total") == 7
    assert interval.increase("hits_total", kind="c") == 5
    assert interval.increase("hits_total", route="/x") == 2
    assert interval.rate("hits_total") == 1.75
    assert interval.increase("nothing_total") is None
    assert Interval(None, now).increase("hits_total") == 14
    assert Interval(None, now).rate("hits_total") is None
    assert now.by_label("hits_total", "route") == {"/x": 9, "/y": 5}
    assert now.value("hits_total") == 14
    # Started again: c and b are not there any more, a counts from 0.
    registry = CollectorRegistry()
    Counter("hits", "h", ["kind", "route"], registry=registry).labels("a", "/x").inc(1)
    assert Interval(now, Sample.parse(generate_latest(registry).decode(), 15.0)).increase("hits_total") == 1


def test_what_is_no_metrics_is_refused() -> None:
    with pytest.raises(FoveateError, match="not in Prometheus' text format"):
        Sample.parse("<html>hello</html>", 0.0)


def test_a_share_of_nothing_is_unknown() -> None:
    assert share(1, 4) == 0.25
    assert share(0, 4) == 0
    assert share(1, 0) is share(None, 4) is share(1, None) is None


def moment(metrics: Metrics, time: float, **engine: int) -> Sample:
    metrics.engine.update(engine)
    return Sample.parse(metrics.render().decode(), time)


def test_a_snapshot_of_what_the_server_counts() -> None:
    metrics = Metrics()
    blocks = {"total_blocks": 100, "free_blocks": 75, "cached_blocks": 40}
    vision = {"cache_hits_total": 1, "cache_misses_total": 1, "batches_total": 2, "slices_total": 4}
    arena = {"arena_bytes": 4096, "arena_blocks": 8, "arena_blocks_free": 6}
    metrics.vision.update({"own": {**vision, **arena}, "b": vision}, {"own": "arena", "b": ""})
    metrics.requests.labels("/v1/chat/completions", "200").inc(4)
    metrics.requests.labels("/metrics", "401").inc(9)
    metrics.ttft_seconds.observe(100)
    engine = {"steps": 10, "prompt_tokens": 50, "cached_tokens": 0, "generated_tokens": 20, "preemptions": 1}
    before = moment(metrics, 0.0, num_running=1, num_waiting=0, **blocks, **engine)
    for status, count in (("200", 2), ("400", 3), ("499", 1), ("503", 2)):
        metrics.requests.labels("/v1/chat/completions", status).inc(count)
    metrics.vision.update({"own": {**vision, **arena, "cache_hits_total": 4, "slices_total": 10}}, {"own": "arena"})
    metrics.ttft_seconds.observe(0.2)
    metrics.stage_seconds.labels("encode").observe(0.004)
    engine = {"steps": 14, "prompt_tokens": 90, "cached_tokens": 30, "generated_tokens": 32, "preemptions": 1}
    shown = snapshot(before, moment(metrics, 4.0, num_running=3, num_waiting=2, **blocks, **engine))

    assert (shown.seconds, shown.requests_queued, shown.batch_size, shown.requests_per_second) == (4, 2, 3, 2)
    for recent, expected in {
        shown.refused: (3, 3),
        shown.failed: (2, 2),
        shown.hung_up: (1, 1),
        shown.preemptions: (0, 1),
        shown.prefix_hit_rate: (0.75, 30 / 90),
        shown.embedding_hit_rate: (1.0, 0.8),
        shown.aborted: (None, None),
    }.items():
        assert (recent.interval, recent.start) == expected
    assert (shown.prompt_tokens_per_second, shown.output_tokens_per_second, shown.tokens_per_step) == (10, 3, 3)
    assert (shown.kv_blocks, shown.kv_blocks_used, shown.kv_blocks_cached) == (100, 25, 40)
    assert (shown.arena_bytes, shown.arena_used) == (4096, 0.25)
    assert (shown.vision_services, shown.vision_services_up) == (1, 1)
    first = shown.latencies["first_token"]
    assert first.interval is not None
    assert first.start is not None
    assert (first.interval.count, first.start.count) == (1, 2)
    assert first.interval.p99 is not None
    assert first.start.p99 is not None
    assert first.interval.p99 < 0.5 < 60 < first.start.p99
    encode = shown.latencies["encode"].interval
    assert encode is not None
    assert encode.p50 is not None
    assert 0.0025 < encode.p50 < 0.005


def test_a_snapshot_of_a_server_that_tells_nothing() -> None:
    shown = snapshot(Sample(0.0, {}), Sample(1.0, {}))
    assert shown.requests_running is shown.kv_blocks_used is shown.arena_used is shown.refused.start is None
    assert (shown.gpus, shown.latencies, shown.errors) == ([], {}, {})


def test_gpus_and_errors_where_they_are_told() -> None:
    text = """\
# TYPE foveate_gpu_utilization_ratio gauge
foveate_gpu_utilization_ratio{gpu="1",name="H100"} 0.5
# TYPE foveate_gpu_memory_bytes gauge
foveate_gpu_memory_bytes{gpu="0",name="L4"} 1024
foveate_gpu_memory_bytes{gpu="1",name="H100"} 2048
# TYPE foveate_errors counter
foveate_errors_total{type="overloaded"} 3
"""
    shown = snapshot(None, Sample.parse(text, 0.0))
    assert [(one.gpu, one.name, one.utilization, one.memory_bytes) for one in shown.gpus] == [
        ("0", "L4", None, 1024),
        ("1", "H100", 0.5, 2048),
    ]
    assert shown.errors == {"overloaded": 3}


def test_bars() -> None:
    assert sparkline([0, 4, 8]) == "▁▅█"
    assert sparkline([]) == sparkline([0, 0]) == ""
