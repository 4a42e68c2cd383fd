"""Chat completions as events, and clients that hang up."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest
from chat_messages import picture, user
from serving import RunningServer, running_server

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
ENDLESS = {"ignore_eos": True}
Eventually = Callable[[Callable[[], bool]], None]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "model", "messages": HELLO, "temperature": 0, "max_tokens": 16} | ENDLESS | fields


@pytest.mark.parametrize("messages", [HELLO, [user("See: ", picture("syn_wide.png"))]])
@pytest.mark.parametrize("stop", [None, [" ", "e", "\ufffd"]])
def test_a_stream_says_what_one_piece_says(client: openai.OpenAI, messages: Any, stop: list[str] | None) -> None:
    fields: dict[str, Any] = {
        "model": "model",
        "messages": messages,
        "temperature": 0,
        "max_tokens": 24,
        "stop": stop,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": ENDLESS,
    }
    whole = client.chat.completions.create(**fields)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options=options))
    *deltas, last = chunks
    choices = [chunk.choices[0] for chunk in deltas]
    assert choices[0].delta.role == "assistant"
    assert choices[0].delta.content == ""
    assert [choice.delta.role for choice in choices[1:]] == [None] * (len(choices) - 1)
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == whole.choices[0].message.content
    reasons = [choice.finish_reason for choice in choices]
    assert reasons == [None] * (len(choices) - 1) + [whole.choices[0].finish_reason]
    logprobs = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or ()]
    expected = whole.choices[0].logprobs.content
    assert [entry.bytes for entry in logprobs] == [entry.bytes for entry in expected]
    assert [entry.logprob for entry in logprobs] == pytest.approx([entry.logprob for entry in expected], abs=1e-3)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_events_as_bytes(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=body(stream=True, max_tokens=3))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    *events, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    made = [json.loads(event.removeprefix("data: ")) for event in events]
    assert made[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert made[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert {event["object"] for event in made} == {"chat.completion.chunk"}
    # Without include_usage no event may have the key.
    assert not any("usage" in event for event in made)


def test_usage_is_null_until_the_last_event(http: httpx.Client) -> None:
    fields = body(stream=True, max_tokens=3, stream_options={"include_usage": True})
    *events, _, _ = http.post("/v1/chat/completions", json=fields).text.split("\n\n")
    usages = [json.loads(event.removeprefix("data: "))["usage"] for event in events]
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1]["completion_tokens"] == 3


async def test_n_answers_are_told_apart(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        fields: dict[str, Any] = {
            "model": "model",
            "messages": HELLO,
            "n": 2,
            "seed": 1,
            "temperature": 1.2,
            "max_tokens": 16,
            "extra_body": ENDLESS,
        }
        whole = await client.chat.completions.create(**fields)
        texts, roles, reasons = ["", ""], [0, 0], [0, 0]
        async for chunk in await client.chat.completions.create(**fields, stream=True):
            [choice] = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
            reasons[choice.index] += choice.finish_reason == "length"
    assert texts == [choice.message.content for choice in whole.choices]
    assert (roles, reasons) == ([1, 1], [1, 1])


def test_a_stop_string_ends_one_of_n_answers(client: openai.OpenAI, server: RunningServer) -> None:
    fields: dict[str, Any] = {
        "model": "model",
        "messages": HELLO,
        "temperature": 1.5,
        "max_tokens": 48,
        "n": 4,
    }
    free = client.chat.completions.create(**fields, seed=3, extra_body=ENDLESS)
    texts = [choice.message.content or "" for choice in free.choices]
    stop = next(character for character in texts[0][2:] if not all(character in text for text in texts))
    cut = client.chat.completions.create(**fields, seed=3, stop=stop, extra_body=ENDLESS)
    assert [choice.message.content for choice in cut.choices] == [text.split(stop)[0] for text in texts]
    assert [choice.finish_reason for choice in cut.choices] == ["stop" if stop in text else "length" for text in texts]


def test_a_stop_string_in_the_last_tokens_ends_an_answer_once(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "model",
        "messages": HELLO,
        "temperature": 1.5,
        "max_tokens": 6,
        "n": 8,
    }
    free = client.chat.completions.create(**fields, seed=1, extra_body=ENDLESS)
    texts = [choice.message.content or "" for choice in free.choices]
    # While the stop string is found here, the engine's own end of the answer is on its way.
    for stop in sorted({text[-1] for text in texts if text}):
        for _ in range(4):
            cut = client.chat.completions.create(**fields, seed=1, stop=stop, extra_body=ENDLESS)
            assert [choice.message.content for choice in cut.choices] == [text.split(stop)[0] for text in texts]


def test_an_error_before_the_first_event_has_its_status(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=body(stream=True, max_tokens=10**6))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_an_engine_that_dies_in_the_middle_of_a_stream(
    tmp_path_factory: pytest.TempPathFactory, eventually: Eventually
) -> None:
    with (
        running_server(tmp_path_factory.mktemp("mortal")) as mortal,
        httpx.Client(base_url=mortal.url) as http,
    ):
        events: list[str] = []
        with http.stream("POST", "/v1/chat/completions", json=body(stream=True, max_tokens=None)) as answer:
            for line in answer.iter_lines():
                events += [line.removeprefix("data: ")] if line else []
                if len(events) == 3:
                    for child in psutil.Process(mortal.pid).children():
                        child.kill()
        error = json.loads(events[-1])["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_error")
        assert "[DONE]" not in events
        # Until its successor is up there is a status for it, and a hint when to come back.
        away = http.post("/v1/chat/completions", json=body())
        assert (away.status_code, away.json()["error"]["code"]) == (503, "unavailable")
        assert int(away.headers["retry-after"]) >= 1
        assert http.get("/ready").status_code == 503
        assert http.get("/health").status_code == 200
        eventually(lambda: http.get("/ready").status_code == 200)
        assert http.post("/v1/chat/completions", json=body()).status_code == 200


def all_idle(server: RunningServer) -> bool:
    names = ("foveate_requests_running", "foveate_engine_num_running", "foveate_engine_num_waiting")
    return all(server.metric(name) == 0 for name in names)


def test_hanging_up_in_the_middle_of_a_stream_ends_it(
    client: openai.OpenAI, server: RunningServer, eventually: Eventually
) -> None:
    aborted = server.metric("foveate_engine_aborted_total")
    stream = client.chat.completions.create(model="model", messages=HELLO, stream=True, n=2, extra_body=ENDLESS)
    for _, chunk in zip(range(4), stream, strict=False):
        assert chunk.choices
    stream.close()
    eventually(lambda: all_idle(server))
    assert server.metric("foveate_engine_aborted_total") == aborted + 2


def test_hanging_up_before_a_whole_answer_ends_it(server: RunningServer, eventually: Eventually) -> None:
    aborted = server.metric("foveate_engine_aborted_total")
    content = json.dumps(body(max_tokens=None, messages=[user(picture("image1.jpg"), "Go on.")])).encode()
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        eventually(lambda: server.metric("foveate_engine_num_running") > 0)
    eventually(lambda: all_idle(server))
    assert server.metric("foveate_engine_aborted_total") == aborted + 1
