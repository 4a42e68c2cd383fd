"""Chat completions in one piece, through OpenAI's own client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from chat_messages import GOLDEN, golden_cases, golden_messages, picture, user
from safetensors.numpy import load_file
from serving import RunningServer

from foveate.chat.assets import ModelAssets
from foveate.chat.template import Message, TextPart

CASES = golden_cases()
HELLO = [{"role": "user", "content": "Hello, who are you?"}]


def ask(client: openai.OpenAI, messages: Any = HELLO, *, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"model": "model", "temperature": 0, "max_tokens": 12} | fields
    return client.chat.completions.create(messages=messages, extra_body=extra, **fields)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("penalty", [None, 1.05])
def test_answers_are_the_published_models(
    client: openai.OpenAI, assets: ModelAssets, name: str, penalty: float | None
) -> None:
    case = CASES[name]
    key = "greedy_ids" if penalty is None else "greedy_rp1.05_ids"
    tensors = load_file(GOLDEN / "tiny" / case["file"])
    expected = [int(token) for token in tensors.get(f"{key}_fullmask", tensors[key])]
    extra = {"ignore_eos": True, "skip_special_tokens": False, "repetition_penalty": penalty}
    answer = ask(client, golden_messages(case["messages"]), max_tokens=len(expected), logprobs=True, extra=extra)
    tokens = [token.bytes for token in answer.choices[0].logprobs.content]
    assert tokens == [list(assets.tokenizer.token_bytes(token)) for token in expected]
    assert answer.choices[0].message.content == assets.tokenizer.decode(expected, skip_special_tokens=False)
    assert answer.usage.prompt_tokens == case["num_tokens"]


def test_shape_of_an_answer(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=5, extra={"ignore_eos": True})
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "model"
    assert answer.system_fingerprint == ask(client).system_fingerprint
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.message.role == "assistant"
    assert choice.message.refusal is None
    assert choice.message.content
    usage = answer.usage
    assert usage.completion_tokens == 5
    assert usage.total_tokens == usage.prompt_tokens + 5
    assert usage.prompt_tokens_details.image_tokens == 0


def test_usage_counts_the_prompt_as_our_tokenizer_does(client: openai.OpenAI, assets: ModelAssets) -> None:
    messages = [
        {"role": "developer", "content": "Be brief. <|im_end|>"},
        {"role": "user", "content": "你好!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "<image></image>"},
    ]
    written = [
        Message("system", [TextPart("Be brief. <|im_end|>")]),
        Message("user", [TextPart("你好!")]),
        Message("assistant", [TextPart("Hi.")]),
        Message("user", [TextPart("<image></image>")]),
    ]
    prompt = assets.tokenizer.encode_prompt(assets.template.render(written, assets.pictures))
    assert ask(client, messages).usage.prompt_tokens == len(prompt.token_ids)


def test_a_repeated_prompt_is_cached(client: openai.OpenAI) -> None:
    messages = [user(picture("syn_tall.png"), "Is this prompt ever seen again?")]
    first = ask(client, messages)
    again = ask(client, messages)
    assert again.usage.prompt_tokens_details.cached_tokens > 64
    assert again.choices[0].message.content == first.choices[0].message.content


def test_an_earlier_answer_can_be_sent_back_whole(client: openai.OpenAI) -> None:
    first = ask(client)
    messages = [*HELLO, first.choices[0].message.model_dump(), {"role": "user", "content": "And then?"}]
    assert ask(client, messages).usage.prompt_tokens > first.usage.prompt_tokens


def test_n_answers_have_their_own_seeds(client: openai.OpenAI) -> None:
    answer = ask(client, n=3, temperature=1.5, seed=5, max_tokens=16, extra={"ignore_eos": True})
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    assert answer.usage.completion_tokens == 48
    second = ask(client, temperature=1.5, seed=6, max_tokens=16, extra={"ignore_eos": True})
    assert second.choices[0].message.content == texts[1]


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = ask(client, temperature=1.5, seed=seed, max_tokens=16, extra={"ignore_eos": True, "top_k": -1})
        return str(answer.choices[0].message.content)

    assert sample(7) == sample(7)
    assert sample(-(2**63)) == sample(-(2**63))
    assert len({sample(seed) for seed in range(5)}) > 1


def test_greedy_ignores_what_only_sampling_has(client: openai.OpenAI) -> None:
    plain = ask(client, max_tokens=32, extra={"ignore_eos": True})
    odd = ask(client, max_tokens=32, top_p=0, seed=3, extra={"ignore_eos": True, "top_k": 2, "min_p": 0.9})
    likeliest = ask(client, max_tokens=32, temperature=1, top_p=0, extra={"ignore_eos": True, "repetition_penalty": 1})
    assert odd.choices[0].message.content == plain.choices[0].message.content
    assert likeliest.choices[0].message.content == plain.choices[0].message.content


def test_logit_bias_forces_a_token(client: openai.OpenAI, assets: ModelAssets) -> None:
    [token] = assets.tokenizer.encode_text("A")
    answer = ask(client, max_tokens=4, logit_bias={str(token): 100})
    assert answer.choices[0].message.content == "AAAA"


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=24, extra={"ignore_eos": True}).choices[0].message.content
    for stop in (whole[4], whole[4:7], whole[6:12]):
        answer = ask(client, max_tokens=24, stop=["never in here", stop], extra={"ignore_eos": True})
        assert answer.choices[0].message.content == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens <= 24
    untouched = ask(client, max_tokens=24, stop="never in here", extra={"ignore_eos": True})
    assert untouched.choices[0].message.content == whole


def test_min_tokens_holds_stop_strings_back(client: openai.OpenAI, assets: ModelAssets) -> None:
    [token] = assets.tokenizer.encode_text("A")
    bias = {str(token): 100}
    now = ask(client, max_tokens=6, logit_bias=bias, stop="A").choices[0]
    assert (now.message.content, now.finish_reason) == ("", "stop")
    later = ask(client, max_tokens=6, logit_bias=bias, stop="A", extra={"min_tokens": 3}).choices[0]
    assert (later.message.content, later.finish_reason) == ("AAA", "stop")


def test_min_tokens_holds_stop_tokens_back(client: openai.OpenAI, assets: ModelAssets) -> None:
    [token] = assets.tokenizer.encode_text("A")
    for ending in ({"stop_token_ids": [token]}, {"logit_bias": {str(assets.eos_token_ids[1]): 100}}):
        extra = {"logit_bias": {str(token): 100}} | ending
        now = ask(client, max_tokens=6, extra=extra)
        assert (now.usage.completion_tokens, now.choices[0].finish_reason) == (0, "stop")
        later = ask(client, max_tokens=6, extra={**extra, "min_tokens": 3})
        assert (later.usage.completion_tokens, later.choices[0].finish_reason) == (3, "stop")


def test_eos_ends_an_answer_unless_ignored(client: openai.OpenAI, assets: ModelAssets) -> None:
    bias = {str(assets.eos_token_ids[0]): 100}
    ended = ask(client, max_tokens=6, logit_bias=bias)
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", 0)
    ignored = ask(client, max_tokens=6, logit_bias=bias, extra={"ignore_eos": True})
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 6)
    assert ignored.choices[0].message.content == ""
    shown = ask(client, max_tokens=2, logit_bias=bias, extra={"ignore_eos": True, "skip_special_tokens": False})
    assert shown.choices[0].message.content == "<|im_end|>" * 2


def test_logprobs(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=8, logprobs=True, top_logprobs=3, extra={"ignore_eos": True})
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 8
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        best = [other.logprob for other in entry.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == pytest.approx(best[0])
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert all(value <= 0 for value in best)
    none_wanted = ask(client, max_tokens=2, logprobs=True, extra={"ignore_eos": True})
    assert [entry.top_logprobs for entry in none_wanted.choices[0].logprobs.content] == [[], []]


def test_fields_that_change_nothing(client: openai.OpenAI) -> None:
    plain = ask(client)
    odd = ask(
        client,
        user="somebody",
        metadata={"purpose": "test"},
        store=False,
        response_format={"type": "text"},
        tool_choice="none",
        modalities=["text"],
        extra={"tools": [], "functions": None, "stop": None, "logit_bias": {}, "stream_options": None},
    )
    assert odd.choices[0].message.content == plain.choices[0].message.content


async def test_clients_at_once_get_the_answers_they_get_alone(server: RunningServer) -> None:
    questions = [[user("One?")], [user("Two, please", picture("syn_palette.png"))], [user("Three")], HELLO]
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def answer(messages: Any) -> str | None:
            made = await client.chat.completions.create(
                model="model",
                messages=messages,
                temperature=0,
                max_tokens=24,
                extra_body={"ignore_eos": True},
            )
            return made.choices[0].message.content

        alone = [await answer(messages) for messages in questions]
        together = await asyncio.gather(*[answer(messages) for messages in questions * 3])
    assert together == alone * 3
