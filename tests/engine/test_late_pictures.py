"""A prompt may come before its pictures: it is computed as far as they are there, and nobody waits for it."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from fake_engine import Engine
from fake_model import MAX_SEQ_LEN, UNK, sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.engine.sequence import ImageSpan, Sequence, SequenceStatus
from foveate.engine.step import ScheduledBatch
from foveate.errors import Unavailable

POLICIES = ("guaranteed_no_evict", "max_utilization")
CAT, DOG = ImageSpan([(2, 4)], b"cat"), ImageSpan([(8, 3), (12, 3)], b"dog")
PROMPT = [1, 2, *[UNK] * 4, 3, 4, *[UNK] * 3, 5, *[UNK] * 3, 6, 7]
"""Two pictures: tokens 2 to 5, and 8 to 14 with one in between."""


def two_pictures(name: str = "r", missing: tuple[int, ...] = (1,), **sampling: Any) -> Sequence:
    return sequence(name, PROMPT, [CAT, DOG], missing=missing, **{"ignore_eos": True, **sampling})


def chunks(batch: ScheduledBatch | None) -> list[tuple[str, int, int, bool]]:
    assert batch is not None
    return [(item.seq.request_id, item.start, item.num_tokens, item.samples) for item in batch.items]


def random_prompt(random: Random) -> tuple[list[int], list[ImageSpan]]:
    """Text and pictures in turn, which often begin alike."""
    tokens: list[int] = []
    images: list[ImageSpan] = []
    for _ in range(random.randint(1, 3)):
        tokens += [1, 2, 3][: random.randint(0, 3)]
        ranges = []
        for _ in range(random.randint(1, 2)):
            ranges.append((len(tokens), random.randint(1, 5)))
            tokens += [UNK] * ranges[-1][1] + [4] * random.randint(0, 1)
        images.append(ImageSpan(ranges, random.choice([b"cat", b"dog", b""])))
    return [*tokens, 5], images


def add_randomly(engine: Engine, random: Random, name: str) -> None:
    tokens, images = random_prompt(random)
    missing = [number for number, image in enumerate(images) if random.random() < 0.5 or not image.digest]
    tokens = tokens[: MAX_SEQ_LEN - 1]
    ends = {"ignore_eos": random.random() < 0.7, "max_tokens": random.randint(1, 12)}
    engine.add(*(sequence(name, tokens, images, index, missing, **ends) for index in range(random.choice([1, 1, 2]))))


def bring_one(engine: Engine, random: Random) -> None:
    """Bring a picture of anybody's, for all of that request; at times another one than was announced."""
    missing = [(seq.request_id, number) for seq in engine.added if seq not in engine.ended for number in seq.missing]
    if not missing:
        return
    name, number = random.choice(missing)
    digest = b"cow" if random.random() < 0.1 else None
    engine.supply_all(name, number, digest)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=600)
def test_everybody_is_answered_as_if_the_pictures_had_been_there(seed: int) -> None:
    random = Random(seed)
    engine = Engine.draw(random)
    for number in range(random.randint(20, 60)):
        match random.randrange(10):
            case 0 | 1:
                add_randomly(engine, random, f"r{number}")
            case 2 | 3 | 4:
                bring_one(engine, random)
            case 5 if random.random() < 0.3 and engine.added:
                engine.abort(random.choice(engine.added).request_id)
            case 6 if random.random() < 0.2:
                engine.step(fault=random.choice(["launch", "end"]))
            case _:
                engine.step()
    engine.finish()


def test_a_prompt_is_computed_up_to_the_picture_that_is_missing() -> None:
    engine = Engine(num_blocks=30)
    seq = two_pictures()
    engine.add(seq)
    assert chunks(engine.step()) == [("r", 0, 8, False)]
    assert seq.stalled
    assert not engine.scheduler.has_work
    assert engine.scheduler.schedule() is None
    assert engine.scheduler.stats().num_running == 1
    engine.supply(seq, 1)
    assert chunks(engine.step()) == [("r", 8, 9, True)]
    engine.finish()


def test_a_prompt_that_begins_with_a_missing_picture_is_not_admitted() -> None:
    engine = Engine(num_blocks=30)
    seq = sequence("r", [UNK, UNK, 1], [ImageSpan([(0, 2)], b"cat")], missing=[0])
    engine.add(seq, sequence("text", [1, 2, 3]))
    assert chunks(engine.step()) == [("text", 0, 3, True)]
    assert (seq.status, seq.block_table) == (SequenceStatus.WAITING, [])
    engine.finish()


