"""An engine's embeddings from any number of encoders, each by the fastest way that both have."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from foveate.errors import FoveateError, Unavailable
from foveate.transport.handle import EmbeddingHandle, Embeddings, InlineEmbeddings, Offer, Transport
from foveate.transport.identity import device_id, host_id
from foveate.transport.inline import from_inline
from foveate.transport.local import READER, LocalArena
from foveate.transport.reader import ArenaReader, attach

logger = logging.getLogger(__name__)

_SWEEP_SECONDS = 1.0


class _Attached(NamedTuple):
    """One arena that this engine reads from; ``name`` is the reader's."""

    transport: Transport
    name: str
    reader: ArenaReader | None = None


class Sources:
    """Reads and releases embeddings of every arena that is attached. For use by the engine's one thread.

    Args:
        device: the engine's, where rows go.
        local: the arena of an encoder in this process.
        clock: seconds, monotonic.
    """

    def __init__(
        self, device: torch.device, local: LocalArena | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._device = device
        self._local = local
        self._clock = clock
        self._host = host_id()
        self._attached: dict[str, _Attached] = {}  # by the offer's name
        self._readers: dict[str, ArenaReader] = {}  # by the name in handles; dead ones too, for what they still hold
        self._dead_since: dict[str, float] = {}
        self._counts: Counter[str] = Counter()
        self._next_sweep = clock()

    def attach(self, offer: Offer, transport: str = "auto") -> tuple[Transport, str]:
        """Attach to an encoder's arena; one that is attached already stays as it is.

        Args:
            offer: what the encoder has.
            transport: ``auto``, or the one to use.

        Returns:
            The transport in use, and the reader's name to be sent along with pictures (empty for inline rows).

        Raises:
            Unavailable: the transport that was asked for is not possible; the message says why.
        """
        self._sweep()
        there = self._attached.get(offer.arena)
        if there is None or _is_cut_off(there):
            there = self._auto(offer) if transport == "auto" else self._try(offer, transport)
            self._attached[offer.arena] = there
            if there.reader is not None:
                # One with this name that is there already was cut off, and its leases ended with that.
                self._forget(there.reader.arena)
                self._readers[there.reader.arena] = there.reader
            logger.info("embeddings of %s come by %s", offer.arena, there.transport)
        return there.transport, there.name

    def detach(self, arena: str) -> None:
        """Forget an arena, by its offer's name. An unknown one is ignored."""
        there = self._attached.pop(arena, None)
        if there is not None and there.reader is not None:
            self._forget(there.reader.arena)

    def read(self, embeddings: Embeddings) -> Tensor:
        """Return the rows [num_tokens, hidden_size] on the engine's device, the caller's own or never written again.

        Raises:
            Unavailable: the lease has ended, so the rows may be gone, or the arena is not attached.
            EngineError: what the encoder sent makes no sense.
        """
        self._sweep()
        transport: Transport
        try:
            if isinstance(embeddings, InlineEmbeddings):
                transport, rows = "inline", from_inline(embeddings)
            elif self._local is not None and embeddings.arena == self._local.name:
                transport, rows = "local", self._local.read(embeddings)
            else:
                reader = self._readers.get(embeddings.arena)
                if reader is None:
                    raise Unavailable(f"the arena {embeddings.arena} of a picture is not attached", retry_after=1)
                transport, rows = reader.transport, reader.read(embeddings)
        except FoveateError:
            self._counts["failed"] += 1
            raise
        self._counts[transport] += 1
        return rows.to(self._device)

    def release(self, embeddings: Embeddings) -> None:
        """End the handle's lease. Releasing twice does nothing, nor does releasing inline rows. Never fails."""
        if not isinstance(embeddings, EmbeddingHandle):
            return
        if self._local is not None and embeddings.arena == self._local.name:
            self._local.release(embeddings)
        elif (reader := self._readers.get(embeddings.arena)) is not None:
            reader.release(embeddings)

    def stats(self) -> dict[str, float]:
        """Numbers as of now: ``attached_…`` arenas and ``reads_…_total`` by transport, and reads that failed."""
        self._sweep()
        attached = Counter(there.transport for there in self._attached.values() if not _is_cut_off(there))
        numbers: dict[str, float] = {"reads_failed_total": self._counts["failed"]}
        for transport in get_args(Transport):
            key = transport.replace("-", "_")
            numbers[f"attached_{key}"] = attached[transport]
            numbers[f"reads_{key}_total"] = self._counts[transport]
        return numbers

    def close(self) -> None:
        """Detach from all."""
        self._attached.clear()
        for arena in list(self._readers):
            self._forget(arena)

    def _auto(self, offer: Offer) -> _Attached:
        """Take the first that works."""
        for transport in ("local", "cuda-ipc", "arena"):
            if self._obstacle(offer, transport) is not None:
                continue
            try:
                return self._try(offer, transport)
            except FoveateError as error:
                logger.warning("embeddings of %s cannot come by %s: %s", offer.arena, transport, error.message)
        return self._try(offer, "inline")

    def _try(self, offer: Offer, transport: str) -> _Attached:
        obstacle = self._obstacle(offer, transport)
        if obstacle is not None:
            raise Unavailable(f"embeddings of {offer.arena} cannot come by {transport}: {obstacle}")
        match transport:
            case "local":
                return _Attached("local", READER)
            case "cuda-ipc" | "arena":
                name = f"engine-{os.getpid()}-{secrets.token_hex(4)}"
                return _Attached(transport, name, attach(offer.address, name, transport, self._device))
            case _:
                return _Attached("inline", "")

    def _obstacle(self, offer: Offer, transport: str) -> str | None:
        """Say why a transport is out of the question for this pair, if it is."""
        if transport not in get_args(Transport):
            return "there is no such transport"
        if transport == "inline":
            return None
        if transport == "local":
            here = self._local is not None and self._local.offer == offer
            return None if here else "the encoder is not in the engine's process"
        if not offer.address:
            return "the encoder shares no memory"
        if offer.host != self._host:
            return "the encoder runs on another host"
        if transport == "cuda-ipc":
            device = device_id(self._device)
            if device == "cpu" or device != offer.device:
                return f"the encoder is on {offer.device} and the engine on {device}"
        return None

    def _sweep(self) -> None:
        """Forget arenas whose encoder has died, once nothing that it published can be wanted any more."""
        now = self._clock()
        if now < self._next_sweep:
            return
        self._next_sweep = now + _SWEEP_SECONDS
        for arena, reader in list(self._readers.items()):
            reader.flush()
            if not reader.closed:
                continue
            if arena not in self._dead_since:
                logger.warning("the encoder of %s is gone", arena)
                self._dead_since[arena] = now
            elif now - self._dead_since[arena] > reader.lease_seconds:
                self._attached = {name: there for name, there in self._attached.items() if there.reader is not reader}
                self._forget(arena)

    def _forget(self, arena: str) -> None:
        """Give an arena's memory back, by the name in handles."""
        self._dead_since.pop(arena, None)
        reader = self._readers.pop(arena, None)
        if reader is not None:
            reader.close()


def _is_cut_off(there: _Attached) -> bool:
    return there.reader is not None and there.reader.closed
