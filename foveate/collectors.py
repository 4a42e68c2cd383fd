"""Metrics whose numbers come from elsewhere: the engine, the vision services, and the machine.

What each number means is said here once: in ``/metrics``, and in ``docs/metrics.md``, which is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from foveate.machine import Gpu, ProcessUse


class EngineCollector(Collector):
    """Shows the engine's own numbers under ``foveate_engine_``, as of the last :meth:`update`."""

    COUNTERS: Mapping[str, str] = {
        "steps": "Steps the engine has run",
        "prompt_tokens": "Prompt tokens of admitted sequences",
        "cached_tokens": "Prompt tokens whose keys and values a prefix hit supplied",
        "generated_tokens": "Tokens sampled",
        "draft_tokens": "Tokens guessed ahead and verified",
        "accepted_tokens": "Guessed tokens that were right",
        "preemptions": "Sequences evicted to be recomputed later",
        "finished": "Sequences that ended by themselves",
        "aborted": "Sequences that were given up",
    }
    GAUGES: Mapping[str, str] = {
        "num_waiting": "Sequences that wait for admission",
        "num_running": "Sequences in the batch",
        "max_batch_size": "Most sequences in the batch",
        "free_blocks": "KV blocks that no sequence holds; a prefix hit may still find some of them",
        "cached_blocks": "KV blocks that a prefix hit can find, held by a sequence or not",
        "total_blocks": "KV blocks",
    }

    def __init__(self) -> None:
        self._stats: Mapping[str, int] = {}

    def update(self, stats: Mapping[str, int]) -> None:
        """Show these numbers from now on; an empty mapping is an engine that is away."""
        self._stats = stats

    def describe(self) -> Iterator[Metric]:
        """Name nothing in advance: what is shown depends on the engine."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each number that the engine gave, and whether it gave any."""
        yield GaugeMetricFamily("foveate_engine_up", "Whether the engine answers", value=float(bool(self._stats)))
        for kind, helps in ((CounterMetricFamily, self.COUNTERS), (GaugeMetricFamily, self.GAUGES)):
            for name, help_text in helps.items():
                if name in self._stats:
                    yield kind(f"foveate_engine_{name}", help_text, value=self._stats[name])


def _arena(name: str, where: str) -> dict[str, str]:
    return {
        f"{name}_blocks": f"Blocks of {where}",
        f"{name}_blocks_free": f"Blocks of {where} that hold nothing",
        f"{name}_blocks_leased": f"Blocks of {where} with rows that the engine has yet to read",
        f"{name}_blocks_longest_free": f"Longest run of free blocks of {where}",
        f"{name}_blocks_writing": f"Blocks of {where} that are being written",
        f"{name}_bytes": f"Size of {where}",
        f"{name}_bytes_leased": f"Bytes of rows in {where} that the engine has yet to read",
        f"{name}_leases": f"Leases of {where} that have not ended",
        f"{name}_leases_died_total": f"Leases of {where} that ended because their reader went away",
        f"{name}_leases_expired_total": f"Leases of {where} that ended because nobody had read in time",
        f"{name}_leases_released_total": f"Leases of {where} that their reader gave back",
        f"{name}_published_bytes_total": f"Bytes of rows written into {where}",
        f"{name}_published_total": f"Pictures written into {where}",
        f"{name}_readers": f"Engines that read from {where}",
        f"{name}_refusals_total": f"Pictures for which {where} had no room in time",
    }


