"""What an engine is built for: defaults fit the model, wishes are kept or refused."""

from __future__ import annotations

import msgspec
import pytest

from foveate.checkpoint.limits import choose_limits
from foveate.errors import ConfigError


def chosen(trained: int = 32768, **given: int) -> tuple[int, ...]:
    return msgspec.structs.astuple(choose_limits(trained=trained, query_num=64, **given))


def test_defaults() -> None:
    assert chosen() == (8, 30720, 32768, 32768, 4096)


def test_defaults_are_clipped_to_the_model_and_to_what_was_given() -> None:
    assert chosen(trained=8192) == (8, 8191, 8192, 32768, 4096)
    assert chosen(trained=131072) == (8, 30720, 32768, 32768, 4096)
    assert chosen(max_seq_len=1000) == (8, 999, 1000, 8000, 999)
    assert chosen(max_input_len=500) == (8, 500, 32768, 32768, 500)
    assert chosen(trained=1000, max_batch_size=2) == (2, 999, 1000, 2000, 999)
    assert chosen(max_seq_len=50) == (8, 49, 50, 400, 49)


def test_what_is_given_is_kept() -> None:
    given = {"max_batch_size": 3, "max_input_len": 40, "max_seq_len": 100, "max_num_tokens": 7}
    assert chosen(trained=100, **given) == (3, 40, 100, 7, 40)
    assert chosen(max_image_tokens=64)[4] == 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_seq_len": 32769}, r"--max-seq-len: got 32769, and the model was trained for 32768 tokens at most"),
        ({"max_input_len": 32768}, r"--max-input-len: got 32768, expected less than the 32768 of --max-seq-len"),
        ({"max_batch_size": 9, "max_num_tokens": 8}, r"--max-num-tokens: got 8, expected at least the 9"),
        ({"max_input_len": 100, "max_image_tokens": 101}, r"--max-image-tokens: got 101, expected at most the 100"),
        ({"max_image_tokens": 63}, r"--max-image-tokens: got 63, expected at least 64"),
        ({"max_batch_size": 0}, r"--max-batch-size: got 0, expected an integer greater than 0"),
        ({"max_num_tokens": -1}, r"--max-num-tokens: got -1"),
        ({"max_seq_len": 1}, r"--max-seq-len: got 1, expected room for a prompt and an answer"),
    ],
)
def test_the_impossible_is_refused_with_its_numbers(given: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(**given)
