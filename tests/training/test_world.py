"""The generator of the demo world, its tokenizer and its scoring."""

from __future__ import annotations

import json
import math
import random
import re
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from foveate.media.slicing import plan_slices
from training import evaluate, tokenizer
from training.world import canvas, tiny
from training.world.conversation import (
    FAMILIES,
    HELD_OUT,
    NUM_LABELS,
    Conversation,
    Turn,
    draw,
    families_at,
    weights,
)
from training.world.phrases import PHRASES
from training.world.scene import Scene, make_scene, place_of, render
from training.world.scene_questions import SceneQuestions
from training.world.sign import make_sign
from training.world.vocabulary import COLOURS, KINDS, LANGUAGES, PLACES_EN, SIZES


def fingerprint(conversation: Conversation) -> tuple[object, ...]:
    pixels = tuple(picture.tobytes() for picture in conversation.pictures)
    return pixels, conversation.marks, conversation.turns


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_decides_everything(family: str) -> None:
    assert fingerprint(draw(5, family=family)) == fingerprint(draw(5, family=family))
    assert fingerprint(draw(5, family=family)) != fingerprint(draw(6, family=family))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_are_well_formed(family: str, language: str) -> None:
    pictures = {"pair": 2, "chat": 0}.get(family, 1)
    for seed in range(12):
        conversation = draw(seed, family=family, language=language, max_turns=6)
        assert len(conversation.pictures) == len(conversation.marks) == pictures
        assert 1 <= len(conversation.turns) <= 6
        assert conversation.turns[0].category != "follow_up"
        for turn in conversation.turns:
            assert turn.language == language
            assert turn.question.strip()
            assert turn.answer.endswith((".", "!", "。", "！"))
            assert turn.category in evaluate.CATEGORY_FAMILIES
            chinese = bool(re.search("[一-鿿]", turn.answer))
            assert chinese == (language == "zh")
        for picture, marks in zip(conversation.pictures, conversation.marks, strict=True):
            assert picture.mode == "RGB"
            for mark in marks:
                left, top, right, bottom = mark.box
                assert 0 < mark.label < NUM_LABELS
                assert left < right
                assert top < bottom
                assert left > -3
                assert top > -3
                assert right < picture.width + 3
                assert bottom < picture.height + 3


def test_without_slices_no_picture_is_sliced() -> None:
    for seed in range(60):
        for picture in draw(seed, stage=0.0).pictures:
            assert plan_slices(*picture.size).num_slices == 1


def test_shares_sum_to_one() -> None:
    for stage in (0.0, 0.4, 1.0):
        assert math.isclose(sum(weights(stage).values()), 1.0)
    assert {families_at(1.0, seed) for seed in range(300)} == set(FAMILIES)
    assert "pair" not in {families_at(0.0, seed) for seed in range(300)}


def test_every_question_has_five_wordings() -> None:
    for key, wordings in PHRASES.items():
        for language in LANGUAGES:
            assert len(set(wordings[language])) >= 5, (key, language)


def test_small_text_needs_slices() -> None:
    for seed in range(20):
        contents, picture, _ = tiny.make_tiny(random.Random(seed))
        if contents.category != "small_text":
            continue
        width, height = picture.size
        plan = plan_slices(width, height)
        assert plan.grid is not None
        assert plan.refine_size is not None
        columns, rows = plan.grid
        for one in contents.prints:
            assert one.cap_height * plan.source_size[1] / height <= 4.8
            assert one.cap_height * plan.refine_size[1] / height >= 8.8
            left, top, right, bottom = one.box
            assert int(left * columns / width) == int(right * columns / width)
            assert int(top * rows / height) == int(bottom * rows / height)


def test_signs_are_readable_in_the_overview() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        sign, picture, marks = make_sign(rng, canvas.canvas_size(rng, 200))
        scale = canvas.overview_scale(*picture.size)
        assert sum(len(line.text.replace(" ", "")) for line in sign.lines) == len(marks)
        tallest = max(mark.box[3] - mark.box[1] for mark in marks)
        assert tallest * scale >= 10


def scenes() -> list[Scene]:
    return [make_scene(random.Random(seed), (448, 448)) for seed in range(40)]


def test_shapes_keep_their_size_place_and_distance() -> None:
    for scene in scenes():
        side = min(scene.width, scene.height)
        for index, shape in enumerate(scene.shapes):
            assert shape.kind in KINDS
            assert shape.colour in COLOURS
            assert {"small": 0.16, "medium": 0.3, "large": 0.51}[shape.size] > shape.extent / side
            for part in (shape.x / scene.width, shape.y / scene.height):
                assert min(abs(part - 1 / 3), abs(part - 2 / 3)) >= 0.0399
            for other in scene.shapes[index + 1 :]:
                apart_x = abs(shape.x - other.x) - shape.half[0] - other.half[0]
                apart_y = abs(shape.y - other.y) - shape.half[1] - other.half[1]
                assert max(apart_x, apart_y) > 0


