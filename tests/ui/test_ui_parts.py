"""What the web chat makes of words, of a server's events, and of requests from elsewhere."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse

from foveate.ui.conversation import Picture, Sampling, Turn, request_body
from foveate.ui.facts import Facts
from foveate.ui.guard import Guard
from foveate.ui.markup import error_box, facts_box, harmless, thumbnails
from foveate.ui.server import Server, ServerError
from foveate.ui.words import words

MARK = "\u2060"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("3 < 5 and a<5", "3 < 5 and a<5"),
        ("<b>x</b>", f"<{MARK}b>x<{MARK}/b>"),
        ("<!-- --><?x", f"<{MARK}!-- --><{MARK}?x"),
        ("```html\n<b>\n```\n<b>", f"```html\n<b>\n```\n<{MARK}b>"),
        ("~~~~\n<b>\n~~~\n<b>\n~~~~~\n<b>", f"~~~~\n<b>\n~~~\n<b>\n~~~~~\n<{MARK}b>"),
        # What looks like a fence and is none.
        ("``` a`b\n<b>", f"``` a`b\n<{MARK}b>"),
        ("- ```\n<b>", f"- ```\n<{MARK}b>"),
    ],
)
def test_words_are_no_html_but_code_stays_code(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_names_and_messages_are_escaped() -> None:
    evil = '"><script>x</script>'
    facts = Facts(timings={"prefill": 0.5})
    facts.read({"pictures": [{"width": 1, "height": 1, "slices": 1, "grid": None, "tokens": 64, "cached": False}]})
    facts.read({"choices": [{"delta": {"content": "x"}}]})
    boxes = [
        thumbnails([""], [evil]),
        thumbnails(["data:,"], [evil]),
        error_box(evil, words("en")),
        facts_box(facts, [(evil, "data:,")], words("en")),
    ]
    for box in boxes:
        assert "<script" not in box
        assert "&lt;script&gt;" in box


def test_a_servers_nonsense_is_passed_over() -> None:
    facts = Facts()
    for event in (
        {"choices": None, "usage": [], "timings": "x", "pictures": {}},
        {"choices": [None, {"delta": None}, {"delta": {"content": 5}}]},
        {"usage": {"prompt_tokens": "9", "completion_tokens": -1, "prompt_tokens_details": 3}},
        {"timings": {"prefill": "slow", "decode": True}},
        {"pictures": [None, {"width": 3}, {"width": 1, "height": 1, "slices": 0, "tokens": 5, "grid": [0, 1]}]},
    ):
        assert facts.read(event) == ""
    assert (facts.prompt_tokens, facts.completion_tokens, facts.timings) == (None, None, {})
    assert [one.grid for one in facts.seen] == [None]
    # One with no slices, and pictures that were never sent.
    assert "64" not in facts_box(facts, [("a", "")], words("zh"))


def test_only_foveate_is_asked_for_more(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"no picture")
    pictures = [Picture(file, "a.png", "high", 4), Picture(file, "a.png", "low", 4)]
    turns = [Turn("refused", error="no"), Turn("1", answer="one"), Turn("2", pictures)]
    bodies = [
        request_body(turns, model="m", system="be brief", sampling=Sampling(seed=0), is_foveate=one)
        for one in (True, False)
    ]
    assert [body.get("timings") for body in bodies] == [True, None]
    assert [[one["role"] for one in body["messages"]] for body in bodies] == [
        ["system", "user", "assistant", "user"]
    ] * 2
    assert all((body["seed"], "temperature" in body) == (0, False) for body in bodies)
    high, low, text = bodies[0]["messages"][-1]["content"]
    assert (high["image_url"]["detail"], high["image_url"]["max_slice_nums"]) == ("high", 4)
    assert (low["image_url"]["detail"], "max_slice_nums" in low["image_url"]) == ("low", False)
    assert text == {"type": "text", "text": "2"}
    assert "max_slice_nums" not in bodies[1]["messages"][-1]["content"][0]["image_url"]
    file.unlink()
    with pytest.raises(ServerError, match=r"a\.png is no longer there"):
        request_body(turns, model="m", system="", sampling=Sampling(), is_foveate=True)


async def test_a_server_that_is_not_there_is_named() -> None:
    server = Server("http://127.0.0.1:9/v1")
    with pytest.raises(ServerError, match=r"The server at http://127\.0\.0\.1:9 cannot be reached"):
        await server.models()
    assert not await server.is_foveate()
    with pytest.raises(ServerError, match="no header can carry"):
        await server.models("schlüssel")
    await server.close()


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {"host": "localhost:7860"}, 200),
        ("GET", "/", {"host": "[::1]:7860"}, 200),
        ("GET", "/", {"host": "evil.example"}, 403),
        ("GET", "/", {"host": "127.0.0.1.evil.example"}, 403),
        ("POST", "/", {"host": "localhost", "origin": "http://localhost"}, 200),
        ("POST", "/", {"host": "localhost", "origin": "http://evil.example"}, 403),
        ("POST", "/", {"host": "localhost", "sec-fetch-site": "same-origin"}, 200),
        ("POST", "/", {"host": "localhost", "sec-fetch-site": "same-site"}, 403),
        ("POST", "/gradio_api/upload", {"host": "localhost"}, 507),
    ],
)
async def test_the_guard(tmp_path: Path, method: str, path: str, headers: dict[str, str], status: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"four")
    guard = Guard(PlainTextResponse("yes"), tmp_path, check_host=True, limit=3)
    transport = httpx.ASGITransport(guard)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.request(method, path, headers=headers)
    assert answer.status_code == status
    assert "default-src 'self'" in answer.headers["content-security-policy"]
