"""What two samples of ``/metrics`` say together: rates, shares, and percentiles of histograms."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from foveate.errors import FoveateError

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by size, as Prometheus keeps them.

    Attributes:
        bounds: the upper bounds of the buckets, ascending; the last is infinity.
        counts: for each of them, how many observations were at most so large.
    """

    bounds: Sequence[float]
    counts: Sequence[float]

    @property
    def count(self) -> float:
        """How many observations there are."""
        return self.counts[-1] if self.counts else 0.0

    def since(self, before: Histogram | None) -> Histogram:
        """Return the observations that are not in an earlier sample.

        Where the earlier one has more, or other buckets, the process was started again and everything is new.
        """
        if before is None or before.bounds != self.bounds:
            return self
        counts = [new - old for new, old in zip(self.counts, before.counts, strict=True)]
        # As a whole: taken bucket by bucket, counts of both lives would be mixed.
        return self if any(count < 0 for count in counts) else Histogram(self.bounds, counts)

    def quantile(self, q: float) -> float | None:
        """Return a quantile as Prometheus' ``histogram_quantile`` estimates it, or None without observations.

        Within a bucket, observations are taken to be spread evenly, from 0 in the first one. Above the largest finite
        bound there is nothing to go by, so that bound is the answer.

        Args:
            q: from 0 to 1.
        """
        if not self.count:
            return None
        rank = q * self.count
        index = next(i for i, count in enumerate(self.counts) if count >= rank and count > 0)
        lower, below = (self.bounds[index - 1], self.counts[index - 1]) if index else (0.0, 0.0)
        upper = self.bounds[index]
        if math.isinf(upper):
            return lower
        return lower + (upper - lower) * (rank - below) / (self.counts[index] - below)


@dataclass(frozen=True, slots=True)
class Sample:
    """The numbers of one moment.

    Attributes:
        time: when they were taken, in seconds of any clock.
        series: each name's values, by their labels.
    """

    time: float
    series: Mapping[str, Mapping[Labels, float]]

    @classmethod
    def parse(cls, text: str, time: float) -> Sample:
        """Read Prometheus' text format.

        Raises:
            FoveateError: this is something else.
        """
        series: dict[str, dict[Labels, float]] = defaultdict(dict)
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    series[sample.name][frozenset(sample.labels.items())] = sample.value
        except (ValueError, KeyError, IndexError) as error:
            raise FoveateError("/metrics is not in Prometheus' text format") from error
        return cls(time, dict(series))

    def value(self, name: str) -> float | None:
        """Return the sum of a name's values over all labels, or None if there is no such number."""
        found = self.series.get(name)
        return sum(found.values()) if found else None

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Return a name's values by one of its labels, summed over the others."""
        sums: dict[str, float] = defaultdict(float)
        for labels, value in self.series.get(name, {}).items():
            sums[dict(labels).get(label, "")] += value
        return dict(sums)

    def histogram(self, name: str, **labels: str) -> Histogram | None:
        """Return a histogram, summed over all labels but the given ones, or None if there is none."""
        sums: dict[float, float] = defaultdict(float)
        for found, value in self.series.get(f"{name}_bucket", {}).items():
            if found >= labels.items():
                sums[float(dict(found)["le"])] += value
        return Histogram(tuple(sorted(sums)), tuple(sums[bound] for bound in sorted(sums))) if sums else None


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened between two samples; without the first one, since the server's start."""

    before: Sample | None
    now: Sample

    @property
    def seconds(self) -> float | None:
        """How long it took; None since the start, which no sample tells."""
        return self.now.time - self.before.time if self.before else None

    def increase(self, name: str, **labels: str) -> float | None:
        """Return by how much a counter grew, over all labels but the given ones; None if one sample lacks it.

        One that is smaller than before has begun again at 0, because its process was started again.
        """
        after = self.now.series.get(name)
        if after is None or (self.before is not None and name not in self.before.series):
            return None
        old = self.before.series[name] if self.before else {}
        wanted = {found: value for found, value in after.items() if found >= labels.items()}
        return sum(
            value - old.get(found, 0.0) if value >= old.get(found, 0.0) else value for found, value in wanted.items()
        )

    def rate(self, name: str) -> float | None:
        """Return by how much a counter grew each second."""
        return share(self.increase(name), self.seconds)

    def histogram(self, name: str, **labels: str) -> Histogram | None:
        """Return the observations of the interval, or None if there is no such histogram."""
        found = self.now.histogram(name, **labels)
        return found.since(self.before.histogram(name, **labels) if self.before else None) if found else None


def share(part: float | None, whole: float | None) -> float | None:
    """Return a part of a whole, or None if either is unknown or there is no whole."""
    return part / whole if part is not None and whole else None
