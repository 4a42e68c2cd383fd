"""A conversation as the client keeps it: the server remembers nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.client.pictures import Picture
from foveate.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Question:
    """What the user said and showed at once."""

    text: str
    pictures: tuple[Picture, ...] = ()


@dataclass(slots=True)
class Conversation:
    """Questions and answers, and what comes with the next question.

    Attributes:
        system: the system prompt, if there is one.
        turns: what was asked, and what was answered.
        pending: the pictures that the next question will show.
        unanswered: the last question, if it got no answer.
    """

    system: str | None = None
    turns: list[tuple[Question, str]] = field(default_factory=list)
    pending: list[Picture] = field(default_factory=list)
    unanswered: Question | None = None

    def ask(self, text: str) -> Question:
        """Make a question of a text and the pending pictures, and wait for its answer."""
        self.unanswered = Question(text, tuple(self.pending))
        self.pending.clear()
        return self.unanswered

    def answered(self, text: str) -> None:
        """Note the answer, or as much of it as has come."""
        assert self.unanswered is not None
        self.turns.append((self.unanswered, text))
        self.unanswered = None

    def failed(self) -> None:
        """Note that no answer came: the question's pictures wait for another one."""
        assert self.unanswered is not None
        self.pending[:0] = self.unanswered.pictures

    def retry(self) -> Question | None:
        """Ask the last question again, in place of its answer; return None if nothing was asked."""
        if self.unanswered is not None:
            # Its pictures are the first of those that wait, and others may have come.
            return self.ask(self.unanswered.text)
        if not self.turns:
            return None
        self.unanswered = self.turns.pop()[0]
        return self.unanswered

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.turns.clear()
        self.pending.clear()
        self.unanswered = None

    def messages(self, show: Callable[[str], dict[str, Any]], last: Question | None = None) -> list[dict[str, Any]]:
        """Return the conversation as OpenAI's messages.

        Args:
            show: makes a message's part of a picture's URL.
            last: the question that is to be answered.
        """
        found: list[dict[str, Any]] = []
        if self.system:
            found.append({"role": "system", "content": self.system})
        for question, answer in self.turns:
            found.append(_user(question, show))
            found.append({"role": "assistant", "content": answer})
        if last is not None:
            found.append(_user(last, show))
        return found

    def save(self, file: Path, show: Callable[[str], dict[str, Any]]) -> None:
        """Write the conversation to a new file: messages as they are sent if it ends in .json, else Markdown.

        Raises:
            ConfigError: the file is there already, or cannot be written.
        """
        if file.suffix.lower() == ".json":
            text = json.dumps(self.messages(show), ensure_ascii=False, indent=2) + "\n"
        else:
            text = _markdown(self.system, self.turns)
        try:
            with file.expanduser().open("x", encoding="utf-8") as opened:
                opened.write(text)
        except FileExistsError as error:
            raise ConfigError(f"{file}: this file is there already") from error
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{file}: the file cannot be written ({reason})") from error


def _user(question: Question, show: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    parts = [show(one.url) for one in question.pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}


def _markdown(system: str | None, turns: Sequence[tuple[Question, str]]) -> str:
    blocks = [f"**System:** {system}"] if system else []
    for question, answer in turns:
        shown = "".join(f" [{one.name}]" for one in question.pictures)
        blocks += [f"**You:**{shown} {question.text}", answer]
    return "\n\n".join(blocks) + "\n"
