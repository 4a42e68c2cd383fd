"""Conversations to pieces of a prompt, by the chat template that a checkpoint brings.

The template sees an unguessable mark where a message has text or a picture, never the text itself. So nothing
that a client writes can pass for the template's own text, nor for a picture's place.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from foveate.chat.pieces import PicturePlan, PictureSettings, Piece, TemplateText, UserText, picture_pieces
from foveate.errors import CheckpointError, InvalidRequest

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a message, as its author wrote it."""

    text: str


@dataclass(frozen=True, slots=True)
class PicturePart:
    """A picture of a message: only its slice plan matters for the prompt."""

    plan: PicturePlan


Part = TextPart | PicturePart


@dataclass(frozen=True, slots=True)
class Message:
    """What one participant said: texts and pictures in order."""

    role: Role
    parts: Sequence[Part]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read or see in it."""
        return all(isinstance(part, TextPart) and not part.text for part in self.parts)


class ChatTemplate:
    """A checkpoint's chat template.

    Args:
        source: the template, in Jinja's language as ``transformers`` sets it up.
        special_tokens: names that the template may use, such as ``bos_token``.

    Attributes:
        source: as given.

    Raises:
        CheckpointError: the template is not valid.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            extensions=["jinja2.ext.loopcontrols"],
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"chat_template: is not valid Jinja ({error})") from error
        self.source = source
        self._special_tokens = dict(special_tokens or {})

    def render(
        self, messages: Sequence[Message], pictures: PictureSettings, *, add_generation_prompt: bool = True
    ) -> list[Piece]:
        """Write out a conversation, up to where the assistant's answer begins.

        The parts of a message are joined by newlines. A system message without content counts as none, so
        that the template's own default applies. Pictures are numbered over the whole conversation, from 0.

        Raises:
            InvalidRequest: there is no message, a role is unknown, or the template refuses the conversation.
        """
        marks = _Marks()
        conversation = [
            {"role": _known_role(message.role), "content": "\n".join(map(marks.put, message.parts))}
            for message in messages
            if not (message.role == "system" and message.is_empty)
        ]
        if not conversation:
            raise InvalidRequest("the conversation has no message", param="messages")
        try:
            text = self._template.render(
                messages=conversation, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            message = f"the model's chat template refuses this conversation: {error}"
            raise InvalidRequest(message, param="messages") from error
        return marks.resolve(text, pictures)


class _Marks:
    """Marks that stand for the parts of one conversation while its template is rendered."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(16)
        self._parts: list[Part] = []

    def put(self, part: Part) -> str:
        """Return the mark that stands for a part. No text has no mark, so that templates can test for it."""
        if isinstance(part, TextPart) and not part.text:
            return ""
        self._parts.append(part)
        return f"{self._nonce}{len(self._parts) - 1}_"

    def resolve(self, rendered: str, settings: PictureSettings) -> list[Piece]:
        """Put the parts back where the template has put their marks.

        Raises:
            InvalidRequest: the template has cut a mark, or dropped, repeated or reordered pictures.
        """
        numbers = {id_: number for number, id_ in enumerate(self._picture_ids())}
        first, *marked = rendered.split(self._nonce)
        pieces: list[Piece] = [TemplateText(first)]
        seen: list[int] = []
        for rest in marked:
            digits, _, text = rest.partition("_")
            if not digits.isdecimal() or int(digits) >= len(self._parts):
                message = "the model's chat template cuts the messages' texts"
                raise InvalidRequest(message, param="messages")
            part = self._parts[int(digits)]
            if isinstance(part, TextPart):
                pieces.append(UserText(part.text))
            else:
                seen.append(int(digits))
                pieces += picture_pieces(numbers[int(digits)], part.plan, settings)
            pieces.append(TemplateText(text))
        if seen != list(numbers):
            message = "the model's chat template does not keep this conversation's pictures in their places"
            raise InvalidRequest(message, param="messages")
        return pieces

    def _picture_ids(self) -> list[int]:
        return [id_ for id_, part in enumerate(self._parts) if isinstance(part, PicturePart)]


def _known_role(role: str) -> str:
    # Templates write the role out as their own text, so an unknown one could carry special tokens.
    if role not in get_args(Role):
        raise InvalidRequest(f"unknown role {role!r}: one of {', '.join(get_args(Role))}", param="messages")
    return role


def _raise_exception(message: str) -> NoReturn:
    """Let a template refuse a conversation."""
    raise TemplateError(message)
