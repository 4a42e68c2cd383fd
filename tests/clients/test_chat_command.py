"""``foveate chat``: scripted through a pipe, and typed at a real terminal."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from other_server import Other
from serving import RunningServer
from typed import CTRL_C, CTRL_D, PICTURES, foveate, terminal

from foveate.client.conversation import Conversation
from foveate.client.pictures import Picture
from foveate.errors import FoveateError

SHAPES = str(PICTURES / "shapes.png")
Eventually = Callable[[Callable[[], bool]], None]


def script(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)


def test_several_turns_with_a_picture(demo: RunningServer, tmp_path: Path) -> None:
    typed = script(
        f"/image '{SHAPES}'",
        "What is at the top right?",
        "",
        "And what colour is it?",
        "/retry",
        f"/save {tmp_path}/chat.json",
        f"/save {tmp_path}/chat.md",
        "/clear",
        f"/image {PICTURES}/before.png",
        f"/image {PICTURES}/after.png",
        "Which picture shows a circle?",
        "/quit",
        "never asked",
    )
    done = foveate("chat", "--url", demo.url, stdin=typed)
    assert done.stdout.splitlines() == ["A green circle.", "It is green.", "It is green.", "The second picture."]
    assert done.returncode == 0
    assert f"({PICTURES}/after.png comes with the next question, as picture 2)" in done.stderr
    messages = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "text"]
    assert messages[3]["content"] == "It is green."
    assert (tmp_path / "chat.md").read_text() == (
        f"**You:** [{SHAPES}] What is at the top right?\n\nA green circle.\n\n"
        "**You:** And what colour is it?\n\nIt is green.\n"
    )


def test_pictures_and_a_system_prompt_from_the_command_line(other: Other) -> None:
    other.answers({"choices": [{"delta": {"content": "Yes."}, "finish_reason": "stop"}]})
    typed = script("one", "/system Be kind.", "two", "/system", "three")
    done = foveate("chat", SHAPES, "--system", "Be brief.", "--detail", "low", "--url", other.url, stdin=typed)
    assert (done.returncode, done.stdout) == (0, "Yes.\n" * 3)
    first, second, third = (body["messages"] for body in other.bodies)
    assert first[0] == {"role": "system", "content": "Be brief."}
    assert second[0] == {"role": "system", "content": "Be kind."}
    assert first[1]["content"][0]["image_url"]["detail"] == "low"
    assert [message["role"] for message in third] == ["user", "assistant", "user", "assistant", "user"]
    assert third[0] == first[1]


def test_what_goes_wrong_is_told_and_the_chat_goes_on(demo: RunningServer, tmp_path: Path) -> None:
    there = tmp_path / "there.md"
    there.write_text("mine")
    typed = script(
        "/nope",
        "/image nope.png",
        "/image",
        "/retry",
        "/save",
        f"/save {there}",
        f"/save {tmp_path}/no/folder.md",
        "/image http://127.0.0.1/x.png",
        "What is this?",
        "/clear",
        f"/image {SHAPES}",
        "How many shapes are there?",
    )
    done = foveate("chat", "--url", demo.url, stdin=typed)
    assert (done.returncode, done.stdout) == (1, "There are 4 shapes.\n")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    expected = [
        "/nope: there is no such command; /help lists them",
        "nope.png: there is no such picture",
        "/image: which one? For example: /image picture.jpg",
        "/retry: nothing was asked yet",
        "/save: where to? For example: /save chat.md",
        f"{there}: this file is there already",
        f"{tmp_path}/no/folder.md: the file cannot be written (No such file or directory)",
    ]
    assert errors[:-1] == [f"error: {one}" for one in expected]
    assert "not public" in errors[-1]
    assert there.read_text() == "mine"


def test_a_question_without_an_answer_can_be_asked_again(other: Other) -> None:
    # The picture of a question that was refused is shown with the next one.
    other.replies["/v1/chat/completions"] = (503, b'{"error": {"message": "Too many."}}')
    done = foveate("chat", SHAPES, "--url", other.url, stdin=script("What?", "/retry", "How?"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: Too many.\n" * 3
    for body, text in zip(other.bodies, ("What?", "What?", "How?"), strict=True):
        (message,) = body["messages"]
        assert [part["type"] for part in message["content"]] == ["image_url", "text"]
        assert message["content"][1]["text"] == text


@pytest.mark.parametrize(
    ("args", "stdin", "code", "message"),
    [
        (["-"], b"hi\n", 2, "-: standard input holds the questions; name the picture's file"),
        (["nope.png"], b"hi\n", 2, "nope.png: there is no such picture"),
        (["--tmings"], b"hi\n", 2, "--tmings: there is no such flag. Try --help."),
        ([], b"hi\n", 1, "nothing answers at http://127.0.0.1:1 (Connection refused)"),
    ],
)
def test_what_ends_it_at_once(
    refused: Callable[..., FoveateError], args: list[str], stdin: bytes, code: int, message: str
) -> None:
    error = refused("chat", *args, "--url", "http://127.0.0.1:1", stdin=stdin)
    assert error.exit_status == code
    assert error.message.startswith(message)


def test_bytes_that_are_no_text(demo: RunningServer) -> None:
    done = foveate("chat", "--url", demo.url, stdin=b"\xff\xfe\n")
    assert (done.returncode, done.stderr) == (2, "error: standard input: this is not UTF-8 text\n")


def test_typed_at_a_terminal(demo: RunningServer) -> None:
    with terminal("chat", "--url", demo.url) as screen:
        screen.expect(r"foveate-demo at http://127\.0\.0\.1:\d+\. /help lists the commands, Ctrl-D ends\..*> ")
        screen.type("/help\n")
        screen.expect("/retry +ask the last question again.*> ")
        screen.type(f"/image {SHAPES}\n")
        screen.expect("comes with the next question.*> ")
        screen.type("How many shapes are there?\n")
        screen.expect(r"There are 4 shapes\.\r\n.*> ")
        # The arrow finds what was typed before.
        screen.type("\x1b[A")
        screen.expect(r"How many shapes are there\?")
        screen.type("\n")
        screen.expect(r"There are 4 shapes\.\r\n.*> ")
        screen.type(CTRL_D)
        assert screen.end() == 0


def test_ctrl_c_stops_one_answer_and_at_the_prompt_ends(server: RunningServer, eventually: Eventually) -> None:
    aborted = server.metric("foveate_engine_aborted_total")
    with terminal("chat", "--temperature", "0", "--url", server.url) as screen:
        screen.expect("> ")
        screen.type("Tell me a story.\n")
        screen.expect(r"story\.\r\n.*[^\s\x1b]{20}")
        screen.type(CTRL_C)
        screen.expect(r"\(stopped\).*> ")
        eventually(lambda: server.metric("foveate_engine_num_running") == 0)
        assert server.metric("foveate_engine_aborted_total") == aborted + 1
        assert screen.process.poll() is None
        screen.type("/clear\n")
        screen.expect(r"\(forgotten\).*> ")
        screen.type(CTRL_C)
        assert screen.end() == 130
        assert "Traceback" not in screen.output


def test_sigterm_ends_it_during_an_answer(server: RunningServer) -> None:
    with terminal("chat", "--temperature", "0", "--url", server.url) as screen:
        screen.expect("> ")
        screen.type("Tell me a story.\n")
        screen.expect(r"story\.\r\n.*[^\s\x1b]{20}")
        screen.process.send_signal(signal.SIGTERM)
        assert screen.end() == 130
        assert "Traceback" not in screen.output


def test_an_answer_that_was_stopped_is_part_of_the_conversation() -> None:
    conversation = Conversation(pending=[Picture("a", "data:a")])
    conversation.ask("What?")
    conversation.answered("A ci")
    roles = [message["role"] for message in conversation.messages(lambda url: {"url": url}, conversation.ask("Go on."))]
    assert roles == ["user", "assistant", "user"]
    conversation.failed()
    # Unanswered, then the answered one.
    assert conversation.retry() == conversation.unanswered
    assert conversation.unanswered is not None
    assert conversation.unanswered.text == "Go on."
    conversation.answered("rcle.")
    assert len(conversation.turns) == 2
    conversation.clear()
    assert conversation.retry() is None
