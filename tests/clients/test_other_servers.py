"""The clients and servers that are not Foveate's: nothing of ours is sent, and whatever they do is told."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from other_server import Other
from typed import PICTURES, foveate, terminal

from foveate.errors import FoveateError

SHAPES = str(PICTURES / "shapes.png")
END = {"choices": [{"delta": {}, "finish_reason": "stop"}], "model": "gpt-x-2026"}


def says(text: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}}]}


def test_only_openai_s_fields_are_sent(other: Other) -> None:
    other.answers(says("A "), says("circle."), END, {"choices": [], "usage": None, "timings": {"prompt_n": 13}})
    done = foveate("ask", "What?", SHAPES, "--detail", "low", "--system", "Be brief.", "--json", "--url", other.url)
    assert json.loads(done.stdout) == {
        "answer": "A circle.",
        "model": "gpt-x-2026",
        "finish_reason": "stop",
        "usage": None,
        "timings": None,
    }
    (body,) = other.bodies
    assert body.keys() == {"model", "messages", "stream", "stream_options"}
    assert body["model"] == "gpt-x"
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"][0]["image_url"].keys() == {"url", "detail"}
    assert user["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBORw0KGgo")
    assert user["content"][1] == {"type": "text", "text": "What?"}


def test_what_a_flag_asks_for_is_sent(other: Other) -> None:
    other.answers(says("Yes."), END)
    flags = ["--max-slice-nums", "3", "--max-tokens", "7", "--temperature", "0.5", "--seed", "2", "--model", "m"]
    url = "https://example.com/x.png?y"
    assert foveate("ask", "What?", url, *flags, "--timings", "--url", f"{other.url}/v1/").returncode == 0
    (body,) = other.bodies
    assert body["messages"][0]["content"][0]["image_url"] == {"url": url, "max_slice_nums": 3}
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("m", 7, 0.5, 2)
    assert "timings" not in body


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (429, b'{"error": {"message": "Slow down.", "code": "rate_limit"}}', "Slow down."),
        (400, b'{"error": {"message": "a\\u001b[2Jb", "code": 7}}', "a\N{REPLACEMENT CHARACTER}[2Jb"),
        (502, b"<html>bad gateway</html>", "the server answered with status 502: <html>bad gateway</html>"),
        (500, b"", "the server answered with status 500: nothing more"),
        (301, b"", "sends its clients on to https://elsewhere/: give --url that address"),
        (200, b"data: {nonsense\n\n", "the server sent what is no answer: '{nonsense'"),
        (200, b"data: []\n\n", "the server sent what is no answer: '[]'"),
        (200, b"", "the answer broke off: the server closed the connection"),
        (200, b'data: {"error": {"message": "Out of memory."}}\n\n', "Out of memory."),
    ],
)
def test_refusals(other: Other, refused: Callable[..., FoveateError], status: int, body: bytes, message: str) -> None:
    other.replies["/v1/chat/completions"] = (status, body)
    error = refused("ask", "What?", "--url", other.url)
    assert error.exit_status == 1
    assert error.message.endswith(message)
    assert "\n" not in error.message


def test_an_answer_that_breaks_off_is_shown_and_then_the_error(other: Other) -> None:
    other.answers(says("A cir"), done=False)
    done = foveate("ask", "What?", "--url", other.url)
    assert (done.returncode, done.stdout) == (1, "A cir\n")
    assert done.stderr == "error: the answer broke off: the server closed the connection\n"


def test_a_server_without_done_is_understood(other: Other) -> None:
    other.answers(says("Yes."), END, done=False)
    assert foveate("ask", "What?", "--url", other.url).stdout == "Yes.\n"


def test_a_server_that_names_no_model(other: Other, refused: Callable[..., FoveateError]) -> None:
    del other.replies["/v1/models"]
    assert "status 404" in refused("ask", "What?", "--url", other.url).message
    other.replies["/v1/models"] = (200, b'{"data": []}')
    error = refused("ask", "What?", "--url", other.url)
    assert error.message == f"{other.url} does not say which models it has; name one with --model"


def test_the_words_of_a_model_do_not_reach_the_terminal_as_commands(other: Other) -> None:
    other.answers(says("\x1b]0;owned\x07"), says("a\x9b2Jb\n"), END)
    with terminal("ask", "What?", "--url", other.url) as screen:
        screen.expect("\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}a\N{REPLACEMENT CHARACTER}2Jb\r\n")
        assert screen.end() == 0
    # A pipe gets what came: it may be a file's content.
    assert foveate("ask", "What?", "--url", other.url).stdout == "\x1b]0;owned\x07a\x9b2Jb\n"


def test_openai_s_key_stays_on_this_machine_without_https(other: Other) -> None:
    other.answers(says("Yes."), END)
    assert foveate("ask", "What?", "--url", other.url, OPENAI_API_KEY="mine").returncode == 0
    assert set(other.keys) == {"Bearer mine"}
    # To the same server under a name that could be another machine's: its port is the proxy's.
    other.keys.clear()
    other.replies["http://example.test/version"] = (404, b"")
    other.replies["http://example.test/v1/models"] = (401, b'{"error": {"message": "No key."}}')
    done = foveate("ask", "What?", "--url", "http://example.test", OPENAI_API_KEY="mine", HTTP_PROXY=other.url)
    assert "OPENAI_API_KEY is not sent without HTTPS to another machine" in done.stderr
    assert other.keys == [None, None]


def test_a_proxy_is_not_asked_for_this_machine(other: Other) -> None:
    other.answers(says("Yes."), END)
    assert foveate("ask", "What?", "--url", other.url, HTTP_PROXY="http://127.0.0.1:1").stdout == "Yes.\n"


def test_top_says_what_it_needs(other: Other, refused: Callable[..., FoveateError]) -> None:
    other.replies["/metrics"] = (200, b"# TYPE vllm:running gauge\nvllm:running 1\n")
    error = refused("top", "--once", "--url", other.url)
    assert (error.exit_status, error.message) == (1, f"{other.url} has no metrics of a Foveate server")
    other.replies["/metrics"] = (200, b"<html>hello</html>")
    error = refused("top", "--once", "--url", other.url)
    assert (error.exit_status, error.message) == (1, "/metrics is not in Prometheus' text format")
