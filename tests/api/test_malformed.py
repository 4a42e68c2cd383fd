"""Hundreds of malformed requests, then a good one: nothing that a client sends ends the server."""

from __future__ import annotations

import base64
import copy
import json
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from chat_messages import GOLDEN, picture, text
from serving import RunningServer

PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
GOOD: dict[str, Any] = {
    "model": "model",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture("syn_palette.png", detail="low"), text("What is it?")]},
        {"role": "assistant", "content": "A picture."},
        {"role": "user", "content": "Sure?"},
    ],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["\n\n"],
    "logit_bias": {"5": 1.5},
    "stream": False,
    "seed": 1,
}
STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    10**40,
    "",
    "x",
    "\u0000\uffff\U0010ffff",
    "a" * 10_000,
    [],
    {},
    [[[[]]]],
    {"type": "text"},
    {"": {"": ""}},
    ["x"] * 50,
]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to everything in a JSON value, except the value itself."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(random_source: random.Random) -> Any:
    """The good request with one to three things replaced, removed or added."""
    request = copy.deepcopy(GOOD)
    for _ in range(random_source.randint(1, 3)):
        *parents, last = random_source.choice(list(places(request)) or [()]) or ("model",)
        target = request
        for key in parents:
            target = target[key]
        match random_source.randrange(3):
            case 0:
                target[last] = copy.deepcopy(random_source.choice(STRANGE))
            case 1:
                del target[last]
            case _ if isinstance(target, dict):
                target[random_source.choice(["n", "tools", "min_tokens", "role", "colour", ""])] = random_source.choice(
                    STRANGE
                )
            case _:
                target.insert(0, copy.deepcopy(random_source.choice(STRANGE)))
    return request


def damaged(random_source: random.Random) -> bytes:
    """The good request as bytes, of which some are changed, cut off or doubled."""
    content = bytearray(json.dumps(GOOD).encode())
    for _ in range(random_source.randint(1, 8)):
        content[random_source.randrange(len(content))] = random_source.randrange(256)
    start, end = sorted(random_source.choices(range(len(content)), k=2))
    return bytes(random_source.choice([content, content[:start], content[end:], content + content[start:end]]))


def broken_picture(random_source: random.Random) -> bytes:
    """A good request whose picture's file is damaged somewhere."""
    name = random_source.choice(["image1.jpg", "syn_palette.png", "syn_rgba.png", "frame_0.jpg"])
    content = bytearray((GOLDEN / "assets" / name).read_bytes())
    del content[random_source.randrange(len(content)) :]
    for _ in range(random_source.randint(0, 20)):
        if content:
            content[random_source.randrange(len(content))] = random_source.randrange(256)
    request = copy.deepcopy(GOOD)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    request["messages"][1]["content"][0]["image_url"]["url"] = url
    return json.dumps(request).encode()


def noise(random_source: random.Random) -> bytes:
    """Bytes, brackets or digits without any sense."""
    kind = random_source.choice([range(256), b"[{", b'[]{}",:', b"0123456789.eE-", b'"\\u\xc3\xed\xa0\x80'])
    return bytes(random_source.choices(kind, k=random_source.randint(0, 3000)))


MAKERS: list[Callable[[random.Random], bytes]] = [
    lambda random_source: json.dumps(mutated(random_source)).encode(),
    damaged,
    broken_picture,
    noise,
]


def assert_answered(answer: httpx.Response) -> None:
    """An answer or a refusal, never an internal error."""
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("maker", MAKERS, ids=["mutated", "damaged", "broken picture", "noise"])
def test_malformed_requests_are_refused_one_by_one(http: httpx.Client, maker: Callable[..., bytes]) -> None:
    random_source = random.Random(20260)
    statuses = set()
    for _ in range(120):
        answer = http.post(PATH, content=maker(random_source), headers=JSON)
        assert_answered(answer)
        statuses.add(answer.status_code)
    assert 400 in statuses
    assert http.post(PATH, json=GOOD).status_code == 200


def test_extremes_of_json(http: httpx.Client) -> None:
    values = ",".join(["0"] * 300_000)
    bodies = [
        f'{{"messages": [{values}]}}',
        f'{{"model": "model", "messages": [{{"role": "user", "content": [{values}]}}]}}',
        json.dumps({f"field{number}": number for number in range(100_000)}),
        json.dumps(GOOD | {"x" * 1_000_000: 1}),
        json.dumps(GOOD | {"model": "x" * 1_000_000}),
        json.dumps(GOOD | {"messages": [{"role": "x" * 1_000_000}]}),
        json.dumps(GOOD | {"stop": ["x" * 1_000_000]}),
        json.dumps(GOOD).replace("0.5", "9" * 100_000),
        json.dumps(GOOD).replace("0.5", "0." + "9" * 100_000),
        json.dumps(GOOD | {"metadata": {"deep": 1}}).replace('"deep": 1', '"deep": ' + "[" * 150 + "]" * 150),
    ]
    for body in bodies:
        answer = http.post(PATH, content=body, headers=JSON)
        assert_answered(answer)
        assert len(answer.content) < 5000
    assert http.post(PATH, json=GOOD).status_code == 200


def test_malformed_http(server: RunningServer, http: httpx.Client) -> None:
    url = urlsplit(server.url)
    head = f"POST {PATH} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST\r\n\r\n",
        head.encode() + b"Content-Length: -5\r\n\r\n{}",
        head.encode() + b"Content-Length: 1000\r\n\r\n{}",
        head.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        head.encode() + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        head.encode() + b"X: " + b"y" * 200_000,
        b"GET /v1/models/%ff%00%0d%0a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ):
        with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            try:
                while connection.recv(65536):
                    pass
            except ConnectionResetError:
                continue
    assert http.post(PATH, json=GOOD).status_code == 200


def test_nothing_of_it_was_an_internal_error(server: RunningServer, http: httpx.Client) -> None:
    """Runs after the others of this file, and sees what they left in the log."""
    assert http.post(PATH, json=GOOD).status_code == 200
    log = server.log.read_text(errors="replace")
    assert PATH in log
    assert "Traceback" not in log
