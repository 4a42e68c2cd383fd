"""Sizes of an arena, and its free blocks."""

from hypothesis import given
from hypothesis import strategies as st

from foveate.transport.layout import FREE, MAX_GENERATION, READY, WRITING, FreeRuns, Layout, block_word

NUM_BLOCKS = 12


def test_the_data_begin_at_a_page_and_may_lie_elsewhere() -> None:
    layout = Layout(block_bytes=8192, num_blocks=513)
    assert (layout.header_bytes, layout.data_bytes) == (8192, 513 * 8192)
    assert layout.file_bytes == 8192 + 513 * 8192
    assert Layout(block_bytes=8192, num_blocks=513, data_in_file=False).file_bytes == 8192


def test_even_nothing_takes_a_block() -> None:
    layout = Layout(block_bytes=4096, num_blocks=4)
    assert [layout.blocks_for(size) for size in (0, 1, 4096, 4097, 8192)] == [1, 1, 1, 2, 2]


def test_words_of_different_uses_and_states_differ_and_fit() -> None:
    generations = (0, 1, 2, MAX_GENERATION)
    words = {block_word(generation, state) for generation in generations for state in (FREE, WRITING, READY)}
    assert len(words) == 12
    assert max(words) < 2**64


@given(st.data())
def test_free_runs_are_those_of_a_plain_set(data: st.DataObject) -> None:
    runs, free, taken = FreeRuns(NUM_BLOCKS), set(range(NUM_BLOCKS)), []
    for _ in range(data.draw(st.integers(0, 30))):
        if taken and data.draw(st.booleans()):
            start, length = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
            runs.give(start, length)
            free |= set(range(start, start + length))
        else:
            length = data.draw(st.integers(1, NUM_BLOCKS))
            fits = [at for at in range(NUM_BLOCKS) if set(range(at, at + length)) <= free]
            found = runs.take(length)
            assert found == (fits[0] if fits else None)
            if found is not None:
                taken.append((found, length))
                free -= set(range(found, found + length))
        longest = [n for n in range(NUM_BLOCKS + 1) if any(set(range(a, a + n)) <= free for a in range(NUM_BLOCKS))]
        assert (runs.total, runs.longest) == (len(free), longest[-1])
