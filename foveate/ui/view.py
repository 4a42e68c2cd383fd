"""A conversation as Gradio's chat shows it: messages of pictures, of words, and of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from foveate.ui.conversation import Turn, answered
from foveate.ui.markup import error_box, facts_box, harmless, thumbnails

Message = dict[str, Any]


def shown(turns: Sequence[Turn], words: Mapping[str, str]) -> list[Message]:
    """Return the messages of a conversation."""
    return [message for number in range(len(turns)) for message in _messages(turns[: number + 1], words)]


def turn_at(index: Any, turns: Sequence[Turn], words: Mapping[str, str]) -> int:
    """Find the turn of a message by the index that Gradio's events give it; the last one for an index too high."""
    left = int(index[0] if isinstance(index, list | tuple) else index)
    for number in range(len(turns)):
        left -= len(_messages(turns[: number + 1], words))
        if left < 0:
            return number
    return len(turns) - 1


def _messages(turns: Sequence[Turn], words: Mapping[str, str]) -> list[Message]:
    """Return those of the last turn. Gradio can edit words only if nothing else is in their message."""
    turn = turns[-1]
    pictures = thumbnails(turn.thumbnails, [one.name for one in turn.pictures]) if turn.pictures else ""
    parts: list[tuple[str, list[Any]]] = [
        ("user", [_html(pictures)] if pictures else []),
        ("user", [_text(turn.question)] if turn.question else []),
        ("assistant", _answer(turns, words)),
    ]
    return [{"role": role, "content": content} for role, content in parts if content]


def _answer(turns: Sequence[Turn], words: Mapping[str, str]) -> list[Any]:
    """Show the last turn's answer; nothing while there is none."""
    turn = turns[-1]
    content: list[Any] = [_text(turn.answer)] if turn.answer else []
    if turn.error:
        content.append(_html(error_box(turn.error, words)))
    note = words["stopped"] if turn.stopped else ""
    if turn.facts is not None and turn.ended:
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
