"""The engine's loop: take in messages, schedule, run, send."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from itertools import accumulate, groupby

import msgspec
import numpy as np
import torch
import zmq

from foveate.checkpoint.activations import ROW_BYTES
from foveate.engine.messages import (
    Abort,
    AddEmbeddings,
    Attach,
    Attached,
    Chunk,
    Failure,
    Generate,
    GetStats,
    ImageSlot,
    Ready,
    Reply,
    Request,
    Step,
    TokenLogprob,
)
from foveate.engine.runner import Launched, ModelRunner
from foveate.engine.sampling import Sampled
from foveate.engine.scheduler import Scheduler
from foveate.engine.sequence import ImageSpan, Sequence
from foveate.engine.state import SequenceState, state_of
from foveate.engine.step import SampledToken, ScheduledBatch
from foveate.errors import EngineError, FoveateError, InvalidRequest
from foveate.kernels.memory import Room, is_out_of_memory, make_room
from foveate.transport.handle import Embeddings
from foveate.transport.sources import Sources

logger = logging.getLogger(__name__)

_IDLE_MILLISECONDS = 1000
_SEED_BITS = 62


class EngineCore:
    """One engine: a runner, a scheduler, and where embeddings come from.

    With a scheduler of depth 1 the host is a step ahead of the device: while that runs one, the results of the step
    before are read and sent, and the next step is scheduled and launched.

    Args:
        runner: runs steps.
        scheduler: decides them.
        sources: where embeddings are read.
        eos_token_ids: the model's own end tokens.
        max_seq_len: most tokens of a prompt and its answer together.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        sources: Sources,
        *,
        eos_token_ids: frozenset[int],
        max_seq_len: int,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.sources = sources
        self.eos_token_ids = eos_token_ids
        self.max_seq_len = max_seq_len
        self._open: deque[tuple[ScheduledBatch, Launched]] = deque()
        self._room = Room(runner.device, ROW_BYTES)

    def ready(self) -> Ready:
        """Describe the engine to its clients."""
        return Ready(
            max_batch_size=self.scheduler.max_batch_size,
            max_input_len=self.scheduler.max_input_len,
            max_image_tokens=self.scheduler.max_image_tokens,
            max_seq_len=self.max_seq_len,
            num_blocks=self.runner.num_blocks,
            block_size=self.runner.block_size,
            device=str(self.runner.device),
            dtype=str(self.runner.dtype).removeprefix("torch."),
            kv_cache_dtype=str(self.runner.kv_cache.dtype).removeprefix("torch."),
        )

    def serve(self, socket: zmq.Socket[bytes]) -> None:
        """Answer whoever is at the other end of ``socket``, for ever."""
        decoder = msgspec.msgpack.Decoder(Request)
        encoder = msgspec.msgpack.Encoder()
        socket.send(encoder.encode(self.ready()))
        checked = True
        while True:
            while socket.poll(0 if self.scheduler.has_work else _IDLE_MILLISECONDS):
                for reply in self.handle(decoder.decode(socket.recv())):
                    socket.send(encoder.encode(reply))
            if self.scheduler.has_work:
                step = self.step()
                if step.chunks or step.failures:
                    socket.send(encoder.encode(step))
                checked = False
            elif not checked:
                # Nobody has come for a while: the time for it is nobody's.
                self.scheduler.check()
                checked = True

    def handle(self, request: Request) -> list[Reply]:
        """Take in one message; return what there is to say at once."""
        match request:
            case Generate() | AddEmbeddings():
                error = self._try_to_take(request)
                if error is not None:
                    self.scheduler.abort(request.request_id)
                    return [Step(failures=[_failure(request.request_id, error)])]
            case Abort():
                self.scheduler.abort(request.request_id, request.index)
            case Attach():
                return [self._attach(request)]
            case GetStats():
                return [self.scheduler.stats()]
        return []

    def _attach(self, request: Attach) -> Attached:
        try:
            transport, reader = self.sources.attach(request.offer, request.transport)
        except FoveateError as error:
            return Attached(arena=request.offer.arena, error=error.message)
        return Attached(arena=request.offer.arena, transport=transport, reader=reader)

    def step(self) -> Step:
        """Launch a step, and end the oldest one if enough are open; a step that fails ends its own requests only."""
        batch = self.scheduler.schedule()
        error: FoveateError = EngineError("the engine failed while it worked on this request; see its log")
        try:
            if batch is not None:
                self._open.append((batch, self._launch(batch)))
                if len(self._open) <= self.scheduler.depth:
                    return Step()
            if not self._open:
                return Step()
            batch, launched = self._open[0]
            sampled = self.runner.collect(launched)
        except Exception as caught:
            too_much = is_out_of_memory(caught)
            if isinstance(caught, torch.AcceleratorError) and not too_much:
                # The device's context is lost: only a new process helps, and the parent starts one.
                logger.exception("the device failed")
                raise
            logger.exception("a step failed")
        else:
            self._open.popleft()
            return Step(chunks=self._chunks(batch, sampled))
        assert batch is not None
        if too_much:
            error = make_room(self.runner.device)
        return Step(failures=self._give_up(batch, error))

    def _launch(self, batch: ScheduledBatch) -> Launched:
        now = time.monotonic()
        for item in batch.items:
            state_of(item.seq).mark_admitted(now)
        return self.runner.launch(batch)

    def _chunks(self, batch: ScheduledBatch, sampled: Sampled) -> list[Chunk]:
        sampling = batch.sampling
        first = accumulate((item.num_choices for item in sampling), initial=0)
        places = {item.seq: place for item, place in zip(sampling, first, strict=False)}
        results = self.scheduler.update(batch, sampled.token_ids)
        now = time.monotonic()
        for item in batch.items:
            if item.seq.missing and item.seq.stalled:
                state_of(item.seq).stalled = now
        return [
            _chunk(seq, list(tokens), sampled.logprobs[places[seq] :], now)
            for seq, tokens in groupby(results, lambda result: result.seq)
        ]

    def _give_up(self, batch: ScheduledBatch, error: FoveateError) -> list[Failure]:
        """End the requests of a step that failed, and of those behind it: they were to read what it writes."""
        ended = {seq.request_id for seq in self.scheduler.rollback(batch)}
        self._open = deque(pair for pair in self._open if self.scheduler.is_open(pair[0]))
        for request_id in ended:
            self.scheduler.abort(request_id)
        return [_failure(request_id, error) for request_id in ended]

    def _try_to_take(self, request: Generate | AddEmbeddings) -> FoveateError | None:
        """Take in a request or a picture that it waits for, or return why that is not possible."""
        try:
            if isinstance(request, Generate):
                self._add(request)
            else:
                self._supply(request)
        except FoveateError as error:
            return error
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            if not is_out_of_memory(error):
                raise
            logger.exception("a request's pictures could not be read")
        else:
            return None
        return make_room(self.runner.device)

    def _add(self, request: Generate) -> None:
        """Queue a request's sequences, all or none, and release its handles either way."""
        started = time.monotonic()
        images = [_span(slot) for slot in request.images]
        try:
            given = [slot.embeddings for slot in request.images]
            sizes = [image.num_rows for image in images]
            rows = [None if one is None else self._read(one, size) for one, size in zip(given, sizes, strict=True)]
        finally:
            for one in given:
                if one is not None:
                    self.sources.release(one)
        arrived = time.monotonic()
        self._check_ids(request)
        first = request.sampling.seed
        seqs = [
            Sequence(
                request_id=request.request_id,
                index=index,
                prompt_token_ids=request.prompt_token_ids,
                sampling=request.sampling,
                eos_token_ids=self.eos_token_ids,
                max_seq_len=self.max_seq_len,
                images=images,
                missing={number for number, one in enumerate(given) if one is None},
            )
            for index in range(request.n)
        ]
        ranges = [np.arange(start, start + length) for slot in request.images for start, length in slot.ranges]
        positions = np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)
        embeddings = self._together(rows, sizes) if rows else None
        for seq in seqs:
            seed = secrets.randbits(_SEED_BITS) if first is None else first + seq.index
            state = SequenceState(_signed(seed), embeddings, positions, arrived=arrived, read_seconds=arrived - started)
            self.runner.admit(seq, state)
        self.scheduler.add(*seqs)

    def _together(self, rows: list[torch.Tensor | None], sizes: list[int]) -> torch.Tensor:
        """Put the rows of a request's pictures behind each other, with room for those that are missing.

        That is on the device, or on the host where too many wait there already.
        """
        shape, dtype = (sum(sizes), self.runner.model.config.hidden_size), self.runner.dtype
        device = self._room.device_for(torch.Size(shape).numel() * dtype.itemsize)
        together = self._room.count(torch.empty(shape, dtype=dtype, device=device))
        for room, one in zip(together.split(sizes), rows, strict=True):
            if one is not None:
                room.copy_(one)
        return together

    def _supply(self, request: AddEmbeddings) -> None:
        """Take in a picture's rows, where somebody waits for them, and release the handle."""
        started = time.monotonic()
        try:
            seqs = [seq for seq in self.scheduler.find(request.request_id) if request.image in seq.missing]
            if not seqs:
                return
            images = seqs[0].images
            rows = self._read(request.embeddings, images[request.image].num_rows)
        finally:
            self.sources.release(request.embeddings)
        # All of the request's sequences have the same rows.
        together = state_of(seqs[0]).embeddings
        assert together is not None
        together.split([image.num_rows for image in images])[request.image].copy_(rows)
        now = time.monotonic()
        for seq in seqs:
            seq.supply(request.image, request.embeddings.digest)
            state = state_of(seq)
            state.read_seconds += now - started
            if not seq.stalled:
                state.go_on(now)

    def _read(self, embeddings: Embeddings, wanted: int) -> torch.Tensor:
        rows = self.sources.read(embeddings)
        hidden = self.runner.model.config.hidden_size
        if tuple(rows.shape) != (wanted, hidden):
            raise InvalidRequest(f"a picture has embeddings {list(rows.shape)}, and its places need {[wanted, hidden]}")
        return rows

    def _check_ids(self, request: Generate) -> None:
        """Keep ids from outside the vocabulary away from the device, where they would end more than their request."""
        vocab_size = self.runner.model.config.vocab_size
        for name, ids in (
            ("the prompt", request.prompt_token_ids),
            ("logit_bias", request.sampling.logit_bias),
            ("stop_token_ids", request.sampling.stop_token_ids),
        ):
            outside = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
            if outside is not None:
                raise InvalidRequest(f"{name} has token id {outside}, and the vocabulary ends at {vocab_size - 1}")


def _chunk(seq: Sequence, results: list[SampledToken], logprobs: list[TokenLogprob | None], now: float) -> Chunk:
    """Return what a step has to say of a sequence, from its tokens and the log-probabilities from its first one on."""
    last = results[-1]
    stopped = last.finish_reason == "stop"
    token_ids = [result.token_id for result in results[: len(results) - stopped]]
    return Chunk(
        request_id=seq.request_id,
        index=seq.index,
        token_ids=token_ids,
        logprobs=[one for one in logprobs[: len(token_ids)] if one is not None] or None,
        finish_reason=last.finish_reason,
        stop_token=last.token_id if stopped else None,
        num_cached_tokens=seq.num_cached_tokens,
        times=state_of(seq).take_times(now),
    )


def _span(slot: ImageSlot) -> ImageSpan:
    return ImageSpan(slot.ranges, slot.digest if slot.embeddings is None else slot.embeddings.digest)


def _signed(seed: int) -> int:
    """Bring any integer into the range of int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _failure(request_id: str, error: FoveateError) -> Failure:
    return Failure(
        request_id=request_id,
        code=error.code,
        message=error.message,
        status=error.status,
        retry_after=error.retry_after,
    )
