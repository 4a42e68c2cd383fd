"""Which slices are encoded in the next step: fair between requests, and never more than was measured to fit.

Requests take turns, in the order in which they came. A turn is a picture, or a step's worth of slices if the picture
has more of them. So a picture is finished soon after it is begun, and whoever comes waits for one step at most for each
request before it, however many pages that one has.

A picture (a :class:`Job`) can be wanted by several requests; it is encoded once, in the turn of whichever is first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

J = TypeVar("J", bound="Job")


class Job:
    """One picture's work.

    Args:
        patches: patches of each of its slices, at least one slice.
    """

    def __init__(self, patches: Sequence[int]) -> None:
        assert patches, "a picture has at least one slice"
        self.patches = tuple(patches)
        self.taken = 0
        """Slices that have been handed out in steps; the first ones."""
        self.finished = 0
        """Slices that came back."""

    @property
    def all_taken(self) -> bool:
        """Whether nothing of it waits any more."""
        return self.taken == len(self.patches)

    @property
    def done(self) -> bool:
        """Whether all of it came back."""
        return self.finished == len(self.patches)


class Batcher(Generic[J]):
    """Puts together steps of slices from all waiting pictures. Not safe to use from several threads.

    Args:
        batch_size: most slices in a step.
        max_patches: most patches in a step; no slice may have more.
        usual_patches: most patches in a step of several slices, so that it does not take too long; as ``max_patches``
            if None.
    """

    def __init__(self, batch_size: int, max_patches: int, *, usual_patches: int | None = None) -> None:
        self.batch_size = batch_size
        self.max_patches = max_patches
        self.usual_patches = max_patches if usual_patches is None else min(usual_patches, max_patches)
        # The first request is the one whose turn it is. No job of these is done or all taken, and none is empty.
        self._waiting: OrderedDict[Hashable, deque[J]] = OrderedDict()
        self._taken_in_turn = 0

    def add(self, job: J, request: Hashable) -> None:
        """Have a job done for a request, after the others of that request. It may be waiting for others already."""
        assert max(job.patches) <= self.max_patches, "a slice that no step has room for should have been refused"
        if not job.all_taken:
            self._waiting.setdefault(request, deque()).append(job)

    def remove(self, job: J, request: Hashable) -> None:
        """Undo one :meth:`add`. What no request wants any more waits no longer; removing what is gone is nothing."""
        if request in self._waiting and job in self._waiting[request]:
            self._waiting[request].remove(job)
            self._drop_finished(request)

    def next_step(self) -> list[tuple[J, int]]:
        """Take the slices of the next step: (job, number of the slice in it), fewest patches first; none if none wait.

        Slices of one size are neighbours, so that attention needs no padding.
        """
        step: list[tuple[J, int]] = []
        patches = 0
        while self._waiting and len(step) < self.batch_size:
            request, jobs = next(iter(self._waiting.items()))
            job = jobs[0]
            patches += job.patches[job.taken]
            if step and patches > self.usual_patches:
                break
            step.append((job, job.taken))
            job.taken += 1
            self._taken_in_turn += 1
            if job.all_taken:
                self._forget(job)
            if job.all_taken or self._taken_in_turn == self.batch_size:
                self._end_turn(request)
        return sorted(step, key=lambda item: item[0].patches[item[1]])

    def finish(self, step: Sequence[tuple[J, int]]) -> list[J]:
        """Count a step's slices as done and return the jobs that are done now, each one once."""
        for job, _ in step:
            job.finished += 1
        return [job for job in dict.fromkeys(job for job, _ in step) if job.done]

    @property
    def num_slices(self) -> int:
        """Slices that wait."""
        jobs = {job for waiting in self._waiting.values() for job in waiting}
        return sum(len(job.patches) - job.taken for job in jobs)

    def _end_turn(self, request: Hashable) -> None:
        self._taken_in_turn = 0
        if request in self._waiting:
            self._waiting.move_to_end(request)

    def _forget(self, job: J) -> None:
        """Take a job without waiting slices out of the queues of all that want it."""
        for request in [request for request, jobs in self._waiting.items() if job in jobs]:
            self._drop_finished(request)

    def _drop_finished(self, request: Hashable) -> None:
        is_first = next(iter(self._waiting)) == request
        left = deque(job for job in self._waiting[request] if not job.all_taken)
        if left:
            self._waiting[request] = left
            return
        del self._waiting[request]
        if is_first:
            self._taken_in_turn = 0
