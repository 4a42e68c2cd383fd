"""Whatever writers, readers, deaths, stalls and time-outs do: a read returns its own bytes or an error."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from foveate.errors import Overloaded, Unavailable
from foveate.transport.arena import Allocation, Arena
from foveate.transport.layout import FREE, READY, WRITING, Layout
from foveate.transport.view import ArenaView

BLOCK = 4096
NUM_BLOCKS = 6
LEASE_SECONDS = 10
LAYOUT = Layout(block_bytes=BLOCK, num_blocks=NUM_BLOCKS)


@dataclass(eq=False)
class Picture:
    """A published picture, as its reader knows it, and what this test knows about its lease."""

    allocation: Allocation
    lease: int
    end: float
    expected: npt.NDArray[np.uint8]
    ended: bool = False


@dataclass(eq=False)
class Stalled:
    """A reader that has looked before its copy and stands in the middle of it."""

    picture: Picture
    copied: npt.NDArray[np.uint8]


class Arenas(RuleBasedStateMachine):
    """One arena, any number of readers, one step at a time."""

    readers: Bundle[str] = Bundle("readers")
    writings: Bundle[tuple[Allocation, npt.NDArray[np.uint8]]] = Bundle("writings")
    pictures: Bundle[Picture] = Bundle("pictures")
    stalled: Bundle[Stalled] = Bundle("stalled")

    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.arena = Arena("test", LAYOUT, lease_seconds=LEASE_SECONDS, wait_seconds=0, clock=lambda: self.now)
        self.view = ArenaView(self.arena.fd, LAYOUT)
        self.num_readers = 0
        self.living: set[str] = set()
        self.writing: list[Allocation] = []
        self.published: list[Picture] = []
        self.uses = 0

    def live(self, picture: Picture) -> bool:
        return not picture.ended and picture.end > self.now

    def states(self) -> list[int]:
        return [int(word) & 3 for word in self.view.words]

    @rule(target=readers)
    def attach(self) -> str:
        self.num_readers += 1
        name = f"engine {self.num_readers}"
        self.arena.add_reader(name)
        self.living.add(name)
        return name

    @rule(reader=consumes(readers))
    def die(self, reader: str) -> None:
        self.arena.remove_reader(reader)
        self.living.discard(reader)
        for picture in self.published:
            picture.ended |= picture.allocation.reader == reader

    @rule(target=writings, reader=readers, num_bytes=st.integers(0, 4 * BLOCK))
    def allocate(self, reader: str, num_bytes: int) -> object:
        needed = LAYOUT.blocks_for(num_bytes)
        states = self.states()
        room = any(set(states[at : at + needed]) == {FREE} for at in range(NUM_BLOCKS - needed + 1))
        try:
            allocation = self.arena.allocate(num_bytes, reader)
        except Overloaded:
            assert not room
            return multiple()
        assert room
        self.uses += 1
        self.writing.append(allocation)
        # Two uses of the same blocks differ in every byte.
        return allocation, ((np.arange(num_bytes) * 7 + self.uses) % 256).astype(np.uint8)

    def write(self, allocation: Allocation, data: npt.NDArray[np.uint8], part: slice) -> None:
        place = self.arena.data[allocation.start * BLOCK :][: allocation.num_bytes]
        place[part] = data[part]

    @rule(writing=writings)
    def write_half(self, writing: tuple[Allocation, npt.NDArray[np.uint8]]) -> None:
        allocation, data = writing
        if allocation in self.writing:
            self.write(allocation, data, slice(0, allocation.num_bytes // 2))

    @rule(target=pictures, writing=consumes(writings))
    def publish(self, writing: tuple[Allocation, npt.NDArray[np.uint8]]) -> object:
        allocation, data = writing
        self.write(allocation, data, slice(None))
        self.writing.remove(allocation)
        try:
            lease = self.arena.publish(allocation)
        except Unavailable:
            assert allocation.reader not in self.living
            return multiple()
        assert allocation.reader in self.living
        picture = Picture(allocation, lease, self.now + LEASE_SECONDS, data)
        self.published.append(picture)
        return picture

    @rule(writing=consumes(writings))
    def abandon(self, writing: tuple[Allocation, npt.NDArray[np.uint8]]) -> None:
        self.arena.abandon(writing[0])
        self.writing.remove(writing[0])

    @rule(picture=pictures)
    def release(self, picture: Picture) -> None:
        self.arena.release(picture.lease)
        picture.ended = True

    @rule(seconds=st.floats(0, LEASE_SECONDS))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    def check(self, picture: Picture) -> bool:
        """Look at the blocks, and say whether they still hold the picture."""
        allocation = picture.allocation
        try:
            self.view.check(allocation.start, allocation.num_bytes, allocation.generation)
        except Unavailable:
            assert not self.live(picture)
            return False
        assert self.live(picture)
        return True

    def copy(self, picture: Picture, out: npt.NDArray[np.uint8], part: slice) -> None:
        out[part] = self.view.data[picture.allocation.start * BLOCK :][: picture.allocation.num_bytes][part]

    @rule(target=stalled, picture=pictures)
    def begin_to_read(self, picture: Picture) -> object:
        if not self.check(picture):
            return multiple()
        out = np.zeros_like(picture.expected)
        self.copy(picture, out, slice(0, out.size // 2))
        return Stalled(picture, out)

    @rule(reading=consumes(stalled))
    def finish_reading(self, reading: Stalled) -> None:
        out = reading.copied
        self.copy(reading.picture, out, slice(out.size // 2, None))
        if self.check(reading.picture):
            assert np.array_equal(out, reading.picture.expected)

    @rule(start=st.integers(0, NUM_BLOCKS), num_blocks=st.integers(1, NUM_BLOCKS), generation=st.integers(0, 40))
    def read_what_was_never_published(self, start: int, num_blocks: int, generation: int) -> None:
        valid = any(
            picture.allocation.generation == generation
            and picture.allocation.start <= start
            and start + num_blocks <= picture.allocation.start + picture.allocation.num_blocks
            for picture in self.published
            if self.live(picture)
        )
        try:
            self.view.check(start, num_blocks * BLOCK, generation)
        except Unavailable:
            assert not valid
        else:
            assert valid

    @invariant()
    def no_block_is_lost(self) -> None:
        stats = self.arena.stats()
        leased = sum(picture.allocation.num_blocks for picture in self.published if self.live(picture))
        writing = sum(allocation.num_blocks for allocation in self.writing)
        assert (stats["blocks_leased"], stats["blocks_writing"]) == (leased, writing)
        assert stats["blocks_free"] == NUM_BLOCKS - leased - writing
        states = self.states()
        assert (states.count(READY), states.count(WRITING)) == (leased, writing)

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        for allocation in self.writing:
            self.arena.abandon(allocation)
        self.now += 2 * LEASE_SECONDS
        stats = self.arena.stats()
        assert (stats["leases"], stats["blocks_longest_free"]) == (0, NUM_BLOCKS)
        assert self.states() == [FREE] * NUM_BLOCKS
        ended = sum(stats[f"leases_{cause}_total"] for cause in ("released", "died", "expired"))
        assert ended == stats["published_total"] == len(self.published)
        self.arena.close()


TestArenas = Arenas.TestCase
TestArenas.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
