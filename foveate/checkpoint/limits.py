"""Choosing what an engine is built for. Nothing here needs torch."""

from __future__ import annotations

from foveate.checkpoint.engine import Limits
from foveate.errors import ConfigError

MAX_BATCH_SIZE = 8
MAX_INPUT_LEN = 30720
MAX_SEQ_LEN = 32768
MAX_NUM_TOKENS = 32768
MAX_IMAGE_TOKENS = 4096


def choose_limits(
    *,
    trained: int,
    query_num: int,
    max_batch_size: int | None = None,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
    max_num_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> Limits:
    """Take what was given as it is, and fit the defaults of the rest to it and to the model.

    Args:
        trained: tokens of the longest sequence that the model was trained for.
        query_num: tokens of one slice of a picture.
        max_batch_size: sequences that are decoded together.
        max_input_len: tokens of the longest prompt.
        max_seq_len: tokens of the longest prompt and answer together.
        max_num_tokens: tokens in one step.
        max_image_tokens: tokens of a prompt's pictures.

    Raises:
        ConfigError: what was given is impossible; the message names the flag, its value and what was expected.
    """
    given = {
        "--max-batch-size": max_batch_size, "--max-input-len": max_input_len, "--max-seq-len": max_seq_len,
        "--max-num-tokens": max_num_tokens, "--max-image-tokens": max_image_tokens,
    }  # fmt: skip
    for flag, value in given.items():
        if value is not None and value < 1:
            raise ConfigError(f"{flag}: got {value}, expected an integer greater than 0")
    batch = max_batch_size or MAX_BATCH_SIZE
    longest = max_seq_len or min(MAX_SEQ_LEN, trained)
    prompt = max_input_len or min(MAX_INPUT_LEN, longest - 1)
    step = max_num_tokens or max(min(MAX_NUM_TOKENS, batch * longest), batch)
    pictures = max_image_tokens or min(MAX_IMAGE_TOKENS, prompt)
    if longest > trained:
        raise ConfigError(f"--max-seq-len: got {longest}, and the model was trained for {trained} tokens at most")
    if longest < 2:
        raise ConfigError(f"--max-seq-len: got {longest}, expected room for a prompt and an answer")
    if prompt >= longest:
        raise ConfigError(
            f"--max-input-len: got {prompt}, expected less than the {longest} of --max-seq-len: "
            "an answer needs at least one token"
        )
    if step < batch:
        raise ConfigError(
            f"--max-num-tokens: got {step}, expected at least the {batch} of --max-batch-size: "
            "every running sequence needs one token a step"
        )
    if pictures > prompt:
        raise ConfigError(f"--max-image-tokens: got {pictures}, expected at most the {prompt} of --max-input-len")
    if max_image_tokens is not None and max_image_tokens < query_num:
        raise ConfigError(f"--max-image-tokens: got {pictures}, expected at least {query_num}, which one picture takes")
    return Limits(
        max_batch_size=batch, max_input_len=prompt, max_seq_len=longest, max_num_tokens=step, max_image_tokens=pictures
    )