def test_pixels_show_what_the_scene_says() -> None:
    for scene in scenes():
        picture, marks = render(scene)
        for shape in scene.shapes:
            if shape.kind == "ring":
                continue
            pixel = picture.getpixel((round(shape.x), round(shape.y)))
            assert isinstance(pixel, tuple)
            assert math.dist(pixel, shape.rgb) < 8
        assert len(marks) >= len(scene.shapes)


def test_english_answers_follow_from_the_scene() -> None:
    for scene in scenes():
        asked = SceneQuestions(random.Random(1), scene, "en")
        for _ in range(6):
            for turns in (asked.count_some(), asked.place_of(), asked.describe(), asked.colour_of()):
                for turn in turns or []:
                    check(scene, turn)


def check(scene: Scene, turn: Turn) -> None:
    """Derive an answer again, from the words of the question and the numbers of the scene."""
    words = re.findall("[a-z]+", turn.question.lower())
    kinds = [kind for kind in KINDS if kind in words or kind + "s" in words or kind + "es" in words]
    colours = [colour for colour in COLOURS if colour in words]
    meant = [s for s in scene.shapes if s.kind in (kinds or KINDS) and s.colour in (colours or COLOURS)]
    if turn.category == "count":
        number = re.search(r"\d+", turn.answer)
        assert (int(number[0]) if number else 0) == len(meant)
    elif turn.category == "place":
        assert len(meant) == 1
        assert turn.answer == f"It is {PLACES_EN[place_of(meant[0].x, meant[0].y, 448, 448)]}."
    elif turn.category == "describe":
        positions = [turn.answer.find(f"{s.size} {s.colour} {s.kind}") for s in scene.shapes]
        assert all(position > 0 for position in positions)
        assert all(turn.answer.count(size) >= sum(s.size == size for s in scene.shapes) for size in SIZES)
    elif turn.category == "colour":
        assert turn.answer == f"It is {meant[0].colour}."


def test_held_out_questions_come_from_other_seeds() -> None:
    found = evaluate.held_out("place", "en", 6)
    assert [one.turn.category for one in found] == ["place"] * 6
    trained = [fingerprint(draw(seed, family="scene", language="en", stage=0.0)) for seed in range(6)]
    held_out = [fingerprint(draw(HELD_OUT + seed, family="scene", language="en", stage=0.0)) for seed in range(6)]
    assert not any(one == other for one in trained for other in held_out)


def test_follow_ups_are_asked_with_what_came_before() -> None:
    for question in evaluate.held_out("follow_up", "zh", 5):
        assert question.history
        messages = question.messages()
        assert len(messages) == 2 * len(question.history) + 1
        assert messages[-1]["role"] == "user"


def test_scoring_counts_exact_matches() -> None:
    conversations = [draw(HELD_OUT + seed, family="scene", language="en") for seed in range(4)]
    perfect = evaluate.accuracies(evaluate.score(conversations, lambda question: question.turn.answer))
    assert all(row["both"]["accuracy"] == 1.0 for row in perfect.values())
    silent = evaluate.score(conversations, lambda question: question.turn.answer[:-1])
    assert all(row["en"]["accuracy"] == 0.0 for row in evaluate.accuracies(silent).values())
    assert evaluate.as_table(silent).row_count > 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(tokenizer.train(vocab_size=700, conversations=70), path)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "There are 3 shapes: a large red circle at the top left.",
        "图中有3个图形：左上角有一个大的红色的圆形。",
        'The text reads "kiwi QX-42" 👋🏽 and “ünïcödé”\t\u0000\u200d',
        "def f(x):\n    return x ** 2  # ok\r\n\r\n",
        "e\u0301 Straße नमस्ते 日本語テスト",
    ],
)
def test_any_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = loaded.encode(text, add_special_tokens=False).ids
    assert loaded.decode(ids) == unicodedata.normalize("NFC", text)


def test_printed_strings_are_read_character_by_character(folder: Path) -> None:
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoding = loaded.encode('The text reads "circle 2026" and "RED".', add_special_tokens=False)
    assert [*"circle"] == encoding.tokens[4:10]
    assert {"2", "0", "6", "R", "E", "D"} <= set(encoding.tokens)


def test_special_tokens_follow_the_preset(folder: Path) -> None:
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = tokenizer.special_tokens()
    first = loaded.get_vocab_size(with_added_tokens=False)
    assert [loaded.token_to_id(name) for name in names] == list(range(first, first + len(names)))
    assert names[:3] == ["<unk>", "<|endoftext|>", "<|im_start|>"]
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    preset = json.loads((tokenizer.PRESET / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == preset["chat_template"]
    assert config["eos_token"] == "<|im_end|>"
