"""The API process's end of all vision services: who encodes which picture, and what happens when one goes away."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Collection, Sequence

from foveate.config import VisionSettings
from foveate.errors import FoveateError, Unavailable
from foveate.vision.remote import Encoded, Engine, Lost, PictureTask, RemoteEncoder

TRIES = 2
"""A picture whose service went away is sent once more."""


class PictureRefused(Exception):
    """One of a request's pictures has no embeddings.

    Attributes:
        index: which one.
        error: why.
    """

    def __init__(self, index: int, error: FoveateError) -> None:
        super().__init__(f"picture {index}: {error.message}")
        self.index = index
        self.error = error


class VisionClient:
    """Spreads pictures over vision services.

    Args:
        own: the address of the service that this server has started itself, if it has.
        settings: where the others are, and how to talk to them.
        engine: where the rows go.
        transport: the one to use, or ``auto``.
        identity: names the weights that every service has to have.
    """

    def __init__(
        self, own: str | None, settings: VisionSettings, engine: Engine, *, transport: str, identity: str | None
    ) -> None:
        self._own_url = own
        self._settings = settings
        self._engine = engine
        self._transport = transport
        self._identity = identity
        self._own: RemoteEncoder | None = None
        self.encoders: list[RemoteEncoder] = []
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Begin to look for the services."""
        urls = {"own": self._own_url} if self._own_url else {}
        for name, url in {**urls, **{url: url for url in self._settings.vision}}.items():
            encoder = RemoteEncoder(
                name, url, self._settings, self._engine, transport=self._transport, identity=self._identity
            )
            encoder.changed = self._changed
            self.encoders.append(encoder)
            encoder.start()
        if self._own_url:
            self._own = self.encoders[0]
            self._own.restarts = True

    async def close(self) -> None:
        """End all calls."""
        await asyncio.gather(*(encoder.close() for encoder in self.encoders))

    def own_lost(self, reason: str, *, returning: bool) -> None:
        """Learn that this server's own service has died, and whether it is started again."""
        if self._own is not None:
            self._own.lost(reason, restarts=returning)

    @property
    def problems(self) -> list[str]:
        """Why services cannot be used now; empty if all can."""
        return [f"{one.name}: {one.problem}" for one in self.encoders if not one.usable]

    async def wait_usable(self) -> None:
        """Wait until a service can be used, or none can be expected any more."""
        while not any(one.usable for one in self.encoders) and any(one.expected for one in self.encoders):
            self._changed.clear()
            # What makes a service usable again (the engine's return) is not always told.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.1)

    @property
    def encoder_name(self) -> str | None:
        """What stands for the encoder in the digests of all services that can be used, if it is the same."""
        names = {one.encoder_name for one in self.encoders if one.usable}
        return names.pop() if len(names) == 1 else None

    async def encode(self, pictures: Sequence[PictureTask], take: Callable[[int, Encoded], None]) -> None:
        """Have pictures encoded, by several services at once if there are; cancelling this cancels the work.

        Args:
            pictures: what to encode.
            take: is given the place and the embeddings of each picture as it is done, to release them or have the
                engine do so, whatever becomes of the others.

        Raises:
            PictureRefused: one is broken, or its service is full or failed.
            Unavailable: no service can be used.
        """
        missing = set(range(len(pictures)))

        def take_once(index: int, encoded: Encoded) -> None:
            missing.remove(index)
            take(index, encoded)

        failed: dict[RemoteEncoder, str] = {}
        for _ in range(TRIES):
            if missing:
                shares = await self._spread(pictures, missing, failed)
                await self._run(pictures, shares, take_once, failed)
        if missing:
            raise _gone([f"{one.name}: {reason}" for one, reason in failed.items()])

    async def _spread(
        self, pictures: Sequence[PictureTask], indices: Collection[int], failed: Collection[RemoteEncoder]
    ) -> dict[RemoteEncoder, list[int]]:
        """Give each picture to the service that has the fewest slices to do."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.wait_usable(), self._settings.vision_wait_seconds)
        usable = [one for one in self.encoders if one.usable]
        # One that has just failed is asked again only if there is no other.
        usable = [one for one in usable if one not in failed] or usable
        if not usable:
            raise _gone(self.problems)
        load = {one: one.pending for one in usable}
        shares: dict[RemoteEncoder, list[int]] = {}
        for index in sorted(indices, key=lambda index: -pictures[index].num_slices):
            chosen = min(load, key=load.__getitem__)
            load[chosen] += pictures[index].num_slices
            shares.setdefault(chosen, []).append(index)
        return shares

    async def _run(
        self,
        pictures: Sequence[PictureTask],
        shares: dict[RemoteEncoder, list[int]],
        take: Callable[[int, Encoded], None],
        failed: dict[RemoteEncoder, str],
    ) -> None:
        async def ask(encoder: RemoteEncoder, indices: list[int]) -> None:
            request_id = uuid.uuid4().hex
            try:
                async with contextlib.aclosing(encoder.encode(request_id, [pictures[i] for i in indices])) as replies:
                    async for place, result in replies:
                        if isinstance(result, FoveateError):
                            raise PictureRefused(indices[place], result)
                        take(indices[place], result)
            except Lost as lost:
                failed[encoder] = str(lost)
            except BaseException:
                # A reply may have been on its way, with a lease that nobody knows of here.
                encoder.cancel(request_id)
                raise

        tasks = [asyncio.create_task(ask(encoder, sorted(indices))) for encoder, indices in shares.items()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _gone(reasons: Sequence[str]) -> Unavailable:
    why = "; ".join(reasons) or "none is configured"
    return Unavailable(f"No vision encoder can be used, so pictures cannot be looked at ({why}).", retry_after=2)
