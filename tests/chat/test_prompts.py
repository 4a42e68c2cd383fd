"""Prompts are those of the published code, token by token, but text of a user stays text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image
from safetensors.numpy import load_file

from foveate.chat.assets import ModelAssets
from foveate.chat.pieces import Prompt
from foveate.chat.template import Message, Part, PicturePart, TextPart
from foveate.media.slicing import SlicePlan, plan_slices

GOLDEN = Path(__file__).parents[1] / "golden"
PRESET = Path(__file__).parents[2] / "foveate" / "models" / "presets" / "minicpm-v-2_6"
TINY = GOLDEN / "tiny" / "model"
CONVERSATIONS: dict[str, dict[str, Any]] = {
    entry["name"]: entry for entry in json.loads((GOLDEN / "prompts.json").read_text())["conversations"]
}
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "tiny" / "cases.json").read_text())["cases"]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

TYPED_SPECIAL = [name for name in CONVERSATIONS if name.startswith("user_types_")]
SAME_AS_PUBLISHED = [
    name
    for name, entry in CONVERSATIONS.items()
    if name not in TYPED_SPECIAL
    and "input_ids" in entry
    and "max_inp_length" not in entry.get("chat_kwargs", {})
    and not name.startswith("netease_system")
]


@cache
def assets(folder: Path) -> ModelAssets:
    return ModelAssets.from_folder(folder)


def part(raw: str | dict[str, Any], max_slice_nums: int) -> Part:
    if isinstance(raw, str) and not raw.startswith("@"):
        return TextPart(raw)
    if isinstance(raw, str):
        with Image.open(GOLDEN / "assets" / raw[1:]) as picture:
            width, height = picture.size
    else:
        width, height = raw["image"]
    return PicturePart(plan_slices(width, height, max_slice_nums=max_slice_nums))


def messages_of(raw: list[dict[str, Any]], **kwargs: Any) -> list[Message]:
    system = [{"role": "system", "content": kwargs["system_prompt"]}] if "system_prompt" in kwargs else []
    contents = [(m["role"], m["content"]) for m in system + raw]
    max_slice_nums = kwargs.get("max_slice_nums", 9)
    return [
        Message(role, [part(p, max_slice_nums) for p in ([content] if isinstance(content, str) else content)])
        for role, content in contents
    ]


def encode(folder: Path, raw: list[dict[str, Any]], **kwargs: Any) -> Prompt:
    model = assets(folder)
    use_image_id = kwargs.get("use_image_id", model.pictures.use_image_id)
    pictures = msgspec.structs.replace(model.pictures, use_image_id=use_image_id)
    return model.tokenizer.encode_prompt(model.template.render(messages_of(raw, **kwargs), pictures))


def bounds(prompt: Prompt) -> list[list[int]]:
    return [[start, start + length] for ranges in prompt.image_ranges for start, length in ranges]


def compact(text: str) -> str:
    return text.replace("<unk>" * 64, "<unk>*64")


def test_every_conversation_is_looked_at() -> None:
    assert len(SAME_AS_PUBLISHED) == 32
    assert len(TYPED_SPECIAL) == 9
    rest = set(CONVERSATIONS) - set(SAME_AS_PUBLISHED) - set(TYPED_SPECIAL)
    assert rest == {
        "assistant_first_is_an_error",
        "system_role_in_msgs_is_an_error",
        "truncation_max_inp_length",
        "truncation_inside_image",
        "netease_system_duplicated",
        "netease_system_empty",
        "netease_system_and_image",
        "batch_of_two_left_padded",
    }


@pytest.mark.parametrize("name", SAME_AS_PUBLISHED)
def test_same_as_published(name: str) -> None:
    entry = CONVERSATIONS[name]
    kwargs = entry.get("chat_kwargs", {})
    prompt = encode(PRESET, entry["messages"], **kwargs)
    assert prompt.token_ids == entry["input_ids"]
    assert bounds(prompt) == entry["image_bounds"]
    sizes = [
        list(size)
        for message in messages_of(entry["messages"], **kwargs)
        for p in message.parts
        if isinstance(p, PicturePart) and isinstance(p.plan, SlicePlan)
        for size in p.plan.tgt_sizes
    ]
    assert sizes == entry["tgt_sizes_hw"]


@pytest.mark.parametrize("name", TYPED_SPECIAL)
def test_typed_special_tokens_stay_text(name: str) -> None:
    entry = CONVERSATIONS[name]
    (message,) = entry["messages"]
    content = [message["content"]] if isinstance(message["content"], str) else message["content"]
    prompt = encode(PRESET, entry["messages"])
    tokenizer = assets(PRESET).tokenizer

    harmless = [{"role": "user", "content": [p if isinstance(p, dict) else "x" for p in content]}]
    expected = encode(PRESET, harmless)
    special = [id_ for id_ in prompt.token_ids if id_ in tokenizer.special_ids]
    assert special == [id_ for id_ in expected.token_ids if id_ in tokenizer.special_ids]
    assert [len(ranges) for ranges in prompt.image_ranges] == [len(ranges) for ranges in expected.image_ranges]

    picture = f"<image_id>0</image_id><image>{'<unk>' * 64}</image>"
    text = "\n".join(picture if isinstance(p, dict) else p for p in content)
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == (
        f"{SYSTEM}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["netease_system_duplicated", "netease_system_and_image"])
def test_a_system_message_stands_once(name: str) -> None:
    entry = CONVERSATIONS[name]
    tokenizer = assets(PRESET).tokenizer
    # The original server renders it twice: the expected ids are its own without the first rendering.
    end = entry["input_ids"].index(tokenizer.token_id("<|im_start|>"), 1)
    prompt = encode(PRESET, entry["messages"])
    assert prompt.token_ids == entry["input_ids"][end:]
    assert bounds(prompt) == [[start - end, stop - end] for start, stop in entry["image_bounds"]]


def test_an_empty_system_message_is_the_default() -> None:
    entry = CONVERSATIONS["netease_system_empty"]
    without = [message for message in entry["messages"] if message["role"] != "system"]
    prompt = encode(PRESET, entry["messages"])
    assert prompt == encode(PRESET, without)
    assert assets(PRESET).tokenizer.decode(prompt.token_ids, False).startswith(SYSTEM)


def test_the_assistant_may_speak_first() -> None:
    prompt = encode(PRESET, CONVERSATIONS["assistant_first_is_an_error"]["messages"])
    text = assets(PRESET).tokenizer.decode(prompt.token_ids, False)
    assert text == (
        f"{SYSTEM}<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_system_message_replaces_the_default() -> None:
    prompt = encode(PRESET, CONVERSATIONS["system_role_in_msgs_is_an_error"]["messages"])
    text = assets(PRESET).tokenizer.decode(prompt.token_ids, False)
    assert text.startswith("<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nhi")
    assert text.count("<|im_start|>system") == 1


@pytest.mark.parametrize("name", ["truncation_max_inp_length", "truncation_inside_image"])
def test_nothing_is_cut(name: str) -> None:
    entry = CONVERSATIONS[name]
    shown = entry.get("input_ids") or entry["input_ids_before_error"]
    prompt = encode(PRESET, entry["messages"])
    assert prompt.token_ids[: len(shown)] == shown
    text = assets(PRESET).tokenizer.decode(prompt.token_ids, False)
    assert compact(text) == entry["expanded_prompt_compact"]


@pytest.mark.parametrize("row", [0, 1])
def test_a_batch_is_its_conversations(row: int) -> None:
    entry = CONVERSATIONS["batch_of_two_left_padded"]
    published = entry["rows"][row]["input_ids"]
    prompt = encode(PRESET, entry["messages"][row])
    assert [0] * (len(published) - len(prompt.token_ids)) + prompt.token_ids == published


@pytest.mark.parametrize("name", CASES)
def test_other_ids_from_another_tokenizer(name: str) -> None:
    case = CASES[name]
    golden = load_file(GOLDEN / "tiny" / case["file"])
    prompt = encode(TINY, case["messages"])
    assert prompt.token_ids == golden["input_ids"].tolist()
    assert bounds(prompt) == golden["image_bound"].tolist()
    assert prompt.num_image_tokens == 64 * len(bounds(prompt))
