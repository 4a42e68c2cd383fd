"""The code blocks of a Markdown document: what is run, what it shows, and what says that it is not run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

SHELLS = frozenset({"sh", "bash", "shell", "console", "zsh"})
OUTPUTS = frozenset({"text", "json"})
_NOT_RUN = re.compile(r"(?:not run by the tests: |测试不运行：)(?P<reason>.+)", re.IGNORECASE)
_FIRST_TERMINAL = re.compile(r"in a terminal of its own|在单独的终端里", re.IGNORECASE)
_TITLE = re.compile(r'(?:^|\s)title="(?P<title>[^"]*)"')


@dataclass(frozen=True)
class Block:
    """One block that could be run.

    Attributes:
        path: the document.
        line: of its fence, from 1.
        language: the first word of the info string.
        content: the code.
        title: what the reader sees above it.
        shown: the output that follows in a block of its own; None if there is none.
    """

    path: Path
    line: int
    language: str
    content: str
    title: str
    shown: str | None

    @property
    def reason(self) -> str | None:
        """Why it is not run; None if it is."""
        found = _NOT_RUN.search(self.title)
        return found["reason"] if found else None

    @property
    def stays(self) -> bool:
        """Whether it goes on while the following blocks run: a server in the foreground."""
        return _FIRST_TERMINAL.search(self.title) is not None

    def __str__(self) -> str:
        return f"{self.path.name}, line {self.line}"


def blocks_of(path: Path) -> list[Block]:
    """Return the shell and Python blocks of a document, in order; one without a language could be anything."""
    return list(_blocks(path, MarkdownIt().parse(path.read_text(encoding="utf-8"))))


def _blocks(path: Path, tokens: list[Token]) -> Iterator[Block]:
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        language = _language(token)
        assert language or token.type not in ("fence", "code_block"), (
            f"{path.name}: a block without a language: {token.content}"
        )
        if language in SHELLS or language == "python":
            assert token.map is not None
            title = _TITLE.search(token.info)
            shown = following.content if following is not None and _language(following) in OUTPUTS else None
            yield Block(path, token.map[0] + 1, language, token.content, title["title"] if title else "", shown)


def _language(token: Token) -> str:
    """Return a fence's first word, as GitHub and the site read it; nothing for other tokens."""
    return token.info.split()[0].lower() if token.type == "fence" and token.info.split() else ""
