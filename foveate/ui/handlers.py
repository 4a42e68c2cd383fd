"""What happens when a visitor asks, stops, edits, tries again or begins anew."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from foveate.ui.answering import Answering
from foveate.ui.conversation import Picture, Sampling, Turn
from foveate.ui.samples import SAMPLES
from foveate.ui.server import Server, ServerError
from foveate.ui.view import shown, turn_at
from foveate.ui.words import words

Turns = list[Turn]
Options = dict[str, tuple[str, int]]
"""By a picture's path: its detail and its most slices, 0 for as many as the model takes."""
Update = tuple[Any, Any, Any]
"""For the chat, the box and the turns."""
_MAX_MESSAGE_PICTURES = 64
NOTHING: Update = (gr.skip(), gr.skip(), gr.skip())
"""Changes nothing. An event that yields nothing would empty its outputs."""
EMPTY: Any = {"text": "", "files": []}


@dataclass(frozen=True)
class Choices:
    """What was chosen beside the chat, in the order of the page's inputs."""

    language: str
    key: str | None
    model: str | None
    system: str | None
    own_sampling: bool
    temperature: float | None
    top_p: float | None
    frequency_penalty: float | None
    max_tokens: float | None
    seed: float | None

    @property
    def sampling(self) -> Sampling:
        """How tokens are to be chosen; nothing, unless the visitor wants to."""
        if not self.own_sampling:
            return Sampling()
        return Sampling(
            self.temperature, self.top_p, self.frequency_penalty, _whole(self.max_tokens) or None, _whole(self.seed)
        )


def _whole(number: float | None) -> int | None:
    return int(number) if number is not None and math.isfinite(number) else None


class Handlers:
    """The page's events. A visitor is one open page.

    Args:
        server: who answers.
        uploads: the only folder, beside the samples, from which pictures are read.
    """

    def __init__(self, server: Server, uploads: Path) -> None:
        self.server = server
        self._uploads = uploads.resolve()
        self._answering = Answering(server)

    async def ask(
        self, request: gr.Request, message: Mapping[str, Any], options: Options, turns: Turns, *values: Any
    ) -> AsyncGenerator[Update, None]:
        """Ask what stands in the box."""
        choices = Choices(*values)
        text = words(choices.language)
        question, files = str(message.get("text") or "").strip(), list(message.get("files") or ())
        if not question and not files:
            gr.Info(text["empty"])
            yield NOTHING
        elif (pictures := self._pictures(files, options)) is None:
            gr.Warning(text["foreign"])
            yield NOTHING
        else:
            async for update in self._answered(request, [*turns, Turn(question, pictures)], choices, empties=True):
                yield update

    async def ask_sample(
        self, request: gr.Request, event: gr.SelectData, turns: Turns, *values: Any
    ) -> AsyncGenerator[Update, None]:
        """Ask what was clicked."""
        choices = Choices(*values)
        sample = SAMPLES[int(event.index) % len(SAMPLES)]
        turn = Turn(sample.question(choices.language), [Picture(path, path.name) for path in sample.pictures])
        async for update in self._answered(request, [*turns, turn], choices):
            yield update

    async def ask_again(
        self, request: gr.Request, event: gr.RetryData, turns: Turns, *values: Any
    ) -> AsyncGenerator[Update, None]:
        """Ask the question of the clicked answer again."""
        if not turns:
            yield NOTHING
            return
        *earlier, last = turns[: turn_at(event.index, turns, words(values[0])) + 1]
        again = Turn(last.question, last.pictures, thumbnails=last.thumbnails)
        async for update in self._answered(request, [*earlier, again], Choices(*values)):
            yield update

    async def ask_edited(
        self, request: gr.Request, event: gr.EditData, turns: Turns, *values: Any
    ) -> AsyncGenerator[Update, None]:
        """Ask an edited question instead of the earlier one; what followed is forgotten."""
        if not turns:
            yield NOTHING
            return
        *earlier, last = turns[: turn_at(event.index, turns, words(values[0])) + 1]
        # What was shown has these marks; see foveate.ui.markup.harmless.
        question = str(event.value).replace("<\u2060", "<").strip()
        edited = Turn(question, last.pictures, thumbnails=last.thumbnails)
        async for update in self._answered(request, [*earlier, edited], Choices(*values)):
            yield update

    def stop(self, request: gr.Request) -> None:
        """End the answer that is under way."""
        self._answering.stop(_visitor(request))

    def leave(self, request: gr.Request) -> None:
        """End what is under way for a page that was closed."""
        self._answering.stop(_visitor(request), drop=True)

    def clear(self, request: gr.Request) -> Update:
        """Begin anew. What stands in the box stays: it may have been typed since the click."""
        visitor = _visitor(request)
        box = gr.update(submit_btn=True, stop_btn=False) if self._answering.is_busy(visitor) else gr.skip()
        self._answering.stop(visitor, drop=True)
        return [], box, []

    async def models(self, key: str | None, model: str | None) -> tuple[Any, Any]:
        """Fill the list of models; without it, say why and open the settings."""
        try:
            names = await self.server.models(key or "")
            await self.server.is_foveate()
        except ServerError as error:
            gr.Warning(_plain(error.message))
            return gr.skip(), gr.update(open=True)
        chosen = model if model in names else next(iter(names), None)
        return gr.update(choices=names, value=chosen), gr.skip()

    async def _answered(
        self, request: gr.Request, turns: Turns, choices: Choices, *, empties: bool = False
    ) -> AsyncGenerator[Update, None]:
        visitor, text = _visitor(request), words(choices.language)
        if self._answering.is_busy(visitor):
            gr.Info(text["busy"])
            yield NOTHING
            return
        box: dict[str, Any] = {"submit_btn": False, "stop_btn": True, **({"value": EMPTY} if empties else {})}
        answering = self._answering.answer(
            visitor,
            turns,
            key=choices.key or "",
            model=choices.model or await self._any_model(choices.key),
            system=choices.system or "",
            sampling=choices.sampling,
        )
        async with contextlib.aclosing(answering) as progress:
            first = True
            async for done in progress:
                if done:
                    box = {"submit_btn": True, "stop_btn": False}
                changed = gr.update(**box) if first or done else gr.skip()
                yield shown(turns, text), changed, turns if first else gr.skip()
                first = False

    async def _any_model(self, key: str | None) -> str:
        """Name a model for a visitor who asks before the list is there; empty if that fails, as the question will."""
        try:
            return next(iter(await self.server.models(key or "")), "")
        except ServerError:
            return ""

    def _pictures(self, files: list[Any], options: Options) -> list[Picture] | None:
        """Take what was uploaded; None if one was not uploaded here."""
        pictures = []
        for file in files[:_MAX_MESSAGE_PICTURES]:
            path = Path(file).resolve()
            if not path.is_relative_to(self._uploads):
                return None
            detail, slices = options.get(str(file), ("auto", 0))
            pictures.append(Picture(path, path.name, detail, slices or None))  # type: ignore[arg-type]
        return pictures


def _visitor(request: gr.Request) -> str:
    return str(request.session_hash)


def _plain(text: str) -> str:
    """Write text so that Gradio's toasts, which are HTML, show it as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
