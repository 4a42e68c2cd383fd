"""A conversation as Gradio's chat shows it: two messages a turn, the question and the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from foveate.ui.conversation import Turn, answered
from foveate.ui.markup import error_box, facts_box, harmless, thumbnails

Message = dict[str, Any]


def shown(turns: Sequence[Turn], words: Mapping[str, str]) -> list[Message]:
    """Return the messages of a conversation; those of turn ``i`` are ``2 i`` and ``2 i + 1``."""
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        messages.append({"role": "user", "content": _question(turn)})
        if answer := _answer(turns[: number + 1], words):
            messages.append({"role": "assistant", "content": answer})
    return messages


def _question(turn: Turn) -> list[Any]:
    pictures = [_html(thumbnails(turn.thumbnails, [one.name for one in turn.pictures]))] if turn.pictures else []
    return [*pictures, *([_text(turn.question)] if turn.question else [])]


def _answer(turns: Sequence[Turn], words: Mapping[str, str]) -> list[Any]:
    """Show the last turn's answer; nothing while there is none."""
    turn = turns[-1]
    content: list[Any] = [_text(turn.answer)] if turn.answer else []
    if turn.error:
        content.append(_html(error_box(turn.error, words)))
    note = words["stopped"] if turn.stopped else ""
    if turn.facts is not None:
        if turn.facts.finish_reason == "length":
            note = words["cut"]
        pictures = [
            (picture.name, thumbnail)
            for one in answered(turns)
            for picture, thumbnail in zip(one.pictures, one.thumbnails, strict=True)
        ]
        if box := facts_box(turn.facts, pictures, words, note):
            content.append(_html(box))
    return content


def _text(text: str) -> Message:
    return {"type": "text", "text": harmless(text)}


def _html(html: str) -> gr.HTML:
    return gr.HTML(html, render=False)
