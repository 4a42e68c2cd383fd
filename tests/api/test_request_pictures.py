"""Pictures in requests: where they come from, what they cost, and what is refused."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from chat_messages import GOLDEN, data_url, picture, text, user
from PIL import Image
from serving import RunningServer, running_server

TOKENS_PER_SLICE = 64


class PictureHost(BaseHTTPRequestHandler):
    """Serves the golden pictures and counts how often."""

    requested: list[str] = []  # noqa: RUF012 - the handler's only place for it; cleared by the fixture

    def do_GET(self) -> None:
        self.requested.append(self.path)
        file = GOLDEN / "assets" / self.path.lstrip("/")
        self.send_response(200 if file.is_file() else 404)
        self.end_headers()
        if file.is_file():
            self.wfile.write(file.read_bytes())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[str]:
    PictureHost.requested.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), PictureHost) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with tight limits that fetches from this machine and from one folder."""
    folder = tmp_path_factory.mktemp("small")
    flags = [
        "--allowed-media-hosts",
        "127.0.0.1",
        "--allowed-media-path",
        str(GOLDEN / "assets"),
        "--max-images-per-request",
        "3",
    ]
    limits = ["--max-image-bytes", "200000", "--max-image-pixels", "900000"]
    with (
        running_server(folder, *flags, *limits) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        yield client


def send(http: httpx.Client, *content: Any) -> httpx.Response:
    fields = {
        "model": "model",
        "messages": [user(*content)],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
    }
    return http.post("/v1/chat/completions", json=fields)


def image_tokens(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["image_tokens"])


def error(answer: httpx.Response, code: str | None) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert (found["type"], found["code"]) == ("invalid_request_error", code)
    return found


@pytest.mark.parametrize(
    ("options", "slices"),
    [
        ({}, 5),
        ({"detail": "auto"}, 5),
        ({"detail": "high"}, 5),
        ({"detail": None, "max_slice_nums": None}, 5),
        ({"detail": "low"}, 1),
        ({"detail": "low", "max_slice_nums": 1}, 1),
        ({"max_slice_nums": 1}, 1),
        ({"max_slice_nums": 2}, 3),
        ({"max_slice_nums": 9, "detail": "high"}, 5),
    ],
)
def test_detail_and_max_slice_nums_decide_the_tokens(http: httpx.Client, options: dict[str, Any], slices: int) -> None:
    assert image_tokens(send(http, picture("image1.jpg", **options))) == slices * TOKENS_PER_SLICE


def test_max_slice_nums_may_stand_in_the_part(http: httpx.Client) -> None:
    assert image_tokens(send(http, picture("image1.jpg") | {"max_slice_nums": 1})) == TOKENS_PER_SLICE
    twice = picture("image1.jpg", max_slice_nums=2) | {"max_slice_nums": 1}
    found = error(send(http, twice), None)
    assert found["param"] == "messages[0].content[0].max_slice_nums"


@pytest.mark.parametrize(
    ("options", "field"), [({"max_slice_nums": 10}, "9"), ({"max_slice_nums": 3, "detail": "low"}, "low")]
)
def test_impossible_slicing_is_refused(http: httpx.Client, options: dict[str, Any], field: str) -> None:
    found = error(send(http, "See:", picture("image1.jpg", **options)), None)
    assert found["param"] == "messages[0].content[1].image_url.max_slice_nums"
    assert field in found["message"]


def test_several_pictures_anywhere(http: httpx.Client) -> None:
    names = ["syn_palette.png", "frame_0.jpg", "syn_rgba.png"]
    parts = [part for name in names for part in (picture(name, detail="low"), text(name))]
    assert image_tokens(send(http, *parts)) == 3 * TOKENS_PER_SLICE
    assert image_tokens(send(http, *parts[::-1], parts[0])) == 4 * TOKENS_PER_SLICE


def test_pictures_matter(http: httpx.Client) -> None:
    answers = {
        send(http, picture(name, detail="low"), "What is it?").json()["choices"][0]["message"]["content"]
        for name in ("image1.jpg", "image2.jpg", "frame_0.jpg")
    }
    assert len(answers) > 1


def as_data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def truncated(name: str) -> bytes:
    content = (GOLDEN / "assets" / name).read_bytes()
    return content[: len(content) // 2]


def blank(width: int, height: int) -> bytes:
    output = io.BytesIO()
    Image.new("1", (width, height)).save(output, "PNG")
    return output.getvalue()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,",
        "data:image/png;base64,????",
        "data:text/plain;base64,aGVsbG8=",
        "data:image/png",
        as_data_url(b"hello"),
        as_data_url(truncated("image1.jpg")),
        as_data_url(truncated("syn_wide.png")),
        as_data_url(truncated("syn_wide.png")[:20]),
        as_data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        as_data_url(blank(8001, 8000)),
    ],
    ids=[
        "empty",
        "base64",
        "text",
        "comma",
        "noise",
        "half a JPEG",
        "half a PNG",
        "half a header",
        "SVG",
        "pixels",
    ],
)
def test_a_bad_picture_is_named(http: httpx.Client, url: str) -> None:
    bad = {"type": "image_url", "image_url": {"url": url}}
    found = error(send(http, picture("syn_palette.png"), "and", bad), "invalid_image")
    assert found["param"] == "messages[0].content[2]"
    assert "icture 2" in found["message"]
    assert image_tokens(send(http, picture("syn_palette.png"))) == TOKENS_PER_SLICE


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        f"file://{GOLDEN}/assets/image1.jpg",
        "http://127.0.0.1:1/picture.png",
        "http://localhost/picture.png",
        "http://[::1]/picture.png",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/picture.png",
        "http://0x7f000001/picture.png",
        "http://picture.invalid/picture.png",
        "ftp://example.com/picture.png",
        "picture.png",
        "http://",
    ],
)
def test_a_url_that_may_not_be_fetched_is_named(http: httpx.Client, url: str) -> None:
    found = error(send(http, {"type": "image_url", "image_url": {"url": url}}), "image_unreachable")
    assert found["param"] == "messages[0].content[0]"
    assert "icture 1" in found["message"]


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_only_users_show_pictures(http: httpx.Client, role: str) -> None:
    messages = [{"role": role, "content": [text("See:"), picture("syn_palette.png")]}, user("Well?")]
    found = error(http.post("/v1/chat/completions", json={"model": "model", "messages": messages}), None)
    assert found["param"] == "messages[0].content[1]"
    assert role in found["message"]


