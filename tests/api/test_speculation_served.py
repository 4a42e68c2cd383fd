"""The built-in model with guesses: the same answers in fewer steps, and numbers that say so."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image, ImageDraw
from serving import RunningServer, running_server
from test_demo import shown

from foveate.bench.serve import command

TRUTH = "There are 2 shapes: a medium red circle at the top left and a medium blue square at the bottom right."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("plain"), model=None) as server:
        yield server


@pytest.fixture(scope="module")
def guessing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("guessing"), "--speculation", "prompt_lookup", model=None) as server:
        yield server


def drawing() -> bytes:
    picture = Image.new("RGB", (448, 448), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((50, 50, 150, 150), fill="red")
    pen.rectangle((300, 300, 380, 380), fill="blue")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def counters(server: RunningServer) -> list[float]:
    return [
        server.metric(f"foveate_engine_{name}_total")
        for name in ("steps", "generated_tokens", "draft_tokens", "accepted_tokens")
    ]


def said_again(server: RunningServer, **more: Any) -> tuple[Any, list[float]]:
    """Ask for what the conversation says already, and return the choice and what the engine counted meanwhile."""
    question = {"type": "text", "text": "Describe the picture."}
    messages: list[Any] = [
        {"role": "user", "content": [shown(drawing()), question]},
        {"role": "assistant", "content": TRUTH},
        {"role": "user", "content": [question]},
    ]
    before = counters(server)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="foveate-demo", messages=messages, **more)
    return answer.choices[0], [after - early for after, early in zip(counters(server), before, strict=True)]


@pytest.mark.parametrize("more", [{"temperature": 0}, {"temperature": 0.7, "seed": 5}], ids=["greedy", "drawn"])
def test_what_was_said_before_takes_a_few_steps(plain: RunningServer, guessing: RunningServer, more: Any) -> None:
    slow, (slow_steps, slow_tokens, *none) = said_again(plain, logprobs=True, **more)
    quick, (steps, tokens, drafts, accepted) = said_again(guessing, logprobs=True, **more)
    assert slow.message.content == quick.message.content == TRUTH
    assert none == [0, 0]
    assert tokens == slow_tokens
    assert 3 * steps < slow_steps
    assert tokens / 2 < accepted <= drafts
    pairs = list(zip(slow.logprobs.content, quick.logprobs.content, strict=True))
    assert [one.token for one, _ in pairs] == [other.token for _, other in pairs]
    assert [one.logprob for one, _ in pairs] == pytest.approx([other.logprob for _, other in pairs], abs=1e-3)


def test_a_stop_string_among_the_accepted(guessing: RunningServer) -> None:
    choice, _ = said_again(guessing, temperature=0, stop=["top left"])
    assert choice.message.content == TRUTH[: TRUTH.index("top left")]
    assert choice.finish_reason == "stop"


def test_the_bench_tells_how_many_guesses_were_right(
    guessing: RunningServer, plain: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    found = []
    for server in (guessing, plain):
        arguments = {"url": server.url, "requests": 3, "output_tokens": 80, "warmup": 1, "json": report}
        assert command(concurrency="1,2", read_back=True, **arguments) == 0
        levels = json.loads(report.read_bytes())["levels"]
        found.append([(level["draft_tokens"], level["accepted_tokens"]) for level in levels])
        assert ("tokens guessed" in capsys.readouterr().out) == (server is guessing)
    # The model does not read back; left without an end it goes in circles, which are guessed as well.
    assert all(drafts >= accepted > 0 for drafts, accepted in found[0])
    assert found[1] == [(0, 0)] * 2
