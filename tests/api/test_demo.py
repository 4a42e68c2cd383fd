"""The built-in model, served with no model named, tells the truth about pictures of one's own making."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from PIL import Image, ImageDraw
from serving import ROOT, running_server

PICTURES = ROOT / "foveate" / "demo" / "pictures"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with (
        running_server(tmp_path_factory.mktemp("demo"), model=None) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def own_drawing(circle: str = "red") -> bytes:
    """What somebody would draw to try it: a circle at the top left, a blue square at the bottom right."""
    picture = Image.new("RGB", (448, 448), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((50, 50, 150, 150), fill=circle)
    pen.rectangle((300, 300, 380, 380), fill="blue")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def shown(data: bytes) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def ask(client: openai.OpenAI, pictures: list[bytes], *questions: str) -> str:
    """The answer to the last of several questions in one conversation."""
    messages: list[dict[str, object]] = []
    answer = ""
    for number, question in enumerate(questions):
        parts = [shown(data) for data in pictures] if number == 0 else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        answer = client.chat.completions.create(model="foveate-demo", messages=messages).choices[0].message.content
        messages.append({"role": "assistant", "content": answer})
    return answer


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is at the top left?", "A red circle."),
        ("How many shapes are there?", "There are 2 shapes."),
        ("What colour is the square?", "It is blue."),
        ("Where is the square?", "It is at the bottom right."),
        ("Is there a star?", "No, there is no star."),
        ("What colour is the heart?", "There is no heart in this picture."),
        ("左上角是什么？", "一个红色的圆形。"),
        ("图中有几个图形？", "图中有2个图形。"),
        (
            "Describe the picture.",
            "There are 2 shapes: a medium red circle at the top left and a medium blue square at the bottom right.",
        ),
    ],
)
def test_a_drawing_of_one_s_own(demo: openai.OpenAI, question: str, answer: str) -> None:
    assert ask(demo, [own_drawing()], question) == answer


@pytest.mark.parametrize("colour", ["red", "green", "black", "orange"])
def test_it_looks_at_the_picture(demo: openai.OpenAI, colour: str) -> None:
    assert ask(demo, [own_drawing(colour)], "What colour is the circle?") == f"It is {colour}."


def test_follow_up(demo: openai.OpenAI) -> None:
    assert ask(demo, [own_drawing()], "What is at the top left?", "And what colour is it?") == "It is red."


def test_two_pictures_are_told_apart(demo: openai.OpenAI) -> None:
    first, second = (PICTURES / name for name in ("before.png", "after.png"))
    pictures = [first.read_bytes(), second.read_bytes()]
    assert ask(demo, pictures, "Which picture shows a circle?") == "The second picture."
    assert ask(demo, pictures[::-1], "Which picture shows a circle?") == "The first picture."


def test_printed_text(demo: openai.OpenAI) -> None:
    answer = ask(demo, [(PICTURES / "sign.png").read_bytes()], "Read the text.")
    assert answer == 'The text reads "5NKBE6GV", "KNEE" and "PUFALU".'


def test_a_chart_and_a_receipt(demo: openai.OpenAI) -> None:
    assert ask(demo, [(PICTURES / "chart.png").read_bytes()], "How much is MAR?") == "MAR is 11."
    assert ask(demo, [(PICTURES / "receipt.png").read_bytes()], "How much is the total?") == "The total is 66.89."


def test_small_print_is_read_through_slices_only(demo: openai.OpenAI) -> None:
    picture = shown((PICTURES / "small-print.png").read_bytes())
    answers = []
    for detail in ("high", "low"):
        seen = {"type": "image_url", "image_url": {**picture["image_url"], "detail": detail}}
        messages = [{"role": "user", "content": [seen, {"type": "text", "text": "Read the number."}]}]
        answers.append(demo.chat.completions.create(model="foveate-demo", messages=messages))
    assert answers[0].choices[0].message.content == "The number is 1671."
    assert answers[1].choices[0].message.content != "The number is 1671."
    assert answers[0].usage.prompt_tokens_details.image_tokens == 7 * 64
    assert answers[1].usage.prompt_tokens_details.image_tokens == 64


def test_who_it_is(demo: openai.OpenAI) -> None:
    assert "Foveate demo model" in ask(demo, [], "Who are you?")


def test_streamed(demo: openai.OpenAI) -> None:
    parts = [shown(own_drawing()), {"type": "text", "text": "How many shapes are there?"}]
    stream = demo.chat.completions.create(
        model="foveate-demo", messages=[{"role": "user", "content": parts}], stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == "There are 2 shapes."
    assert len([piece for piece in pieces if piece]) > 2


def test_weights_fit_the_repository() -> None:
    shards = [shard.stat().st_size for shard in Path(ROOT / "foveate/demo/model").glob("*.safetensors")]
    assert max(shards) <= 12.1e6
    assert sum(shards) <= 24e6
