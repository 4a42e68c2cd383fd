"""What makes up a step: every slice once, within the limits, and nobody waits for another's document."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from foveate.vision.batcher import Batcher, Job

MAX_PATCHES = 100
PATCHES = st.lists(st.integers(1, MAX_PATCHES), min_size=1, max_size=12)


def sizes(step: list[tuple[Job, int]]) -> list[int]:
    return [job.patches[number] for job, number in step]


class Requests(RuleBasedStateMachine):
    """Requests come, share jobs, give up; steps go out and come back."""

    waiting = Bundle("waiting")

    @initialize(batch_size=st.integers(1, 8))
    def start(self, batch_size: int) -> None:
        self.batcher: Batcher[Job] = Batcher(batch_size, MAX_PATCHES)
        self.wanted: dict[Job, list[str]] = {}
        self.ever: set[Job] = set()
        self.taken: dict[Job, list[int]] = {}
        self.steps: list[list[tuple[Job, int]]] = []
        self.finished: list[Job] = []

    @rule(target=waiting, request=st.sampled_from("abc"), patches=PATCHES)
    def add(self, request: str, patches: list[int]) -> tuple[Job, str]:
        job = Job(patches)
        self.ever.add(job)
        self.wanted[job] = [request]
        self.batcher.add(job, request)
        return job, request

    @rule(target=waiting, known=waiting, request=st.sampled_from("abcd"))
    def share(self, known: tuple[Job, str], request: str) -> tuple[Job, str]:
        job, _ = known
        # A job that everybody gave up is not shared any more: its picture is a new job.
        if not self.wanted.get(job):
            return known
        self.wanted[job].append(request)
        self.batcher.add(job, request)
        return job, request

    @rule(known=consumes(waiting))
    def give_up(self, known: tuple[Job, str]) -> None:
        job, request = known
        if request in self.wanted.get(job, []):
            self.wanted[job].remove(request)
            self.batcher.remove(job, request)

    @rule()
    def take(self) -> None:
        before = self.unfinished()
        step = self.batcher.next_step()
        assert bool(step) == bool(before)
        assert len(step) <= self.batcher.batch_size
        assert sum(sizes(step)) <= MAX_PATCHES
        assert sizes(step) == sorted(sizes(step))
        for job, number in step:
            assert self.wanted[job], "nobody wants it"
            self.taken.setdefault(job, []).append(number)
        self.steps.append(step)

    @rule()
    def come_back(self) -> None:
        if self.steps:
            self.finished += self.batcher.finish(self.steps.pop(0))

    def unfinished(self) -> set[Job]:
        return {job for job, requests in self.wanted.items() if requests and not job.all_taken}

    @invariant()
    def nothing_is_lost_or_done_twice(self) -> None:
        if not hasattr(self, "batcher"):
            return
        assert self.batcher.num_slices == sum(len(job.patches) - job.taken for job in self.unfinished())
        for job, numbers in self.taken.items():
            assert sorted(numbers) == list(range(job.taken))
        assert len(set(self.finished)) == len(self.finished)

    def teardown(self) -> None:
        """Run to the end: whatever is still wanted is finished, and nothing else is left."""
        while self.batcher.num_slices:
            self.take()
        while self.steps:
            self.come_back()
        for job, requests in self.wanted.items():
            assert not requests or (job.done and job in self.finished)
        assert self.batcher.next_step() == []


TestRequests = Requests.TestCase


@given(st.integers(1, 16), st.lists(st.lists(PATCHES, min_size=1, max_size=10), min_size=1, max_size=6))
def test_a_request_that_comes_waits_for_one_step_of_each_before_it(
    batch_size: int, requests: list[list[list[int]]]
) -> None:
    batcher: Batcher[Job] = Batcher(batch_size, 10_000)
    for name, pictures in enumerate(requests):
        for patches in pictures:
            batcher.add(Job(patches), name)
    thumbnail = Job([1])
    batcher.add(thumbnail, "thumbnail")
    steps = 0
    while not thumbnail.all_taken:
        batcher.next_step()
        steps += 1
    assert steps <= len(requests) + 1


def test_a_thumbnail_waits_for_one_page_of_the_document() -> None:
    batcher: Batcher[Job] = Batcher(16, 16 * 1000)
    for _ in range(64):
        batcher.add(Job([1000] * 10), "document")
    batcher.next_step()
    thumbnail = Job([16])
    batcher.add(thumbnail, "thumbnail")
    batcher.next_step()
    assert thumbnail.all_taken


def test_pictures_of_equal_requests_finish_one_after_the_other() -> None:
    batcher: Batcher[Job] = Batcher(4, 4000)
    jobs = [Job([1000] * 3) for _ in range(4)]
    for number, job in enumerate(jobs):
        batcher.add(job, number)
    done = []
    while step := batcher.next_step():
        done.append([jobs.index(job) for job in batcher.finish(step)])
    assert done == [[0], [1], [2, 3]]


def test_a_shared_picture_is_done_in_the_turn_of_the_first_who_wants_it() -> None:
    batcher: Batcher[Job] = Batcher(2, 4000)
    pages = [Job([1000] * 2) for _ in range(9)]
    for page in pages:
        batcher.add(page, "document")
    batcher.add(pages[-1], "other")
    taken = [{job for job, _ in batcher.next_step()} for _ in range(2)]
    assert taken == [{pages[0]}, {pages[-1]}]
    assert batcher.num_slices == 14


def test_steps_are_kept_short_but_a_large_slice_goes_alone() -> None:
    batcher: Batcher[Job] = Batcher(16, 5000, usual_patches=2500)
    batcher.add(Job([1000] * 5 + [4000]), "document")
    taken = []
    while step := batcher.next_step():
        taken.append(sizes(step))
    assert taken == [[1000, 1000], [1000, 1000], [1000], [4000]]


@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=2, max_size=12), st.integers(60, 150))
def test_steps_are_kept_short_with_any_number_of_pictures_and_the_oldest_goes_first(
    pictures: list[list[int]], usual: int
) -> None:
    batcher: Batcher[Job] = Batcher(16, 1000, usual_patches=usual)
    jobs = [Job(patches) for patches in pictures]
    for request, job in enumerate(jobs):
        batcher.add(job, request)
    done: list[Job] = []
    while step := batcher.next_step():
        assert sum(sizes(step)) <= usual
        oldest = next(job for job in jobs if job not in done)
        assert oldest in {job for job, _ in step}
        # The step is full: not even the next slice would have had room.
        following = next((job for job in jobs if not job.all_taken), None)
        assert following is None or len(step) == 16 or sum(sizes(step)) + following.patches[following.taken] > usual
        done += batcher.finish(step)
        assert set(done) == set(jobs[: len(done)])
    assert len(done) == len(jobs)
