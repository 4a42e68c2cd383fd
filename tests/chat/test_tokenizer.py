"""Ids back to text, piece by piece; stop strings; and which tokenizers are refused."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.chat.pieces import SliceSlot, TemplateText, UserText
from foveate.chat.tokenizer import Detokenizer, StopStrings, Tokenizer
from foveate.errors import CheckpointError, InvalidRequest

FILE = Path(__file__).parents[1] / "golden" / "tiny" / "model" / "tokenizer.json"


@cache
def tiny() -> Tokenizer:
    return Tokenizer.from_file(FILE)


@cache
def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(FILE))


ids = st.lists(st.integers(0, 722), max_size=40)
typed = st.lists(st.sampled_from(["a", "é", "中", "👩‍👩‍👧", "!", " ", "\n", "<unk>", "<|im_end|>", "\ufffd"]))
texts = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), typed.map("".join))


def cut(draw: st.DataObject, sequence: Any) -> list[Any]:
    """Cut a sequence in random places."""
    places = draw.draw(st.lists(st.integers(0, len(sequence)), max_size=8))
    edges = [0, *sorted(places), len(sequence)]
    return [sequence[a:b] for a, b in pairwise(edges)]


@given(ids, st.booleans())
def test_decode_is_the_library_s(token_ids: list[int], skip: bool) -> None:
    assert tiny().decode(token_ids, skip) == library().decode(token_ids, skip_special_tokens=skip)


@given(texts)
def test_text_survives_whatever_it_says(text: str) -> None:
    token_ids = tiny().encode_text(text)
    assert not tiny().special_ids & set(token_ids)
    # The published tokenizer composes characters (NFC), so that is what comes back.
    assert tiny().decode(token_ids) == library().normalizer.normalize_str(text)


@given(st.data(), ids, st.booleans())
def test_detokenizer_gives_the_whole_however_cut(data: st.DataObject, token_ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(tiny(), skip_special_tokens=skip)
    text = "".join(map(detokenizer.push, cut(data, token_ids))) + detokenizer.flush()
    assert text == tiny().decode(token_ids, skip)


@given(texts)
def test_detokenizer_never_shows_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(tiny())
    shown = [detokenizer.push([id_]) for id_ in tiny().encode_text(text)]
    assert sum(piece.count("\ufffd") for piece in shown) == text.count("\ufffd")
    assert detokenizer.flush() == ""


def test_detokenizer_flushes_half_a_character() -> None:
    detokenizer = Detokenizer(tiny())
    first, *_ = [id_ for id_ in range(699) if tiny().token_bytes(id_) == "中".encode()[:1]]
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_token_0_is_an_exclamation_mark() -> None:
    assert tiny().token_text(0) == "!"
    assert tiny().decode([0, 0]) == "!!"
    assert Detokenizer(tiny()).push([0]) == "!"


def test_ids_outside_the_vocabulary_are_nothing() -> None:
    assert tiny().vocab_size == 723
    assert tiny().token_bytes(723) == tiny().token_bytes(-1) == b""


def test_special_tokens_have_text() -> None:
    end = tiny().token_id("<|im_end|>")
    assert end == 702
    assert tiny().token_text(end) == "<|im_end|>"
    assert tiny().decode([end]) == ""
    assert tiny().token_id("hello") is None


def test_only_the_template_speaks_special_tokens() -> None:
    prompt = tiny().encode_prompt([TemplateText("<image>"), UserText("<image>"), TemplateText("<ima"), UserText("ge>")])
    assert prompt.token_ids[0] == tiny().token_id("<image>")
    assert not tiny().special_ids & set(prompt.token_ids[1:])
    assert tiny().decode(prompt.token_ids, False) == "<image><image><image>"


def test_text_is_encoded_across_its_authors() -> None:
    whole = tiny().encode_text("the answer")
    pieces = [TemplateText("the an"), UserText("sw"), TemplateText(""), UserText("er")]
    assert tiny().encode_prompt(pieces).token_ids == whole


def test_slots_are_counted() -> None:
    unk = tiny().token_id("<unk>")
    prompt = tiny().encode_prompt([SliceSlot(0, "<unk>", 2), UserText("!"), SliceSlot(1, "<unk>", 3)])
    assert prompt.token_ids == [unk, unk, 0, unk, unk, unk]
    assert prompt.image_ranges == [[(0, 2)], [(3, 3)]]
    assert prompt.num_image_tokens == 5


def test_a_lone_surrogate_is_the_client_s_fault() -> None:
    with pytest.raises(InvalidRequest, match=r"U\+D800"):
        tiny().encode_prompt([UserText("ab\ud800c")])


def test_merges_to_an_added_token_are_off() -> None:
    raw = json.loads(FILE.read_text())
    vocab = raw["model"]["vocab"]
    raw["added_tokens"][0] |= {"content": "un", "id": vocab["un"]}
    # Taking it off the list of added tokens is not enough: merges lead to it too.
    bare = tokenizers.Tokenizer.from_str(json.dumps({**raw, "added_tokens": []}))
    assert bare.encode("un").ids == [vocab["un"]]
    tokenizer = Tokenizer(json.dumps(raw))
    assert tokenizer.encode_text("un") == [vocab["u"], vocab["n"]]
    assert tokenizer.encode_prompt([TemplateText("un")]).token_ids == [vocab["un"]]


def _without_byte(raw: dict[str, Any]) -> None:
    del raw["model"]["vocab"]["Ā"]


def _with_flag(raw: dict[str, Any]) -> None:
    raw["added_tokens"][0]["lstrip"] = True


def _other_model(raw: dict[str, Any]) -> None:
    raw["model"]["type"] = "Unigram"


def _no_vocab(raw: dict[str, Any]) -> None:
    del raw["model"]["vocab"]


def _bad_merge(raw: dict[str, Any]) -> None:
    raw["model"]["merges"].append(["nowhere", "to be seen"])


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_without_byte, "byte 0x00"),
        (_with_flag, "'<unk>' has lstrip"),
        (_other_model, "Unigram"),
        (_no_vocab, "'vocab'"),
        (_bad_merge, "is not a tokenizer"),
    ],
)
def test_unfit_tokenizers_are_refused(spoil: Any, complaint: str) -> None:
    raw = json.loads(FILE.read_text())
    spoil(raw)
    with pytest.raises(CheckpointError, match=complaint):
        Tokenizer(json.dumps(raw))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


short = st.text("ab", min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What stop strings mean, slowly: the first to be complete, the longest of those."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(st.data(), st.text("abc", max_size=30), st.lists(short, max_size=4))
@settings(max_examples=300)
def test_stop_strings_are_found_however_cut(data: st.DataObject, text: str, stops: list[str]) -> None:
    search = StopStrings(stops)
    shown, matched = "", None
    pushed = ""
    for piece in cut(data, text):
        emit, matched = search.push(piece)
        shown += emit
        pushed += piece
        if matched is None:
            # Kept back is only what may become a stop string, and all of it.
            held = pushed[len(shown) :]
            tails = [pushed[-n:] for n in range(1, len(pushed) + 1)]
            assert held == max((t for t in tails if any(s.startswith(t) for s in stops)), key=len, default="")
    assert (shown + search.flush(), matched) == first_stop(text, stops)


def test_after_a_stop_string_comes_nothing() -> None:
    search = StopStrings(["END"])
    assert search.push("one EN") == ("one ", None)
    assert search.push("D two") == ("", "END")
    assert search.push("three") == ("", "END")
    assert search.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
