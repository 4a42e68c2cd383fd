"""``foveate ask``: one question, with pictures, to a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from foveate.client.conversation import Conversation, Question
from foveate.client.options import Asking, Switch, Where, refuse_unknown_flags
from foveate.client.pictures import STDIN, media_type, picture
from foveate.client.server import Server
from foveate.client.terminal import Output, Screen
from foveate.errors import ConfigError

DEFAULT_WHERE = Where()
DEFAULT_ASKING = Asking()


def command(
    question: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *pictures: Annotated[str, Parameter(allow_leading_hyphen=True)],
    where: Where = DEFAULT_WHERE,
    asking: Asking = DEFAULT_ASKING,
    json_: Annotated[Switch, Parameter(name="--json")] = False,
) -> int:
    """Ask a running server a question about pictures, and write the answer as it comes.

    Works with any server that speaks OpenAI's API. Ctrl-C ends the answer, on the server too.

    Exit codes: 0 answered, 1 the server is not there or refuses, 2 a bad flag or picture, 130 interrupted.

    Args:
        question: What to ask; - is standard input, as is nothing at all in a pipe.
        pictures: Files, URLs, or - for a picture on standard input.
        json_: Write one JSON object with the answer, its usage and, from a Foveate server, its timings.
    """
    refuse_unknown_flags([question, *pictures])
    text = _question(question, pictures)
    asked = Question(text, tuple(picture(name) for name in pictures))
    messages = Conversation(asking.system).messages(asking.picture_part, asked)
    with Output(), Server(where) as server:
        own_model = server.foveate_model()
        body = asking.body(
            asking.model or own_model or server.first_model(),
            messages,
            tell_times=own_model is not None and (asking.timings or json_),
        )
        if json_:
            _write_json(server, body)
        else:
            show(server, body, Screen(), [], timings=asking.timings)
    return 0


def show(server: Server, body: dict[str, Any], screen: Screen, pieces: list[str], *, timings: bool) -> None:
    """Ask, and write the answer as it comes.

    Args:
        server: who is asked.
        body: the request.
        screen: where the answer goes.
        pieces: gets what comes of it, however it ends.
        timings: whether its tokens and times are written as well.

    Raises:
        FoveateError: as :meth:`Server.answer`.
    """
    try:
        with screen.waiting() as first_came, server.answer(body) as answer:
            for piece in answer:
                first_came()
                pieces.append(piece)
                screen.write(piece)
    finally:
        screen.end_line()
    if answer.finish_reason == "length":
        screen.note("(cut off: the answer reached its limit of tokens)")
    if timings:
        screen.timings(answer)


def _write_json(server: Server, body: dict[str, Any]) -> None:
    with server.answer(body) as answer:
        for _ in answer:
            pass
    said = {
        "answer": answer.text,
        "model": answer.model,
        "finish_reason": answer.finish_reason,
        "usage": answer.usage,
        "timings": answer.timings,
    }
    print(json.dumps(said, ensure_ascii=False))


def _question(question: str | None, pictures: Sequence[str]) -> str:
    """Return the question, from wherever it comes.

    Raises:
        ConfigError: there is none, or it cannot be one.
    """
    if [question, *pictures].count(STDIN) > 1:
        raise ConfigError("-: standard input can be the question or one picture, and only once")
    if question == STDIN or question is None:
        question = _question_from_stdin()
    elif not pictures and _is_picture(question):
        raise ConfigError(f'{question}: this is a picture, and the question comes first: foveate ask "..." {question}')
    if not question.strip():
        raise ConfigError("the question is empty")
    return question


def _question_from_stdin() -> str:
    if sys.stdin.isatty():
        raise ConfigError('what is the question? For example: foveate ask "What is this?" picture.jpg')
    data = sys.stdin.buffer.read()
    if media_type(data) is not None:
        raise ConfigError('standard input holds a picture where a question is expected: foveate ask "..." -')
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise ConfigError("standard input: the question is not UTF-8 text") from error


def _is_picture(text: str) -> bool:
    try:
        with Path(text).open("rb") as file:
            return media_type(file.read(16)) is not None
    except (OSError, ValueError):
        return False
