"""Answers under way: streamed into their turns, and ended when their visitor says so or leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from foveate.ui.conversation import Sampling, Turn, request_body
from foveate.ui.facts import Facts
from foveate.ui.server import Server, ServerError
from foveate.ui.thumbnails import thumbnail

REFRESH_SECONDS = 0.08
"""The page is sent what has changed so often, and not for each token."""


class Answering:
    """Asks the server, for each visitor one thing at a time.

    Args:
        server: who answers.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stops: dict[str, asyncio.Event] = {}
        self._dropped: set[str] = set()

    def is_busy(self, visitor: str) -> bool:
        """Whether an answer is under way for a visitor."""
        return visitor in self._stops

    def stop(self, visitor: str, *, drop: bool = False) -> None:
        """End a visitor's answer, if one is under way; ``drop`` it if nobody is to see it any more."""
        if visitor in self._stops:
            self._stops[visitor].set()
            if drop:
                self._dropped.add(visitor)

    async def answer(
        self, visitor: str, turns: Sequence[Turn], *, key: str, model: str, system: str, sampling: Sampling
    ) -> AsyncGenerator[bool, None]:
        """Have the last turn answered; yields whenever there is more of it: False, and True in the end.

        What the server refuses becomes the turn's error. Closing this early, or :meth:`stop`, closes the connection, so
        that the server aborts.

        Args:
            visitor: names whose it is.
            turns: the conversation; the last one is filled.
            key: the visitor's API key, or empty.
            model: which model.
            system: the system prompt, or empty.
            sampling: how tokens are chosen.
        """
        turn = turns[-1]
        stop = self._stops[visitor] = asyncio.Event()
        if len(turn.thumbnails) != len(turn.pictures):
            turn.thumbnails = await asyncio.gather(*(asyncio.to_thread(thumbnail, one.path) for one in turn.pictures))
        work = asyncio.create_task(self._fill(turns, key, model, system, sampling))
        stopping = asyncio.create_task(stop.wait())
        length = -1
        try:
            while not work.done() and not stop.is_set():
                if length != len(turn.answer):
                    length = len(turn.answer)
                    yield False
                await asyncio.wait((work, stopping), timeout=REFRESH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            turn.ended, turn.stopped = True, not work.done()
        finally:
            for task in (work, stopping):
                task.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)
            del self._stops[visitor]
            dropped = visitor in self._dropped
            self._dropped.discard(visitor)
        if not work.cancelled():
            work.result()
        if not dropped:
            yield True

    async def _fill(self, turns: Sequence[Turn], key: str, model: str, system: str, sampling: Sampling) -> None:
        turn = turns[-1]
        try:
            is_foveate = await self._server.is_foveate()
            # Pictures are read and encoded here.
            body = await asyncio.to_thread(
                request_body, turns, model=model, system=system, sampling=sampling, is_foveate=is_foveate
            )
            turn.facts = Facts()
            async with contextlib.aclosing(self._server.stream(body, key)) as events:
                async for event in events:
                    turn.answer += turn.facts.read(event)
        except ServerError as error:
            turn.error = error.message
