"""The process behind a service: it holds the listening socket, runs a server, and puts another one in its place.

``python -m foveate.manager.supervisor FOLDER``, with the socket's number in ``FOVEATE_LISTEN_FD``. When it ends,
however that comes, the kernel ends what it has started. SIGTERM drains and ends, a second one ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from foveate.deploy.handover import LINGER_SECONDS, inherited_listener
from foveate.deploy.instance import instance_directory, remove_abandoned, runtime_folder
from foveate.deploy.supervise import ChildFailed, RestartPolicy, keep_alive
from foveate.errors import ConfigError, FoveateError
from foveate.manager.control import (
    MAX_LINE_BYTES,
    Answer,
    Done,
    Failed,
    Order,
    Progress,
    Reload,
    Stop,
    listen_for_orders,
)
from foveate.manager.deployment import SETTINGS, name_of, read_deployed
from foveate.manager.process import identify, own_id
from foveate.manager.server import NotReady, Server
from foveate.manager.state import Folder

FINAL_CODES = frozenset({2, 3, 4})
"""Exit codes of a server that would only come again: a bad setting, a bad checkpoint, an engine that was given up."""
UNIX = "unix:"

logger = logging.getLogger("foveate.supervisor")


class Supervisor:
    """Runs one service from its start to its end.

    Args:
        folder: the service's; its record and the deployment of the first generation are there.
        listener: the listening socket's number; None for a vision service.
        private: a folder for the sockets of vision services, to which the address that clients know is a link.
    """

    def __init__(self, folder: Folder, listener: int | None, private: Path | None) -> None:
        self.folder = folder
        record = folder.update(supervisor=own_id(), server=None, status="starting", exit_code=None, restarts=0)
        self.role = record.role
        self.deadline = record.deadline
        self.policy = RestartPolicy(max_quick_failures=record.max_restarts + 1, final_codes=FINAL_CODES)
        self._listener = listener
        self._private = private
        self._public = record.address
        self._servers: list[Server] = []
        self._current = self._make(record.generation, waits=False)
        self._watching: asyncio.Task[None] | None = None
        self._reloading = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        """Run until a signal or an order ends it, or the server is given up; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        control = listen_for_orders(self.folder.control)
        orders = await asyncio.start_unix_server(self._take_order, sock=control, limit=MAX_LINE_BYTES)
        failure: NotReady | ChildFailed | None = None
        try:
            await self._until_stopped(self._keep())
        except (NotReady, ChildFailed) as error:
            failure = error
            logger.error("given up: %s", error)
        orders.close()
        self.folder.control.unlink(missing_ok=True)
        await self._end_all()
        if failure is None:
            logger.info("stopped")
            self.folder.update(status="stopped", server=None)
            return 0
        self.folder.update(status="failed", server=None, reason=failure.message, exit_code=failure.exit_code)
        return 1

    async def _until_stopped(self, work: Awaitable[None]) -> bool:
        """Do something until a stop is wanted; say whether it was done. What it raises is raised."""
        doing = asyncio.ensure_future(work)
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not doing.done():
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
            return False
        await doing
        return True

    async def _keep(self) -> None:
        """Keep the current server alive, whichever it is.

        Raises:
            NotReady: the first one never worked.
            ChildFailed: one that has worked cannot be kept alive.
        """
        self._current.start()
        await self._current.until_ready()
        self._watching = self._watch(self._current)
        while True:
            watching = self._watching
            await asyncio.wait({watching})
            # It may have failed while another one is made ready: then that one decides.
            async with self._reloading:
                if watching is self._watching:
                    watching.result()

    @property
    def _public_socket(self) -> Path:
        assert self._public is not None
        return Path(self._public.removeprefix(UNIX))

    def _watch(self, server: Server) -> asyncio.Task[None]:
        return asyncio.create_task(keep_alive(server, self._on_death, name="the server", policy=self.policy))

    def _make(self, generation: int, *, waits: bool) -> Server:
        settings = self.folder.deploy(generation) / SETTINGS
        arguments = [str(settings), self.role]
        if self._private is not None:
            arguments.append(f"{UNIX}{self._private}/{generation}.sock")
        server = Server(
            generation,
            arguments,
            self.folder.log_folder(generation),
            listen_fd=self._listener,
            waits=waits,
            on_ready=lambda address: self._on_ready(server, address),
        )
        self._servers.append(server)
        return server

    def _on_ready(self, server: Server, address: str) -> None:
        if server is self._current:
            self._show(server, address)

    def _show(self, server: Server, address: str) -> None:
        """Write down that a server is the service now, and lead clients to it."""
        logger.info("ready: process %d, configuration %d", server.pid, server.generation)
        changes: dict[str, object] = {}
        if self.role == "vision":
            if self._private is not None:
                _link(self._public_socket, self._private / f"{server.generation}.sock")
            else:
                changes["address"] = address
        self.folder.update(status="ready", generation=server.generation, server=identify(server.pid), **changes)

    def _on_death(self, reason: str) -> None:
        logger.error("%s", reason)
        record = self.folder.read()
        self.folder.update(status="restarting", reason=reason, server=None, restarts=record.restarts + 1)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def _end_all(self) -> None:
        """End every server that there still is."""
        self.folder.update(status="stopping")
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.gather(*(self._end(server, self.deadline) for server in list(self._servers)))
        if self._private is not None:
            _unlink(self._public_socket, self._private)

    async def _end(self, server: Server, deadline: float, *, retires: bool = False) -> None:
        if server.process is not None:
            await server.end(deadline, self._hurry, retires=retires)
        server.close()
        # It may be ended by a reload and by the end of all at once.
        with contextlib.suppress(ValueError):
            self._servers.remove(server)

    async def _take_order(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def tell(answer: Answer) -> None:
            writer.write(msgspec.json.encode(answer) + b"\n")

        # Who gave the order may have gone; it is carried out all the same.
        with contextlib.suppress(ConnectionError):
            try:
                line = await reader.readline()
                order = msgspec.json.decode(line, type=Order)
                if isinstance(order, Stop):
                    self.deadline = self.deadline if order.deadline is None else order.deadline
                    self._stopping.set()
                elif not await self._until_stopped(self._reload(order, tell)):
                    raise FoveateError("it is being stopped")
                tell(Done())
            except (NotReady, ChildFailed) as failure:
                tell(Failed(failure.message, failure.exit_code or 1))
            except FoveateError as error:
                tell(Failed(error.message, error.exit_status))
            except (msgspec.DecodeError, ValueError) as error:
                tell(Failed(f"not understood: {error}"))
            await writer.drain()
        writer.close()

    async def _reload(self, order: Reload, tell: Callable[[Answer], None]) -> None:
        """Make another server ready beside the current one, put it in its place, and end the old one.

        Raises:
            NotReady: the new one does not work; the old one stays.
        """
        if self._reloading.locked() or self._watching is None:
            raise FoveateError("it is being started or reloaded already; try again when that is done")
        if self.role == "vision" and self._private is None:
            raise ConfigError("a port has one vision service: use foveate restart, or listen on unix:PATH")
        async with self._reloading:
            logger.info("configuration %d is to take over", order.generation)
            old, new = self._current, self._make(order.generation, waits=True)
            settings = read_deployed(self.folder.deploy(order.generation))
            tell(Progress(f"loading configuration {order.generation} beside the one that runs"))
            try:
                new.start()
                await new.until_ready(order.timeout)
            except BaseException as error:
                logger.error("configuration %d does not take over: %s", order.generation, error)
                await asyncio.shield(self._end(new, 0.0))
                raise
            watching, self._watching, self._current = self._watching, self._watch(new), new
            watching.cancel()
            self.deadline = settings.http.shutdown_seconds
            self.folder.update(model=name_of(settings), deadline=self.deadline)
            self._show(new, "")
        tell(Progress("the new configuration answers; requests on the old one may finish"))
        deadline = order.drain if self.role == "vision" else order.drain + LINGER_SECONDS
        await self._end(old, deadline, retires=self.role != "vision")
        logger.info("configuration %d has ended", old.generation)


def _link(public: Path, private: Path) -> None:
    """Make a socket's public path lead to a private one, from one moment to the next."""
    new = public.with_name(f".{public.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(private)
    new.replace(public)


def _unlink(public: Path, private: Path) -> None:
    """Remove a link if it leads where ours did."""
    if public.is_symlink() and public.readlink().parent == private:
        public.unlink(missing_ok=True)


def main() -> None:
    """Run the service of a folder. Exit codes: 0 stopped, 1 given up."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)-7s %(name)s %(message)s")
    folder = Folder(Path(sys.argv[1]))
    with ExitStack() as stack:
        listener = inherited_listener()
        if listener is not None:
            stack.enter_context(listener)
        record = folder.read()
        private: Path | None = None
        try:
            if record.address is not None and record.address.startswith(UNIX):
                private = stack.enter_context(instance_directory(read_deployed(folder.deploy(record.generation))))
        except ConfigError as error:
            folder.update(supervisor=own_id(), status="failed", reason=error.message, exit_code=error.exit_status)
            sys.exit(1)
        code = asyncio.run(_run(folder, listener.fileno() if listener else None, private))
        # A server that had to be killed could not do this itself.
        remove_abandoned(runtime_folder())
    sys.exit(code)


async def _run(folder: Folder, listener: int | None, private: Path | None) -> int:
    return await Supervisor(folder, listener, private).run()


if __name__ == "__main__":
    main()
