"""Every refusal has OpenAI's shape, the right status, and names what is wrong."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from serving import RunningServer, running_server

from foveate.api.schema import ChatCompletionRequest

HELLO = [{"role": "user", "content": "Hello"}]
PATH = "/v1/chat/completions"


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "model", "messages": HELLO, "max_tokens": 2, "temperature": 0} | fields


def refused(answer: httpx.Response, status: int, code: str | None = None, param: str | None = None) -> str:
    """Check an error's whole shape and return its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    [(key, error)] = answer.json().items()
    assert key == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    assert (error["type"], error["code"], error["param"]) == (kind, code, param)
    assert error["message"]
    return str(error["message"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("audio", {"voice": "x", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("store", True),
        ("store", 0),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("service_tier", "priority"),
        ("web_search_options", {}),
        ("best_of", 2),
        ("echo", False),
        ("guided_json", None),
        ("Temperature", 0),
    ],
)
def test_unsupported_fields_are_named(http: httpx.Client, field: str, value: Any) -> None:
    message = refused(http.post(PATH, json=request(**{field: value})), 400, param=field)
    assert field in message


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_response_formats_are_named(http: httpx.Client, kind: str) -> None:
    refused(http.post(PATH, json=request(response_format={"type": kind})), 400, param="response_format.type")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 2.1, "1", True, [], {}]),
        ("top_p", [-0.1, 1.1, "1"]),
        ("n", [0, 17, 1.5, "2", True]),
        ("max_tokens", [0, -1, 1.5, "5"]),
        ("max_completion_tokens", [0, "5"]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("top_logprobs", [-1, 21, 1]),
        ("logprobs", [1, "true"]),
        ("seed", [2**63, -(2**63) - 1, 1.5, 10**60]),
        ("stop", ["", ["a"] * 17, 5, {}]),
        ("stream", ["true", 1]),
        ("stream_options", [{"include_usage": True}]),
        ("logit_bias", [{"x": 1}, {"-1": 1}, {"723": 1}, [1], {"9" * 40: 1}]),
        ("top_k", [-2, 1.5, 2**40]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, -1, 1000]),
        ("stop_token_ids", [723, [723], "5"]),
        ("min_tokens", [-1, 3]),
        ("ignore_eos", [1]),
        ("skip_special_tokens", ["yes"]),
        ("user", [5]),
        ("metadata", ["x"]),
        ("model", [None, 5]),
        ("messages", [None, [], "Hello", {}]),
    ],
)
def test_bad_values_name_their_field(http: httpx.Client, field: str, values: list[Any]) -> None:
    for value in values:
        answer = http.post(PATH, json=request(**{field: value}))
        param = answer.json()["error"]["param"]
        assert field in refused(answer, 400, param=param)
        assert param.partition("[")[0] == field


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[1].role"),
        ({"role": "function", "content": "x"}, "messages[1].role"),
        ({"role": 5, "content": "x"}, "messages[1].role"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": "x", "name": "Ann"}, "messages[1].name"),
        ({"role": "user", "content": "x", "colour": "red"}, "messages[1].colour"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[1].tool_calls"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0].image_url"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]},
            "messages[1].content[0].image_url",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]},
            "messages[1].content[0].image_url.url",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "max"}}]},
            "messages[1].content[0].image_url.detail",
        ),
        (
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "x", "max_slice_nums": 0}}],
            },
            "messages[1].content[0].image_url.max_slice_nums",
        ),
    ],
)
def test_bad_messages_are_named_by_path(http: httpx.Client, message: Any, param: str) -> None:
    refused(http.post(PATH, json=request(messages=[*HELLO, message])), 400, param=param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_are_finite(http: httpx.Client, number: str) -> None:
    body = json.dumps(request()).replace('"temperature": 0', f'"temperature": {number}')
    answer = http.post(PATH, content=body, headers={"content-type": "application/json"})
    refused(answer, 400, param="temperature")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'"\xff\xfe"',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 5000,
        b"\x00" * 9,
    ],
)
def test_a_malformed_body(http: httpx.Client, body: bytes) -> None:
    refused(http.post(PATH, content=body, headers={"content-type": "application/json"}), 400)