def test_a_url_is_fetched_once_a_request(small: httpx.Client, host: str) -> None:
    part = {"type": "image_url", "image_url": {"url": f"{host}/syn_wide.png"}}
    fetched = send(small, part, "and again", part)
    assert image_tokens(fetched) == 2 * image_tokens(send(small, picture("syn_wide.png")))
    assert PictureHost.requested == ["/syn_wide.png"]


def test_a_url_and_its_data_are_the_same_picture(small: httpx.Client, host: str) -> None:
    urls = [f"{host}/frame_0.jpg", data_url("frame_0.jpg"), f"file://{GOLDEN}/assets/frame_0.jpg"]
    answers = {
        send(small, {"type": "image_url", "image_url": {"url": url}}, "What?").json()["choices"][0]["message"][
            "content"
        ]
        for url in urls
    }
    assert len(answers) == 1


def test_limits_of_pictures(small: httpx.Client, host: str, tmp_path: Path) -> None:
    missing = {"type": "image_url", "image_url": {"url": f"{host}/missing.png"}}
    assert "404" in error(send(small, missing), "image_unreachable")["message"]
    outside = {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/picture.png"}}
    assert "outside" in error(send(small, outside), "image_unreachable")["message"]
    assert "900000" in error(send(small, picture("image2.jpg")), "invalid_image")["message"]
    heavy = as_data_url(bytes(200_001))
    found = error(send(small, {"type": "image_url", "image_url": {"url": heavy}}), "invalid_image")
    assert "200000" in found["message"]
    found = error(send(small, *[picture("syn_palette.png")] * 4), None)
    assert "at most 3" in found["message"]


def test_one_picture_over_turns(client: openai.OpenAI, server: RunningServer) -> None:
    turns: list[Any] = [user(picture("syn_rgba.png"), "What is it?")]
    encoded = server.metric('foveate_pictures_total{cached="true"}')
    for question in ("And the colour?", "Sure?"):
        answer = client.chat.completions.create(model="model", messages=turns, max_tokens=4, temperature=0)
        turns += [answer.choices[0].message.model_dump(), user(question)]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) > TOKENS_PER_SLICE
    assert server.metric('foveate_pictures_total{cached="true"}') > encoded
