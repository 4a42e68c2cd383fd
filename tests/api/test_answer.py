"""The parts of an answer that need no server: stop strings, sampling defaults, ending what is in vain."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.api.chat import PlannedChat, answer_limit
from foveate.api.pictures import gather_or_cancel
from foveate.api.sampling import sampling_params
from foveate.api.schema import ChatCompletionRequest
from foveate.api.stream import Answer
from foveate.api.timing import StageTimes
from foveate.chat.assets import GenerationDefaults, ModelAssets
from foveate.chat.pieces import Prompt
from foveate.config import SamplingSettings
from foveate.engine.messages import Chunk, Ready, SamplingParams, TokenLogprob
from foveate.errors import ContextLengthExceeded, InvalidRequest, Unavailable
from foveate.telemetry import Metrics

DEFAULTS = GenerationDefaults(do_sample=True, temperature=0.7, top_p=0.8, top_k=100, repetition_penalty=1.05)
LIMITS = Ready(
    max_batch_size=8,
    max_input_len=99,
    max_image_tokens=80,
    max_seq_len=100,
    num_blocks=64,
    block_size=16,
    device="cpu",
    dtype="float32",
    kv_cache_dtype="float32",
)
TIMES = StageTimes(Metrics())


def planned(stops: list[str], min_tokens: int = 0) -> PlannedChat:
    sampling = SamplingParams(max_tokens=100, min_tokens=min_tokens)
    return PlannedChat("id", Prompt([1], []), [], sampling, stops, True, 1, 0.0, TIMES, False)


def tell(answer: Answer, token_ids: list[int], reason: Any = None) -> str:
    """Push ids one by one, the last one with the reason, and return the text."""
    text = ""
    for token_id in token_ids[:-1]:
        text += answer.push(Chunk(request_id="id", index=0, token_ids=[token_id])).text
        if answer.reason is not None:
            return text
    last = Chunk(request_id="id", index=0, token_ids=token_ids[-1:], finish_reason=reason)
    return text + answer.push(last).text


@given(
    text=st.text(alphabet="abé你 \n", max_size=30),
    stops=st.lists(st.text("abé你", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_the_text_wherever_tokens_cut_it(assets: ModelAssets, text: str, stops: list[str]) -> None:
    token_ids = assets.tokenizer.encode_text(text)
    answer = Answer(planned(stops), assets.tokenizer)
    told = tell(answer, token_ids, "length")
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    expected = text[: min(ends)[0] + min(ends)[1]] if ends else text
    assert told == expected
    assert answer.reason == ("stop" if ends else "length")


def test_min_tokens_looks_away_from_stop_strings(assets: ModelAssets) -> None:
    [a] = assets.tokenizer.encode_text("A")
    answer = Answer(planned(["AA"], min_tokens=3), assets.tokenizer)
    assert tell(answer, [a] * 8) == "AAA"
    assert (answer.reason, answer.num_tokens) == ("stop", 5)


def test_an_incomplete_character_is_told_at_the_end(assets: ModelAssets) -> None:
    token_ids = assets.tokenizer.encode_text("\U0001f600")
    assert len(token_ids) > 1
    assert tell(Answer(planned([]), assets.tokenizer), token_ids, "length") == "\U0001f600"
    assert tell(Answer(planned(["x"]), assets.tokenizer), token_ids[:-1], "length") == "\ufffd"


def test_logprobs_are_json_numbers(assets: ModelAssets) -> None:
    lowest = TokenLogprob(5, float("-inf"), [(6, 0.0), (10**6, float("-inf"))])
    chunk = Chunk(request_id="id", index=0, token_ids=[5], logprobs=[lowest])
    [entry] = Answer(planned([]), assets.tokenizer).push(chunk).logprobs
    assert entry.logprob == -9999.0
    assert [top.logprob for top in entry.top_logprobs] == [0.0, -9999.0]
    assert (entry.top_logprobs[1].token, entry.top_logprobs[1].bytes) == ("", [])


def test_an_answer_that_the_engine_gives_up_is_an_error(assets: ModelAssets) -> None:
    with pytest.raises(Unavailable):
        tell(Answer(planned([]), assets.tokenizer), [5], "abort")


def asking(**fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "Hello"}]
    return ChatCompletionRequest.model_validate({"model": "m", "messages": messages} | fields)


def chosen(
    defaults: GenerationDefaults = DEFAULTS, server: SamplingSettings | None = None, **fields: Any
) -> SamplingParams:
    return sampling_params(asking(**fields), server or SamplingSettings(), defaults, max_tokens=7, vocab_size=1000)


def test_the_checkpoint_decides_what_the_request_leaves_open() -> None:
    sampling = chosen()
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.8, 100)
    assert (sampling.repetition_penalty, sampling.seed, sampling.max_tokens) == (1.05, None, 7)
    asked = chosen(temperature=1.5, top_p=1.0, top_k=-1, repetition_penalty=1.0, min_p=0.5)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (1.5, 1.0, 0, 0.5)
    assert asked.repetition_penalty == 1.0


@pytest.mark.parametrize(
    "sampling",
    [
        chosen(temperature=0),
        chosen(temperature=1e-9),
        chosen(GenerationDefaults(do_sample=False, temperature=0.7, repetition_penalty=1.05)),
    ],
)
def test_a_request_that_does_not_sample_is_exactly_greedy(sampling: SamplingParams) -> None:
    assert sampling == SamplingParams(max_tokens=7, temperature=0.0)


def test_greedy_takes_the_penalty_that_it_asks_for() -> None:
    assert chosen(temperature=0, repetition_penalty=1.2).repetition_penalty == 1.2


def test_the_server_decides_before_the_checkpoint_and_after_the_request() -> None:
    server = SamplingSettings(temperature=0.2, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.3)
    sampling = chosen(server=server)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.2, 0.5, 3)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.3)
    fields = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert chosen(server=server, **fields) == chosen(**fields)
    # A checkpoint that wants greedy answers is overruled, too.
    assert chosen(GenerationDefaults(do_sample=False), server).temperature == 0.2
    assert chosen(server=SamplingSettings(temperature=0)) == SamplingParams(max_tokens=7, temperature=0.0)
    assert chosen(server=SamplingSettings(repetition_penalty=1.3), temperature=0).repetition_penalty == 1.3


@pytest.mark.parametrize(
    ("fields", "default", "limit"),
    [
        ({}, None, 90),
        ({}, 20, 20),
        ({}, 1000, 90),
        ({"max_tokens": 50}, 20, 50),
        ({"min_tokens": 30}, 20, 30),
    ],
)
def test_the_longest_answer(fields: dict[str, Any], default: int | None, limit: int) -> None:
    request = asking(**fields)
    assert answer_limit(Prompt([1] * 10, []), request, LIMITS, default) == limit


def test_too_much_of_pictures_is_refused_with_both_numbers() -> None:
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "?"}])
    assert answer_limit(Prompt([1] * 90, [[(0, 80)]]), request, LIMITS, None) == 10
    with pytest.raises(ContextLengthExceeded, match=r"pictures have 81 tokens; this server takes at most 80"):
        answer_limit(Prompt([1] * 90, [[(0, 40)], [(40, 41)]]), request, LIMITS, None)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_seeds_of_all_answers_fit_into_64_bits(seed: int) -> None:
    made = chosen(seed=seed).seed
    assert made is not None
    assert 0 <= made <= made + 15 < 2**63


@pytest.mark.parametrize("fields", [{"logit_bias": {"1000": 1}}, {"stop_token_ids": [1000]}, {"min_tokens": 8}])
def test_what_the_model_cannot_do_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chosen(**fields)
    assert caught.value.param == next(iter(fields))


async def test_the_rest_is_ended_when_a_part_fails() -> None:
    ended = asyncio.Event()

    async def endless() -> int:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return 0

    async def failing() -> int:
        await asyncio.sleep(0)
        raise InvalidRequest("no")

    with pytest.raises(InvalidRequest):
        await gather_or_cancel([endless(), failing()])
    assert ended.is_set()
