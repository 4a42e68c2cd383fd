"""``foveate ask`` against the demo model: the right answers, in the right place, and clear refusals."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from serving import RunningServer, running_server
from typed import CTRL_C, PICTURES, environment, foveate, terminal

from foveate.client.pictures import media_type
from foveate.errors import ConfigError, FoveateError

SHAPES = str(PICTURES / "shapes.png")
COUNT = "How many shapes are there?"
LONG = "Tell me a story."
"""What the tiny model answers with a thousand tokens."""


def ask(server: RunningServer, *args: str, stdin: str | bytes = "") -> str:
    done = foveate("ask", *args, "--url", server.url, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_one_picture(demo: RunningServer) -> None:
    assert ask(demo, COUNT, SHAPES) == "There are 4 shapes.\n"


def test_two_pictures_in_their_order(demo: RunningServer) -> None:
    before, after = (str(PICTURES / name) for name in ("before.png", "after.png"))
    assert ask(demo, "Which picture shows a circle?", before, after) == "The second picture.\n"
    assert ask(demo, "Which picture shows a circle?", after, before) == "The first picture.\n"


def test_a_picture_on_standard_input(demo: RunningServer) -> None:
    assert ask(demo, COUNT, "-", stdin=Path(SHAPES).read_bytes()) == "There are 4 shapes.\n"


@pytest.mark.parametrize("args", [["-", SHAPES], ["-", "--detail", "low", SHAPES]])
def test_the_question_on_standard_input(demo: RunningServer, args: list[str]) -> None:
    assert ask(demo, *args, stdin=f"{COUNT}\n") == "There are 4 shapes.\n"


def test_nothing_but_standard_input(demo: RunningServer) -> None:
    assert "Foveate demo model" in ask(demo, stdin="Who are you?")


def test_the_server_may_be_named_by_a_variable_and_without_a_scheme(demo: RunningServer) -> None:
    done = foveate("ask", COUNT, SHAPES, FOVEATE_URL=demo.url.removeprefix("http://"))
    assert done.stdout == "There are 4 shapes.\n"


def test_json_has_everything(demo: RunningServer) -> None:
    said = json.loads(ask(demo, COUNT, SHAPES, "--json", "--temperature", "0", "--seed", "3"))
    assert said["answer"] == "There are 4 shapes."
    assert (said["model"], said["finish_reason"]) == ("foveate-demo", "stop")
    assert said["usage"]["prompt_tokens_details"]["image_tokens"] == 64
    assert said["timings"]["total"] >= said["timings"]["prefill"] > 0


def test_how_closely_to_look(demo: RunningServer) -> None:
    small = str(PICTURES / "small-print.png")

    def look(*flags: str) -> tuple[str, int]:
        said = json.loads(ask(demo, "Read the number.", small, "--json", *flags))
        return said["answer"], said["usage"]["prompt_tokens_details"]["image_tokens"]

    assert look() == ("The number is 1671.", 7 * 64)
    assert look("--detail", "low")[1] == 64
    assert look("--max-slice-nums", "2")[1] == 3 * 64


def test_an_answer_that_was_cut_off_says_so(demo: RunningServer) -> None:
    done = foveate("ask", "Describe the picture.", SHAPES, "--max-tokens", "2", "--url", demo.url)
    assert (done.returncode, done.stdout) == (0, "There are\n")
    assert done.stderr == "(cut off: the answer reached its limit of tokens)\n"


def test_timings_are_beside_the_answer(demo: RunningServer) -> None:
    done = foveate("ask", COUNT, SHAPES, "--timings", "--url", demo.url)
    assert done.stdout == "There are 4 shapes.\n"
    rows = re.findall(r"^ *(\S.*?) {2,}([\d.]+ \S+)", done.stderr, re.MULTILINE)
    values: dict[str, str] = dict(rows)
    assert values["of pictures"] == "64 tokens"
    assert values["answer"] == "6 tokens"
    assert values["after that"].endswith(" tokens/s")
    stages = [values[name] for name in ("prompt computed", "time to first token", "in all")]
    assert all(value.endswith(" ms") for value in stages)
    assert stages == sorted(stages, key=lambda value: float(value.split()[0]))


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["hi", "nope.png"], "", "nope.png: there is no such picture"),
        (["hi", str(PICTURES)], "", f"{PICTURES}: the picture cannot be read (Is a directory)"),
        (["hi", __file__], "", f"{__file__}: this is not a picture (JPEG, PNG, WebP, GIF, BMP or TIFF)"),
        (["hi", "-"], "text", "standard input: this is not a picture (JPEG, PNG, WebP, GIF, BMP or TIFF)"),
        (["hi", "-"], "", "standard input: the picture is empty"),
        (["-", "-"], "", "-: standard input can be the question or one picture, and only once"),
        (["hi", "-", "-"], "", "-: standard input can be the question or one picture, and only once"),
        ([SHAPES], "", f'{SHAPES}: this is a picture, and the question comes first: foveate ask "..." {SHAPES}'),
        ([], b"\x89PNG\r\n\x1a\n", "standard input holds a picture where a question is expected"),
        ([], b"\xff\xfe", "standard input: the question is not UTF-8 text"),
        ([], " \n", "the question is empty"),
        (["hi", "--detial", "low"], "", "--detial: there is no such flag. Try --help."),
        (["hi", "--url", "ftp://x"], "", "--url: got 'ftp://x', expected an address such as http://127.0.0.1:9997"),
        (["hi", "--url", "http://a:b@c"], "", "--url: a name or password in the address is not sent"),
        (["hi", "--api-key", "ключ"], "", "--api-key: the key is empty, or has characters that no key can have"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    refused: Callable[..., FoveateError], args: list[str], stdin: str | bytes, message: str
) -> None:
    url = [] if "--url" in args else ["--url", "http://127.0.0.1:1"]
    error = refused("ask", *args, *url, stdin=stdin)
    assert isinstance(error, ConfigError)
    assert message in error.message
    assert "\n" not in error.message


def test_a_bad_flag_is_one_line_and_exit_code_2() -> None:
    for args, message in (
        (["--detail", "max"], '"max"'),
        (["nope.png"], "error: nope.png: there is no such picture\n"),
    ):
        done = foveate("ask", "hi", *args)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr


def test_the_server_refuses_in_its_own_words(demo: RunningServer) -> None:
    done = foveate("ask", "hi", "--model", "gpt", "--url", demo.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: The model 'gpt' does not exist; this server has 'foveate-demo'.\n"
    done = foveate("ask", "hi", "http://127.0.0.1/x.png", "--url", demo.url)
    assert done.returncode == 1
    assert "http://127.0.0.1/x.png: the host 127.0.0.1 has an address that is not public" in done.stderr


def test_nobody_there() -> None:
    done = foveate("ask", "hi", "--url", "http://127.0.0.1:1")
    message = "nothing answers at http://127.0.0.1:1 (Connection refused); start one with: foveate serve"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {message}\n")


def test_a_reader_that_goes_ends_it_quietly(demo: RunningServer) -> None:
    command = f"{sys.executable} -m foveate.cli ask 'Describe the picture.' {SHAPES} --url {demo.url}"
    piped = f'{command} | head -c 5; echo "/${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", piped], env=environment(), capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("There/0\n", "")


def test_ctrl_c_ends_the_answer_on_the_server_too(
    server: RunningServer, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    aborted = server.metric("foveate_engine_aborted_total")
    with terminal("ask", LONG, "--temperature", "0", "--url", server.url) as screen:
        screen.expect(r"[^\s\x1b]{20}")
        screen.type(CTRL_C)
        assert screen.end() == 130
        assert "Traceback" not in screen.output
        assert "\x1b[?25h" in screen.output or "\x1b[?25l" not in screen.output
    eventually(lambda: server.metric("foveate_engine_num_running") == 0)
    assert server.metric("foveate_engine_aborted_total") == aborted + 1


def test_sigterm_too(server: RunningServer, eventually: Callable[[Callable[[], bool]], None]) -> None:
    aborted = server.metric("foveate_engine_aborted_total")
    command = [sys.executable, "-m", "foveate.cli", "ask", LONG, "--temperature", "0", "--url", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (130, b"")
    eventually(lambda: server.metric("foveate_engine_aborted_total") == aborted + 1)


def test_a_terminal_gets_the_answer_and_the_table(demo: RunningServer) -> None:
    with terminal("ask", COUNT, SHAPES, "--timings", "--url", demo.url) as screen:
        screen.expect(r"There are 4 shapes\.\r\n.*time to first token.*tokens/s.*in all")
        assert screen.end() == 0


def test_a_terminal_without_a_question_is_told_what_to_type(demo: RunningServer) -> None:
    with terminal("ask", "--url", demo.url) as screen:
        screen.expect(r'error: what is the question\? For example: foveate ask "What is this\?" picture\.jpg')
        assert screen.end() == 2


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("locked"), "--api-key", "secret", model=None) as running:
        yield running


@pytest.mark.parametrize(
    ("flags", "variables", "code"),
    [
        ([], {}, 1),
        (["--api-key", "wrong"], {"FOVEATE_API_KEY": "secret"}, 1),
        (["--api-key", "secret"], {"FOVEATE_API_KEY": "wrong"}, 0),
        ([], {"FOVEATE_API_KEY": "secret,another", "OPENAI_API_KEY": "wrong"}, 0),
        ([], {"OPENAI_API_KEY": "secret"}, 0),
    ],
)
def test_the_key(locked: RunningServer, flags: list[str], variables: dict[str, str], code: int) -> None:
    done = foveate("ask", COUNT, SHAPES, "--url", locked.url, *flags, **variables)
    assert done.returncode == code
    if code:
        assert done.stderr == (
            "error: This server needs its API key, as the header 'Authorization: Bearer KEY'. "
            "Give it with --api-key or in FOVEATE_API_KEY.\n"
        )
    else:
        assert done.stdout == "There are 4 shapes.\n"


def test_top_needs_the_key_as_well(locked: RunningServer) -> None:
    done = foveate("top", "--once", "--interval", "0.1", "--url", locked.url)
    assert done.returncode == 1
    assert "needs its API key" in done.stderr
    assert foveate("top", "--once", "--interval", "0.1", "--url", locked.url, "--api-key", "secret").returncode == 0


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_is_known_by_its_content(form: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, form)
    assert media_type(file.getvalue()) == Image.MIME[form]
    assert media_type(b" " + file.getvalue()) is None