class VisionCollector(Collector):
    """Shows what the vision services say of themselves under ``foveate_vision_``, as of the last :meth:`update`."""

    HELPS: Mapping[str, str] = {
        **_arena("arena", "the arena in shared memory"),
        **_arena("cuda_ipc", "the arena in a GPU's memory"),
        "batches_total": "Steps of the encoder",
        "cache_bytes": "Bytes of embeddings in the cache",
        "cache_capacity_bytes": "Most bytes of embeddings in the cache",
        "cache_entries": "Pictures in the cache",
        "cache_hits_total": "Pictures whose embeddings were in the cache",
        "cache_misses_total": "Pictures whose embeddings were not in the cache",
        "cancelled_pictures_total": "Pictures that were given up",
        "decode_seconds_total": "Time pictures spent being decoded",
        "encode_seconds_total": "Time pictures spent in the encoder's steps; those that share a step count it each",
        "failed_batches_total": "Steps of the encoder that failed",
        "failed_pictures_total": "Pictures that were refused or failed",
        "last_batch_slices": "Slices in the encoder's last step",
        "mean_batch_slices": "Slices in a step of the encoder, mean since its start",
        "patches_total": "Patches encoded",
        "pictures_running": "Pictures under way",
        "pictures_total": "Pictures asked for",
        "pictures_waiting": "Pictures of requests that wait to be let in",
        "queue_seconds_total": "Time pictures waited for the encoder",
        "refused_requests_total": "Requests refused because too many waited",
        "requests_running": "Requests under way",
        "requests_total": "Requests",
        "shared_total": "Pictures that waited for another request's encoding of the same picture",
        "shares": "Pictures that are being encoded for any number of requests",
        "slice_seconds_total": "Time pictures spent being cut into slices",
        "slices_running": "Slices in the encoder now",
        "slices_total": "Slices encoded",
        "slices_waiting": "Slices that wait for the encoder",
        "write_seconds_total": "Time it took to write rows where the engine reads them",
    }

    def __init__(self) -> None:
        self._services: Mapping[str, Mapping[str, float]] = {}
        self._transports: Mapping[str, str] = {}

    def update(self, services: Mapping[str, Mapping[str, float]], transports: Mapping[str, str]) -> None:
        """Show these from now on.

        Args:
            services: each service's numbers, by its address; none for one that is away.
            transport: how each service's rows reach the engine; empty for one that is away.
        """
        self._services, self._transports = services, transports

    def describe(self) -> Iterator[Metric]:
        """Name nothing in advance: what is shown depends on the services."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each number that any service gave, those of a newer version too."""
        up = GaugeMetricFamily("foveate_vision_up", "Whether the service can be used", labels=["service", "transport"])
        for service, transport in self._transports.items():
            up.add_metric([service, transport], float(bool(transport)))
        yield up
        for name in sorted({name for values in self._services.values() for name in values}):
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            help_text = self.HELPS.get(name, name.removesuffix("_total").replace("_", " "))
            family = kind(f"foveate_vision_{name}", help_text, labels=["service"])
            for service, values in self._services.items():
                if name in values:
                    family.add_metric([service], values[name])
            yield family


class MachineCollector(Collector):
    """Shows what the service takes of its machine, as of the last :meth:`update`."""

    def __init__(self) -> None:
        self._gpus: Sequence[Gpu] = ()
        self._processes: Sequence[ProcessUse] = ()

    def update(self, gpus: Sequence[Gpu], processes: Sequence[ProcessUse]) -> None:
        """Show these from now on."""
        self._gpus, self._processes = gpus, processes

    def describe(self) -> Iterator[Metric]:
        """Name nothing in advance, like the others."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield all families; those of the GPUs are empty where there is none."""
        labels = ["gpu", "name"]
        use = GaugeMetricFamily("foveate_gpu_utilization_ratio", "Part of the time that a GPU was busy", labels=labels)
        used = GaugeMetricFamily("foveate_gpu_memory_used_bytes", "A GPU's memory that anybody has", labels=labels)
        total = GaugeMetricFamily("foveate_gpu_memory_bytes", "A GPU's memory", labels=labels)
        for gpu in self._gpus:
            for family, value in ((use, gpu.utilization), (used, gpu.used_bytes), (total, gpu.total_bytes)):
                if value is not None:
                    family.add_metric([str(gpu.number), gpu.name], value)
        cpu = CounterMetricFamily("foveate_process_cpu_seconds", "CPU time of a process", labels=["process"])
        memory = GaugeMetricFamily(
            "foveate_process_resident_memory_bytes",
            "Memory of a process, with what it shares with others",
            labels=["process"],
        )
        for one in self._processes:
            cpu.add_metric([one.name], one.cpu_seconds)
            memory.add_metric([one.name], one.resident_bytes)
        yield from (use, used, total, cpu, memory)
