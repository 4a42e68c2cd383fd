"""From the engine's chunks to text, and from text to OpenAI's answers, in one piece or event by event."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET

from foveate.api.chat import ChatService, PlannedChat
from foveate.api.completion import (
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    ContentLogprob,
    Delta,
    Logprobs,
    Message,
    PromptTokensDetails,
    Reason,
    SeenPicture,
    TopLogprob,
    Usage,
)
from foveate.api.response import event
from foveate.chat.tokenizer import Detokenizer, StopStrings, Tokenizer
from foveate.engine.messages import Chunk, TokenLogprob
from foveate.errors import EngineError, Unavailable
from foveate.telemetry import Metrics

DONE = event(b"[DONE]")
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (vLLM's value)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a chunk adds to one of the answers. Nothing follows a piece with a ``reason``."""

    index: int
    text: str
    logprobs: list[ContentLogprob]
    reason: Reason | None


class Answer:
    """One of a request's answers in the making.

    Attributes:
        num_tokens: the answer's tokens so far, those of a stop string included.
        num_cached_tokens: the prompt's tokens that a prefix hit supplied.
        reason: why it ended, or None while it has not.
    """

    def __init__(self, chat: PlannedChat, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.reason: Reason | None = None
        self._tokenizer = tokenizer
        self._min_tokens = chat.sampling.min_tokens
        self._detokenizer = Detokenizer(tokenizer, chat.skip_special_tokens)
        self._stops = StopStrings(chat.stops)
        self._first_at = self._last_at = 0.0

    def push(self, chunk: Chunk) -> Piece:
        """Take the engine's next tokens.

        A character that is not complete, and what may become a stop string, are kept back for a later piece.
        Before ``min_tokens`` nothing is looked at for stop strings.

        Raises:
            Unavailable: the engine gave the answer up.
        """
        if chunk.finish_reason == "abort":
            raise Unavailable("The engine gave this answer up.")
        self._count(chunk)
        text = self._detokenizer.push(chunk.token_ids)
        if chunk.finish_reason is not None:
            text += self._detokenizer.flush()
        if self.num_tokens > self._min_tokens:
            text, stop = self._stops.push(text)
            if stop is not None:
                self.reason = "stop"
        if self.reason is None and chunk.finish_reason is not None:
            self.reason = chunk.finish_reason
            text += self._stops.flush()
        return Piece(chunk.index, text, [self._logprob(one) for one in chunk.logprobs or ()], self.reason)

    @property
    def seconds_per_token(self) -> float | None:
        """The mean time between tokens, or None with fewer than two."""
        return (self._last_at - self._first_at) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    def _count(self, chunk: Chunk) -> None:
        self.num_cached_tokens = max(self.num_cached_tokens, chunk.num_cached_tokens)
        if chunk.token_ids:
            self._last_at = time.perf_counter()
            if self.num_tokens == 0:
                self._first_at = self._last_at
            self.num_tokens += len(chunk.token_ids)

    def _logprob(self, one: TokenLogprob) -> ContentLogprob:
        top = [TopLogprob(*self._token(token_id, logprob)) for token_id, logprob in one.top]
        return ContentLogprob(*self._token(one.token_id, one.logprob), top)

    def _token(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        data = list(self._tokenizer.token_bytes(token_id))
        return self._tokenizer.token_text(token_id), max(logprob, LEAST_LOGPROB), data


class Completion:
    """Runs one planned chat and tells its answers in OpenAI's terms.

    Args:
        service: runs the chat.
        chat: what to run; a completion is used once.
        fingerprint: names the server's version and model.
    """

    def __init__(self, service: ChatService, chat: PlannedChat, fingerprint: str) -> None:
        self._service = service
        self._chat = chat
        self._fingerprint = fingerprint
        self._created = int(time.time())
        self._answers = [Answer(chat, service.assets.tokenizer) for _ in range(chat.n)]
        self._encoder = msgspec.json.Encoder()

    async def whole(self) -> ChatCompletion:
        """Answer in one piece.

        Raises:
            FoveateError: as the encoder and the engine say.
        """
        pieces: list[list[Piece]] = [[] for _ in self._answers]
        async with contextlib.aclosing(self._pieces()) as stream:
            async for piece in stream:
                pieces[piece.index].append(piece)
        return ChatCompletion(
            id=self._chat.id,
            created=self._created,
            model=self._service.model_name,
            choices=[self._choice(parts) for parts in pieces],
            usage=self._usage(),
            system_fingerprint=self._fingerprint,
            timings=self._timings(),
            pictures=self._pictures(),
        )

    async def events(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """Answer event by event: each answer's role first, ``[DONE]`` last.

        Raises:
            FoveateError: as the encoder and the engine say.
        """
        no_usage = None if include_usage else UNSET
        started = False
        async with contextlib.aclosing(self._pieces()) as stream:
            async for piece in stream:
                if not started:
                    started = True
                    for index in range(self._chat.n):
                        role = ChunkChoice(index, Delta(role="assistant", content=""))
                        yield self._event([role], no_usage)
                if piece.text or piece.logprobs:
                    logprobs = Logprobs(piece.logprobs) if piece.logprobs else None
                    delta = ChunkChoice(piece.index, Delta(content=piece.text), logprobs)
                    yield self._event([delta], no_usage)
                if piece.reason is not None:
                    end = ChunkChoice(piece.index, Delta(), finish_reason=piece.reason)
                    yield self._event([end], no_usage)
        if include_usage or self._chat.tell_times:
            yield self._event([], self._usage() if include_usage else UNSET, self._timings(), self._pictures())
        yield DONE

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield every answer's pieces until each has its reason; ends the others' sequences with them."""
        metrics, chat = self._service.metrics, self._chat
        open_answers = chat.n
        first = True
        with metrics.running.track_inprogress():
            async with contextlib.aclosing(self._service.run(chat)) as chunks:
                async for chunk in chunks:
                    if first:
                        first = False
                        metrics.ttft_seconds.observe(time.perf_counter() - chat.arrived)
                    answer = self._answers[chunk.index]
                    if answer.reason is not None:
                        # It was on its way when a stop string ended the answer.
                        continue
                    piece = answer.push(chunk)
                    yield piece
                    if piece.reason is not None:
                        open_answers -= 1
                        if open_answers == 0:
                            break
                        if chunk.finish_reason is None:
                            self._service.engine.abort(chat.id, chunk.index)
        if open_answers:
            raise EngineError("The engine ended a request without ending its answers.")
        self._observe(metrics)

    def _observe(self, metrics: Metrics) -> None:
        metrics.request_seconds.observe(time.perf_counter() - self._chat.arrived)
        metrics.prompt_tokens.inc(len(self._chat.prompt.token_ids))
        for answer in self._answers:
            metrics.completion_tokens.inc(answer.num_tokens)
            if answer.seconds_per_token is not None:
                metrics.tpot_seconds.observe(answer.seconds_per_token)
                self._chat.times.add("decode", answer.seconds_per_token * (answer.num_tokens - 1))

    def _choice(self, pieces: Sequence[Piece]) -> Choice:
        """Join one answer's pieces."""
        last = pieces[-1]
        assert last.reason is not None
        logprobs = None
        if self._chat.sampling.logprobs:
            logprobs = Logprobs([one for piece in pieces for one in piece.logprobs])
        return Choice(last.index, Message("".join(piece.text for piece in pieces)), logprobs, last.reason)

    def _usage(self) -> Usage:
        prompt = self._chat.prompt
        prompt_tokens = len(prompt.token_ids)
        completion_tokens = sum(answer.num_tokens for answer in self._answers)
        # The answers after the first one find the first one's prompt: that is no hit of the request.
        details = PromptTokensDetails(self._answers[0].num_cached_tokens, prompt.num_image_tokens)
        return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)

    def _timings(self) -> dict[str, float] | msgspec.UnsetType:
        if not self._chat.tell_times:
            return UNSET
        return self._chat.times.summary(time.perf_counter() - self._chat.arrived)

    def _pictures(self) -> list[SeenPicture] | msgspec.UnsetType:
        return self._chat.seen_pictures() if self._chat.tell_times else UNSET

    def _event(
        self,
        choices: list[ChunkChoice],
        usage: Usage | msgspec.UnsetType | None,
        timings: dict[str, float] | msgspec.UnsetType = UNSET,
        pictures: list[SeenPicture] | msgspec.UnsetType = UNSET,
    ) -> bytes:
        chunk = ChatCompletionChunk(
            id=self._chat.id,
            created=self._created,
            model=self._service.model_name,
            choices=choices,
            usage=usage,
            system_fingerprint=self._fingerprint,
            timings=timings,
            pictures=pictures,
        )
        return event(self._encoder.encode(chunk))
