"""What ``foveate top`` shows, from two samples of ``/metrics``. None is what the server does not tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foveate.client.metrics import Histogram, Interval, Sample, share

CHAT_ROUTE = "/v1/chat/completions"
HUNG_UP = "499"


@dataclass(frozen=True, slots=True)
class Recent:
    """A number of the last interval, and the same since the server's start."""

    interval: float | None
    start: float | None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of times in seconds, estimated from a histogram's buckets."""

    count: float
    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Latency:
    """How long something took in the last interval, and since the server's start."""

    interval: Percentiles | None
    start: Percentiles | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of the server's machine: its use is a share of the time."""

    gpu: str
    name: str
    utilization: float | None
    memory_used_bytes: float | None
    memory_bytes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A server at one moment, and in the interval before it.

    Attributes:
        seconds: the interval; None if there is none yet, and then nothing of an interval is known.
        requests_running: chat completions under way.
        requests_queued: sequences that the engine has not begun with.
        requests_per_second: chat completions that ended, in whatever way.
        refused: those that ended with a 4xx status.
        failed: those that ended with a 5xx status.
        hung_up: those whose client went before its answer began.
        errors: errors that clients were told since the start, by their code.
        restarts: how often a process of the server died, by its name.
        prompt_tokens_per_second: of admitted sequences, with those that the prefix cache supplied.
        output_tokens_per_second: tokens sampled.
        batch_size: sequences in the engine's batch.
        tokens_per_step: tokens sampled in each of the engine's steps, on average.
        aborted: sequences that were given up: their client went, or a stop string ended their answer.
        preemptions: sequences that were evicted, to be computed again.
        kv_blocks: all of them.
        kv_blocks_used: those that sequences use.
        kv_blocks_cached: those that a prefix hit can find, in use or not.
        prefix_hit_rate: the share of the prompts' tokens that the prefix cache supplied.
        vision_services: all of them.
        vision_services_up: those that can be used.
        vision_batches_per_second: the encoders' steps.
        slices_per_batch: on average.
        pictures_waiting: not begun with.
        pictures_running: begun with.
        embedding_hit_rate: the share of pictures whose embeddings were in a cache.
        arena_bytes: the arenas' memory, through which embeddings go to the engine.
        arena_used: the share of it that is in use.
        gpus: by number.
        latencies: ``first_token``, ``output_token`` (each after the first), ``request``, and the stages by name.
    """

    seconds: float | None
    requests_running: float | None
    requests_queued: float | None
    requests_per_second: float | None
    refused: Recent
    failed: Recent
    hung_up: Recent
    errors: Mapping[str, float]
    restarts: Mapping[str, float]
    prompt_tokens_per_second: float | None
    output_tokens_per_second: float | None
    batch_size: float | None
    tokens_per_step: float | None
    aborted: Recent
    preemptions: Recent
    kv_blocks: float | None
    kv_blocks_used: float | None
    kv_blocks_cached: float | None
    prefix_hit_rate: Recent
    vision_services: int | None
    vision_services_up: int | None
    vision_batches_per_second: float | None
    slices_per_batch: float | None
    pictures_waiting: float | None
    pictures_running: float | None
    embedding_hit_rate: Recent
    arena_bytes: float | None
    arena_used: float | None
    gpus: Sequence[Gpu]
    latencies: Mapping[str, Latency]


def snapshot(before: Sample | None, now: Sample) -> Snapshot:
    """Say how the server is doing.

    Args:
        before: the sample at the interval's beginning; None if there is none.
        now: the newest one.
    """
    start = Interval(None, now)
    recent = Interval(before, now) if before else None

    def both(name: str, **labels: str) -> Recent:
        return Recent(recent.increase(name, **labels) if recent else None, start.increase(name, **labels))

    def rate(name: str) -> float | None:
        return recent.rate(name) if recent else None

    def ratio(part: str, *whole: str) -> Recent:
        return Recent(_ratio(recent, part, whole), _ratio(start, part, whole))

    up = now.by_label("foveate_vision_up", "service")
    return Snapshot(
        seconds=recent.seconds if recent else None,
        requests_running=now.value("foveate_requests_running"),
        requests_queued=now.value("foveate_engine_num_waiting"),
        requests_per_second=share(_ended(recent), recent.seconds if recent else None),
        refused=Recent(_ended(recent, "4"), _ended(start, "4")),
        failed=Recent(_ended(recent, "5"), _ended(start, "5")),
        hung_up=Recent(_ended(recent, HUNG_UP), _ended(start, HUNG_UP)),
        errors=now.by_label("foveate_errors_total", "type"),
        restarts=now.by_label("foveate_restarts_total", "process"),
        prompt_tokens_per_second=rate("foveate_engine_prompt_tokens_total"),
        output_tokens_per_second=rate("foveate_engine_generated_tokens_total"),
        batch_size=now.value("foveate_engine_num_running"),
        tokens_per_step=_ratio(recent, "foveate_engine_generated_tokens_total", ("foveate_engine_steps_total",)),
        aborted=both("foveate_engine_aborted_total"),
        preemptions=both("foveate_engine_preemptions_total"),
        kv_blocks=now.value("foveate_engine_total_blocks"),
        kv_blocks_used=_kv_blocks_used(now),
        kv_blocks_cached=now.value("foveate_engine_cached_blocks"),
        prefix_hit_rate=ratio("foveate_engine_cached_tokens_total", "foveate_engine_prompt_tokens_total"),
        vision_services=len(up) if up else None,
        vision_services_up=sum(map(bool, up.values())) if up else None,
        vision_batches_per_second=rate("foveate_vision_batches_total"),
        slices_per_batch=_ratio(recent, "foveate_vision_slices_total", ("foveate_vision_batches_total",)),
        pictures_waiting=now.value("foveate_vision_pictures_waiting"),
        pictures_running=now.value("foveate_vision_pictures_running"),
        embedding_hit_rate=ratio(
            "foveate_vision_cache_hits_total", "foveate_vision_cache_hits_total", "foveate_vision_cache_misses_total"
        ),
        arena_bytes=now.value("foveate_vision_arena_bytes"),
        arena_used=_arena_used(now),
        gpus=_gpus(now),
        latencies=_latencies(recent, start),
    )


def _ended(interval: Interval | None, status: str = "") -> float | None:
    """Count the chat completions that ended with a status that begins so; a client that hung up is no refusal."""
    if interval is None:
        return None
    statuses = interval.now.by_label("foveate_requests_total", "status")
    wanted = [one for one in statuses if one.startswith(status) and (one != HUNG_UP or status in ("", HUNG_UP))]
    counts = [interval.increase("foveate_requests_total", route=CHAT_ROUTE, status=one) for one in wanted]
    known = [count for count in counts if count is not None]
    return sum(known) if statuses and len(known) == len(counts) else None


def _ratio(interval: Interval | None, part: str, whole: Sequence[str]) -> float | None:
    if interval is None:
        return None
    counts = [interval.increase(name) for name in whole]
    return share(interval.increase(part), sum(count or 0.0 for count in counts))


def _kv_blocks_used(now: Sample) -> float | None:
    total, free = now.value("foveate_engine_total_blocks"), now.value("foveate_engine_free_blocks")
    return None if total is None or free is None else total - free


def _arena_used(now: Sample) -> float | None:
    free = share(now.value("foveate_vision_arena_blocks_free"), now.value("foveate_vision_arena_blocks"))
    return None if free is None else 1 - free


def _gpus(now: Sample) -> list[Gpu]:
    names = ("utilization_ratio", "memory_used_bytes", "memory_bytes")
    values = [now.by_label(f"foveate_gpu_{name}", "gpu") for name in names]
    products = {
        dict(labels).get("gpu", ""): dict(labels).get("name", "")
        for name in names
        for labels in now.series.get(f"foveate_gpu_{name}", {})
    }
    return [Gpu(gpu, products[gpu], *(value.get(gpu) for value in values)) for gpu in sorted(products)]


def _latencies(recent: Interval | None, start: Interval) -> dict[str, Latency]:
    found: dict[str, Latency] = {}

    def add(key: str, name: str, **labels: str) -> None:
        whole = start.histogram(name, **labels)
        if whole is not None:
            last = recent.histogram(name, **labels) if recent else None
            found[key] = Latency(_percentiles(last) if last else None, _percentiles(whole))

    add("first_token", "foveate_time_to_first_token_seconds")
    add("output_token", "foveate_time_per_output_token_seconds")
    add("request", "foveate_request_seconds")
    for stage in start.now.by_label("foveate_stage_seconds_count", "stage"):
        add(stage, "foveate_stage_seconds", stage=stage)
    return found


def _percentiles(histogram: Histogram) -> Percentiles:
    return Percentiles(histogram.count, *(histogram.quantile(q) for q in (0.5, 0.95, 0.99)))
