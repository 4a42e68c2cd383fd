"""How a request's tokens are chosen: its own fields over the server's settings over the checkpoint's defaults."""

from __future__ import annotations

from typing import TypeVar

from foveate.api.schema import ChatCompletionRequest
from foveate.chat.assets import GenerationDefaults
from foveate.config import SamplingSettings
from foveate.engine.messages import SamplingParams
from foveate.errors import InvalidRequest

T = TypeVar("T")

GREEDY_BELOW = 1e-5
"""Temperatures under this one are 0: dividing by them would leave the range of float32."""
_MIN_TOP_P = 1e-6
"""Stands for top_p 0, of which only the likeliest token is left."""
_SEEDS = 2**63 - 2**16
"""Seeds fold into [0, this), so that ``seed + i`` fits into 64 bits too."""


def sampling_params(
    request: ChatCompletionRequest,
    server: SamplingSettings,
    checkpoint: GenerationDefaults,
    *,
    max_tokens: int,
    vocab_size: int,
) -> SamplingParams:
    """Decide every parameter.

    A request that does not sample is exactly greedy: the checkpoint's repetition penalty, which would change
    the answer, then applies only if the request or the server asks for it.

    Args:
        request: what the client asked for.
        server: what the server's settings say for all requests.
        checkpoint: its ``generation_config.json``.
        max_tokens: most tokens of the answer, already checked against the server's limits.
        vocab_size: entries of the model's output.

    Raises:
        InvalidRequest: a token id is not in the vocabulary, or min_tokens cannot be reached.
    """
    _check_ids(request, vocab_size)
    if (request.min_tokens or 0) > max_tokens:
        message = f"'min_tokens' is {request.min_tokens}, but at most {max_tokens} fit behind the prompt."
        raise InvalidRequest(message, param="min_tokens")
    own_temperature = checkpoint.temperature if checkpoint.do_sample else 0.0
    temperature = _first(request.temperature, server.temperature, own_temperature)
    greedy = temperature < GREEDY_BELOW
    top_k = max(_first(request.top_k, server.top_k, checkpoint.top_k), 0)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        temperature=0.0 if greedy else temperature,
        top_k=0 if greedy or top_k >= vocab_size else top_k,
        top_p=1.0 if greedy else max(_first(request.top_p, server.top_p, checkpoint.top_p), _MIN_TOP_P),
        min_p=0.0 if greedy else _first(request.min_p, server.min_p, 0.0),
        repetition_penalty=_first(
            request.repetition_penalty, server.repetition_penalty, 1.0 if greedy else checkpoint.repetition_penalty
        ),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=None if request.seed is None else request.seed % _SEEDS,
        logit_bias=request.logit_bias or {},
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
        logprobs=bool(request.logprobs),
        top_logprobs=min(request.top_logprobs or 0, vocab_size),
    )


def _check_ids(request: ChatCompletionRequest, vocab_size: int) -> None:
    for field, ids in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
        for token_id in ids or ():
            if token_id >= vocab_size:
                message = f"'{field}' names token {token_id}, but the vocabulary ends at {vocab_size - 1}."
                raise InvalidRequest(message, param=field)


def _first(asked: T | None, server: T | None, own: T) -> T:
    return asked if asked is not None else own if server is None else server