def test_fields_that_contradict_each_other(http: httpx.Client) -> None:
    both = request(max_completion_tokens=3)
    refused(http.post(PATH, json=both), 400, param="max_tokens")
    assert http.post(PATH, json=request(max_completion_tokens=2)).status_code == 200


def test_context_length(http: httpx.Client, client: openai.OpenAI) -> None:
    limit = http.get("/v1/models/model").json()["max_model_len"]
    length = http.post(PATH, json=request()).json()["usage"]["prompt_tokens"]
    for field in ("max_tokens", "max_completion_tokens"):
        wanted = request(max_tokens=None) | {field: limit}
        message = refused(http.post(PATH, json=wanted), 400, "context_length_exceeded", field)
        assert str(limit) in message
        assert str(length + limit) in message
    long = request(messages=[{"role": "user", "content": "word " * limit}])
    message = refused(http.post(PATH, json=long), 400, "context_length_exceeded", "messages")
    assert str(limit - 1) in message
    endless = request(messages=[{"role": "user", "content": "!" * 5_000_000}])
    message = refused(http.post(PATH, json=endless), 400, "context_length_exceeded", "messages")
    assert str(limit - 1) in message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="model", messages=HELLO, max_tokens=limit)  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"


def test_unknown_model(http: httpx.Client, client: openai.OpenAI) -> None:
    refused(http.post(PATH, json=request(model="gpt-4o")), 404, "model_not_found", "model")
    refused(http.get("/v1/models/gpt-4o"), 404, "model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=HELLO)  # type: ignore[arg-type]


def test_paths_and_methods(http: httpx.Client) -> None:
    refused(http.get("/v2/nothing"), 404, "unknown_url")
    refused(http.get("/v1/models/"), 404, "model_not_found", "model")
    wrong = http.get(PATH)
    refused(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    refused(http.delete("/v1/models"), 405, "method_not_allowed")


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    flags = ["--max-queue-size", "1", "--max-batch-size", "1", "--max-body-bytes", "4000"]
    with running_server(tmp_path_factory.mktemp("tight"), *flags) as running:
        yield running


async def test_a_full_queue_says_when_to_come_back(tight: RunningServer) -> None:
    endless = request(max_tokens=None, ignore_eos=True)
    async with httpx.AsyncClient(base_url=tight.url, timeout=60) as http:
        running = asyncio.create_task(http.post(PATH, json=endless))
        await until(lambda: tight.metric("foveate_engine_num_running") == 1)
        waiting = asyncio.create_task(http.post(PATH, json=endless))
        await until(lambda: tight.metric("foveate_engine_num_waiting") == 1)
        for stream in (False, True):
            full = await http.post(PATH, json=request(stream=stream))
            assert refused(full, 503, "overloaded")
            assert int(full.headers["retry-after"]) >= 1
        running.cancel()
        waiting.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        await until(lambda: tight.metric("foveate_engine_num_running") == 0)
        assert (await http.post(PATH, json=request())).status_code == 200


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(300):
        if await asyncio.to_thread(condition):
            return
        await asyncio.sleep(0.1)
    pytest.fail("it never came true")


def test_a_body_that_is_too_large(tight: RunningServer) -> None:
    with httpx.Client(base_url=tight.url, timeout=60) as http:
        large = json.dumps(request(user="x" * 5000)).encode()
        headers = {"content-type": "application/json"}
        refused(http.post(PATH, content=large, headers=headers), 413, "request_too_large")

        def chunked() -> Iterator[bytes]:
            for start in range(0, len(large), 1000):
                yield large[start : start + 1000]

        refused(http.post(PATH, content=chunked(), headers=headers), 413, "request_too_large")
        assert http.post(PATH, json=request()).status_code == 200


def test_a_body_that_is_declared_too_large_is_not_waited_for(tight: RunningServer) -> None:
    url = urlsplit(tight.url)
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 99999999999\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_the_schema_says_what_is_read() -> None:
    schema = ChatCompletionRequest.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model", "messages"]
    assert {"type": "string"} in schema["properties"]["stop"]["anyOf"]
