"""The load generator against a real server, and against one that does everything wrong."""

from __future__ import annotations

import io
import itertools
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from serving import RunningServer

from foveate.bench.serve import Answer, command, summarize
from foveate.errors import ConfigError, FoveateError
from foveate.workload import Workload, draw_picture

WORKLOAD = Workload(output_tokens=5, prompt_words=8, picture=(60, 50), same_picture=False, seed=3)
USAGE = {"prompt_tokens": 9, "completion_tokens": 4}


def events(*payloads: dict[str, object], done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(payload)}\n\n" for payload in payloads]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


def text(content: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": content}}]}


FAULTS = {
    "status 503: busy": (503, b"busy"),
    "the answer has 4 tokens instead of 5": (
        200,
        events(text(""), text("a"), {"choices": [], "usage": USAGE}),
    ),
    "FoveateError: the stream broke off": (200, events(text("a"), done=False)),
    "FoveateError: it broke": (200, events(text("a"), {"error": {"message": "it broke"}}, done=False)),
    "the answer has no text": (200, events(text(""), {"usage": {**USAGE, "completion_tokens": 5}})),
}


@pytest.fixture
def faulty() -> Iterator[str]:
    """A server that commits each fault in turn."""
    faults = itertools.cycle(FAULTS.values())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, json.dumps({"data": [{"id": "m"}]}).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._reply(*next(faults))

        def _reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_real_server_is_measured(server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    code = command(
        url=server.url,
        concurrency="1,3",
        requests=4,
        output_tokens=6,
        picture="100x80",
        warmup=1,
        json=report,
    )
    assert code == 0
    result = json.loads(report.read_bytes())
    assert result["model"] == server.model
    assert [level["concurrency"] for level in result["levels"]] == [1, 3]
    for level in result["levels"]:
        assert (level["requests"], level["errors"]) == (4, {})
        assert level["image_tokens"] > 0
        assert level["output_tokens_per_s"] == pytest.approx(level["requests_per_s"] * 6, rel=0.01)
        for p50, p99 in (level["ttft_ms"], level["e2e_ms"]):
            assert 0 < p50 <= p99
        assert level["e2e_ms"][1] >= level["ttft_ms"][1]
        assert level["tpot_ms"][1] > 0
    assert server.model in capsys.readouterr().out


def test_the_same_picture_is_encoded_once(server: RunningServer) -> None:
    def encoded() -> float:
        return server.metric('foveate_pictures_total{cached="false"}')

    arguments = {"url": server.url, "concurrency": "1", "requests": 3, "output_tokens": 2, "picture": "64x64"}
    assert command(**arguments, warmup=1, seed=1) == 0
    before = encoded()
    assert command(**arguments, warmup=1, seed=2) == 0
    assert encoded() - before == 4
    assert command(**arguments, warmup=1, seed=3, same_picture=True) == 0
    assert encoded() - before == 5


def test_every_fault_is_counted_by_name(faulty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    code = command(url=faulty, concurrency="1", requests=10, output_tokens=5, warmup=0, json=report)
    assert code == 1
    (level,) = json.loads(report.read_bytes())["levels"]
    assert level["errors"] == dict.fromkeys(FAULTS, 2)
    assert level["output_tokens_per_s"] == 0
    printed = capsys.readouterr().out
    assert all(f"2 x at 1 clients: {fault}" in printed for fault in FAULTS)


def test_nobody_there_is_an_error_with_the_address() -> None:
    with pytest.raises(FoveateError, match=r"http://127\.0\.0\.1:1"):
        command(url="http://127.0.0.1:1", requests=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"concurrency": "1,x"}, "--concurrency: got 'x'"),
        ({"concurrency": "0"}, "--concurrency: got '0'"),
        ({"picture": "448"}, "--picture: got ''"),
        ({"picture": "1x-1"}, "--picture: got '-1'"),
        ({"requests": 0}, "--requests: got '0'"),
        ({"output_tokens": -3}, "--output-tokens: got '-3'"),
        ({"json": Path("/nowhere/report.json")}, "--json: got '/nowhere/report.json'"),
    ],
)
def test_a_bad_flag_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        command(url="http://127.0.0.1:1", **arguments)  # type: ignore[arg-type]


def test_flags_of_serve_need_a_server_to_start() -> None:
    with pytest.raises(ConfigError, match="--max-batch-size 3: not understood"):
        command("--max-batch-size", "3", url="http://127.0.0.1:1")


def test_a_server_that_does_not_start_gives_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    assert command("--max-batch-size", "none") == 2
    assert "error: --max-batch-size: got 'none'" in capfd.readouterr().err


def bodies(count: int, workload: Workload) -> list[bytes]:
    return list(itertools.islice(workload.bodies("m"), count))


def test_every_request_differs_and_a_seed_repeats_them() -> None:
    first = bodies(20, WORKLOAD)
    assert len(set(first)) == 20
    assert first == bodies(20, WORKLOAD)
    assert first != bodies(20, replace(WORKLOAD, seed=4))


def test_text_to_read_back_is_asked_for() -> None:
    def texts(workload: Workload) -> list[str]:
        contents = [json.loads(body)["messages"][0]["content"] for body in bodies(3, workload)]
        return [part["text"] for content in contents for part in content if "text" in part]

    for plain, repeated in zip(texts(WORKLOAD), texts(replace(WORKLOAD, read_back=True)), strict=True):
        assert repeated.startswith(plain + "\n")
        assert "word for word" in repeated


def test_pictures_differ_unless_the_same_is_wanted() -> None:
    def pictures(workload: Workload) -> set[str]:
        contents = [json.loads(body)["messages"][0]["content"] for body in bodies(6, workload)]
        return {part["image_url"]["url"] for content in contents for part in content if "image_url" in part}

    assert len(pictures(WORKLOAD)) == 6
    assert len(pictures(replace(WORKLOAD, same_picture=True))) == 1
    assert not pictures(replace(WORKLOAD, picture=None))


@pytest.mark.parametrize("size", [(1, 1), (448, 448), (30, 2000)])
def test_a_picture_has_the_size_asked_for(size: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(draw_picture(*size, random.Random(1)))) as picture:
        assert (picture.format, picture.size) == ("JPEG", size)


def test_the_summary_is_of_the_answers_alone() -> None:
    def answer(ttft: float) -> Answer:
        return Answer(ttft, 0.01, 1.0, 10, 40, 16, 0)

    level = summarize(2, 2.0, [answer(0.1), answer(0.2), answer(0.3), "oh", "oh", "dear"])
    assert level.errors == {"oh": 2, "dear": 1}
    assert level.ttft_ms == (200.0, pytest.approx(298.0))
    assert level.output_tokens_per_s == 15
    assert level.requests_per_s == 1.5
    assert (level.prompt_tokens, level.cached_tokens, level.requests) == (40, 16, 6)
