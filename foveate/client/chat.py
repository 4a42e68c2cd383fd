"""``foveate chat``: a conversation in the terminal, or one that a script writes."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import Parameter

from foveate.client.ask import DEFAULT_ASKING, DEFAULT_WHERE, show
from foveate.client.conversation import Conversation, Question
from foveate.client.options import Asking, Where, refuse_unknown_flags
from foveate.client.pictures import STDIN, picture
from foveate.client.server import Server
from foveate.client.terminal import Output, Screen
from foveate.errors import ConfigError, FoveateError

EXIT_INTERRUPTED = 130
PROMPT = "> "
HELP = """\
/image FILE or URL   show a picture with the next question; again for several
/clear               forget the conversation, but not the system prompt
/retry               ask the last question again
/system TEXT         set the system prompt; without TEXT, remove it
/save FILE           write the conversation to a new file: .json for messages, else Markdown
/help                this list
/quit                end, as Ctrl-D does
Ctrl-C stops an answer; at the prompt it ends the chat."""


def command(
    *pictures: Annotated[str, Parameter(allow_leading_hyphen=True)],
    where: Where = DEFAULT_WHERE,
    asking: Asking = DEFAULT_ASKING,
) -> int:
    """Talk with a running server about pictures.

    Questions are read line by line, from a terminal or from a pipe; /help lists the commands. Ctrl-C during an
    answer stops that answer only.

    Exit codes: 0 ended as asked, 1 the server is not there or, in a pipe, a question went wrong, 2 a bad flag or
    picture, 130 interrupted.

    Args:
        pictures: Files or URLs to show with the first question.
    """
    refuse_unknown_flags(pictures)
    if STDIN in pictures:
        raise ConfigError("-: standard input holds the questions; name the picture's file")
    conversation = Conversation(asking.system, pending=[picture(name) for name in pictures])
    # Unlike Ctrl-C, it ends everything, also while an answer comes.
    signal.signal(signal.SIGTERM, _terminate)
    with Output(), Server(where) as server:
        own_model = server.foveate_model()
        model = asking.model or own_model or server.first_model()
        chat = Chat(server, conversation, asking, model, tell_times=own_model is not None and asking.timings)
        return chat.run()
    return 0


def _terminate(_number: int, _frame: object) -> NoReturn:
    sys.exit(EXIT_INTERRUPTED)


class Chat:
    """A conversation with a person, or with a script.

    Args:
        server: who answers.
        conversation: what was said before.
        asking: how questions are asked.
        model: the name to ask for.
        tell_times: whether the server is to say how long each stage took.
    """

    def __init__(
        self, server: Server, conversation: Conversation, asking: Asking, model: str, *, tell_times: bool
    ) -> None:
        self._server = server
        self._conversation = conversation
        self._asking = asking
        self._model = model
        self._tell_times = tell_times
        self._screen = Screen()
        self._is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._went_wrong = False
        self._commands: Mapping[str, Callable[[str], None]] = {
            "/image": self._image,
            "/clear": self._clear,
            "/retry": self._retry,
            "/system": self._system,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self) -> int:
        """Answer until the input ends; return the exit code."""
        if self._is_interactive:
            self._screen.note(f"{self._model} at {self._server.url}. /help lists the commands, Ctrl-D ends.")
        for line in self._lines():
            name, _, argument = line.partition(" ")
            if name == "/quit":
                break
            try:
                if not line.startswith("/"):
                    self._answer(self._conversation.ask(line))
                elif name in self._commands:
                    self._commands[name](argument.strip())
                else:
                    raise ConfigError(f"{name}: there is no such command; /help lists them")
            except FoveateError as error:
                self._went_wrong = True
                self._screen.note(f"error: {error.message}", "red")
        return 1 if self._went_wrong and not self._is_interactive else 0

    def _lines(self) -> Iterator[str]:
        """Yield what is typed, without empty lines."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            # In the C locale, what is no text would be taken for some.
            sys.stdin.reconfigure(errors="strict")
        if self._is_interactive:
            # Gives input() its editing and its history.
            import readline  # noqa: F401
        while True:
            try:
                line = input(PROMPT if self._is_interactive else "").strip()
            except (EOFError, KeyboardInterrupt) as end:
                if self._is_interactive:
                    self._screen.write("\n")
                if isinstance(end, KeyboardInterrupt):
                    raise
                return
            except UnicodeDecodeError as error:
                raise ConfigError("standard input: this is not UTF-8 text") from error
            if line:
                yield line

    def _answer(self, question: Question) -> None:
        messages = self._conversation.messages(self._asking.picture_part, question)
        body = self._asking.body(self._model, messages, tell_times=self._tell_times)
        pieces: list[str] = []
        try:
            show(self._server, body, self._screen, pieces, timings=self._asking.timings)
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            self._screen.note("(stopped)")
        finally:
            # What was read of an answer is part of the conversation, however it ended.
            if pieces:
                self._conversation.answered("".join(pieces))
            else:
                self._conversation.failed()

    def _image(self, name: str) -> None:
        # A path that was dragged into the terminal comes in quotes.
        name = name.strip("'\"")
        if not name or name == STDIN:
            raise ConfigError("/image: which one? For example: /image picture.jpg")
        self._conversation.pending.append(picture(name))
        count = len(self._conversation.pending)
        self._screen.note(f"({name} comes with the next question{f', as picture {count}' if count > 1 else ''})")

    def _clear(self, _argument: str) -> None:
        self._conversation.clear()
        self._screen.note("(forgotten)")

    def _retry(self, _argument: str) -> None:
        question = self._conversation.retry()
        if question is None:
            raise ConfigError("/retry: nothing was asked yet")
        self._answer(question)

    def _system(self, text: str) -> None:
        self._conversation.system = text or None
        self._screen.note("(system prompt set)" if text else "(no system prompt)")

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save: where to? For example: /save chat.md")
        self._conversation.save(Path(name), self._asking.picture_part)
        self._screen.note(f"(saved to {name})")

    def _help(self, _argument: str) -> None:
        self._screen.note(HELP, "")
