"""A request's prompt is computed as far as its pictures are there, while others are still fetched or encoded."""

from __future__ import annotations

import base64
import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from live import Live, Talker, ask, live_server, picture, question
from serving import RunningServer
from test_vision_failures import PAGES, SLOW, kill_encoder, send_and_hang_up

Eventually = Callable[[Callable[[], bool]], None]

FIRST, SECOND = picture(40), picture(41, 1300, 1300)
FETCHING = "--allowed-media-hosts=127.0.0.1"


def content(part: dict[str, Any]) -> bytes:
    """The file of a picture of :mod:`live`."""
    return base64.b64decode(part["image_url"]["url"].partition(",")[2])


class SlowHost:
    """Serves one file: the first half at once, the rest when it is told to."""

    def __init__(self) -> None:
        self.file = content(SECOND)
        self.rest = self.file[len(self.file) // 2 :]
        self.go_on = threading.Event()
        self.asked = 0
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(host.file)))
                self.end_headers()
                self.wfile.write(host.file[: len(host.file) // 2])
                assert host.go_on.wait(60)
                self.wfile.write(host.rest)

            def log_message(self, format: str, *args: object) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # Whoever asked has hung up.
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def part(self) -> dict[str, Any]:
        """The picture as a part of a message."""
        return {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{self.server.server_port}/slow.png"}}


@pytest.fixture
def host() -> Iterator[SlowHost]:
    made = SlowHost()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.go_on.set()
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server that fetches from this machine, for tests that leave it whole."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, live_server(Path(folder), FETCHING) as made:
        yield made


def engine(live: Live, name: str) -> float:
    """One number of the engine's; -1 while it does not answer."""
    return live.metrics().get(f"foveate_engine_{name}", -1.0)


def begin(live: Live, eventually: Eventually) -> None:
    """Wait until the engine has computed the beginning of a prompt, and waits for the rest."""
    eventually(lambda: engine(live, "num_running") == 1)
    eventually(lambda: engine(live, "steps_total") > 0)


def see_nothing_left(live: Live, eventually: Eventually) -> None:
    """See that nobody holds blocks or leases, or waits for anything."""
    eventually(lambda: engine(live, "num_running") == engine(live, "num_waiting") == 0)
    assert engine(live, "free_blocks") == engine(live, "total_blocks")
    eventually(lambda: live.vision("arena_leases") == 0)
    eventually(lambda: live.vision("pictures_running") == 0)
    assert live.metrics()["foveate_requests_running"] == 0


def test_the_first_picture_is_looked_at_while_the_second_is_fetched(
    host: SlowHost, live: Live, server: RunningServer, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    expected = ask(server.url, FIRST, SECOND)
    assert engine(live, "steps_total") == 0
    asked = pool.submit(live.post, FIRST, host.part, timings=True, ignore_eos=True)
    eventually(lambda: engine(live, "steps_total") == 1)
    assert live.vision("pictures_total") == 1
    # Text is answered meanwhile, and the prompt goes no further.
    assert live.post().status_code == 200
    assert engine(live, "num_running") == 1
    assert not asked.done()
    host.go_on.set()
    answer = asked.result()
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == expected
    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 11 * 64
    timings = answer.json()["timings"]
    assert max(timings.values()) == timings["total"]
    # It waited for its picture at least as long as that was fetched, and that is no part of its prefill.
    assert timings["wait"] + timings["prefill"] <= timings["total"]
    assert timings["wait"] > 0
    assert live.vision("pictures_total") == 2
    see_nothing_left(live, eventually)


def test_pictures_follow_as_they_are_encoded(
    runtime: Path, server: RunningServer, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    expected = ask(server.url, *PAGES)
    with live_server(runtime, *SLOW) as live:
        asked = pool.submit(live.ask, *PAGES)
        eventually(lambda: engine(live, "steps_total") > 0)
        assert live.vision("pictures_running") > 0
        assert asked.result() == expected
        assert live.ask(*PAGES) == expected
        see_nothing_left(live, eventually)


def test_an_encoder_that_dies_between_two_pictures_loses_nothing(
    host: SlowHost, runtime: Path, server: RunningServer, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    expected = ask(server.url, FIRST, SECOND)
    with live_server(runtime, FETCHING) as live:
        asked = pool.submit(live.ask, FIRST, host.part)
        begin(live, eventually)
        with Talker(live) as talker:
            eventually(lambda: talker.pieces > 0)
            kill_encoder(live, talker, eventually)
        host.go_on.set()
        assert asked.result() == expected
        # The new one was asked for the second picture only.
        assert live.vision("pictures_total") == 1
        see_nothing_left(live, eventually)


def test_an_engine_that_dies_between_two_pictures_is_an_error(
    host: SlowHost, runtime: Path, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    with live_server(runtime, FETCHING) as live:
        asked = pool.submit(live.post, FIRST, host.part)
        begin(live, eventually)
        live.engine.kill()
        assert asked.result().json()["error"]["code"] == "engine_error"
        eventually(live.is_ready)
        see_nothing_left(live, eventually)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("rest", "code", "reason"),
    [(b"x" * 1000, "image_unreachable", "fetching failed"), (None, "invalid_image", "corrupt")],
    ids=["cut off", "corrupt"],
)
def test_a_picture_that_fails_later_is_named_all_the_same(
    rest: bytes | None,
    code: str,
    reason: str,
    stream: bool,
    host: SlowHost,
    live: Live,
    pool: ThreadPoolExecutor,
    eventually: Eventually,
) -> None:
    host.rest = rest if rest is not None else b"\xff" * len(host.rest)
    asked = pool.submit(live.post, FIRST, host.part, stream=stream)
    begin(live, eventually)
    host.go_on.set()
    answer = asked.result()
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, "messages[0].content[1]")
    assert error["message"].startswith("Picture 2 (messages[0].content[1]): ")
    assert reason in error["message"]
    see_nothing_left(live, eventually)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_between_two_pictures_leaves_nothing(
    stream: bool, host: SlowHost, live: Live, eventually: Eventually
) -> None:
    aborted = engine(live, "aborted_total")
    fields = question(FIRST, host.part, stream=stream)
    send_and_hang_up(live, fields, lambda: engine(live, "num_running") == 1, eventually)
    see_nothing_left(live, eventually)
    assert engine(live, "aborted_total") == aborted + 1
    host.go_on.set()
    assert live.post(FIRST, host.part).status_code == 200


def test_a_prompt_that_is_known_is_one_part_however_its_pictures_come(live: Live, eventually: Eventually) -> None:
    first = live.post(FIRST, SECOND).json()
    before = engine(live, "steps_total")
    again = live.post(FIRST, SECOND).json()
    assert again["choices"] == first["choices"]
    assert engine(live, "steps_total") - before == again["usage"]["completion_tokens"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 11 * 64
    see_nothing_left(live, eventually)