def test_others_are_admitted_behind_one_that_stalls_and_both_go_on_together() -> None:
    engine = Engine(num_blocks=30, max_num_tokens=8, max_batch_size=3)
    early, text = two_pictures(), sequence("text", [7] * 12, ignore_eos=True)
    engine.add(early)
    engine.step()
    engine.add(text)
    assert chunks(engine.step()) == [("text", 0, 8, False)]
    engine.supply(early, 1)
    # The older one takes what there is; the other one has its one token.
    assert chunks(engine.step()) == [("r", 8, 7, False), ("text", 8, 1, False)]
    assert chunks(engine.step()) == [("r", 15, 2, True), ("text", 9, 3, True)]
    engine.finish()


def test_a_prefix_hit_needs_no_rows() -> None:
    engine = Engine(num_blocks=30)
    engine.add(two_pictures("first", missing=()))
    engine.finish()
    again = two_pictures(missing=(0, 1))
    engine.add(again)
    assert chunks(engine.step()) == [("r", 16, 1, True)]
    assert again.missing == {0, 1}
    while engine.scheduler.has_work:
        engine.step()
    assert again.status is SequenceStatus.FINISHED
    engine.finish()


def test_a_hit_that_ends_within_a_missing_picture_starts_nothing() -> None:
    engine = Engine(num_blocks=30)
    engine.add(sequence("first", PROMPT[:13], [CAT, ImageSpan([(8, 3), (12, 1)], b"dog")]))
    engine.finish()
    seq = two_pictures()
    engine.add(seq)
    assert not engine.scheduler.has_work
    engine.supply(seq, 1)
    assert chunks(engine.step()) == [("r", 12, 5, True)]
    engine.finish()


def test_a_digest_that_was_not_known_names_the_blocks_once_it_is() -> None:
    engine = Engine(num_blocks=30)
    seq = sequence("r", PROMPT, [CAT, ImageSpan(DOG.ranges, b"")], missing=[1])
    engine.add(seq)
    engine.step()
    assert engine.scheduler.allocator.num_cached == 2
    engine.supply(seq, 1, b"dog")
    engine.finish()
    again = two_pictures("again", missing=())
    engine.add(again)
    engine.step()
    assert again.num_cached_tokens == 16
    engine.finish()


@pytest.mark.parametrize("hit", [False, True])
def test_another_picture_than_announced_never_passes_for_it(hit: bool) -> None:
    engine = Engine(num_blocks=30)
    if hit:
        engine.add(two_pictures("first", missing=()))
        engine.finish()
    seq = two_pictures(max_tokens=8)
    engine.add(seq)
    engine.step()
    if hit:  # What the cache had in its place was read already.
        with pytest.raises(Unavailable, match="otherwise than expected"):
            seq.supply(1, b"cow")
        engine.finish()
        return
    engine.supply(seq, 1, b"cow")
    engine.finish()
    for name, digest, cached in (("dog", b"dog", 8), ("cow", b"cow", 16)):
        other = sequence(name, PROMPT, [CAT, ImageSpan(DOG.ranges, digest)])
        engine.add(other)
        engine.step()
        assert other.num_cached_tokens == cached
    engine.finish()


@pytest.mark.parametrize("policy", POLICIES)
def test_who_stalls_makes_room_for_others(policy: str) -> None:
    engine = Engine(num_blocks=30, max_batch_size=2, scheduler_policy=policy)
    early = [sequence(name, [ord(name), *PROMPT[1:]], [CAT, DOG], missing=[1], ignore_eos=True) for name in "ab"]
    engine.add(*early)
    engine.step()
    assert engine.scheduler.stats().num_running == 2
    text = sequence("text", [7] * 6, max_tokens=3, ignore_eos=True)
    engine.add(text)
    assert chunks(engine.step()) == [("text", 0, 6, True)]
    assert engine.scheduler.running == [early[0], text]
    # It waits for its picture, not for a place, and does not come back for nothing.
    assert list(engine.scheduler.waiting) == [early[1]]
    while engine.scheduler.has_work:
        engine.step()
    assert text.status is SequenceStatus.FINISHED
    assert list(engine.scheduler.waiting) == [early[1]]
    engine.supply(early[1], 1)
    # What it had computed is in the prefix cache.
    assert chunks(engine.step()) == [("b", 8, 9, True)]
    engine.finish()


def test_one_that_is_part_of_this_step_does_not_make_room() -> None:
    engine = Engine(num_blocks=30, max_batch_size=1)
    engine.add(two_pictures(), sequence("text", [7] * 6))
    assert chunks(engine.step()) == [("r", 0, 8, False)]
    assert chunks(engine.step()) == [("text", 0, 6, True)]
    engine.finish()


def test_an_abort_frees_the_blocks_of_one_that_stalls() -> None:
    engine = Engine(num_blocks=30)
    engine.add(two_pictures())
    engine.step()
    engine.abort("r")
    assert engine.scheduler.stats().free_blocks == 30
    engine.finish()
