"""``foveate serve``: the API in this process, the engine and the vision service in a child each.

The order is chosen for a quick start and a clean end: settings and port are checked before anything is
started, the children come up while this process imports its own half, and they end after the last request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

import psutil
import uvicorn
import uvloop

from foveate.config import Settings
from foveate.deploy.flags import settings_command
from foveate.deploy.handover import RETIRE, first_of, inherited_listener, retire, waits_until_ready
from foveate.deploy.instance import instance_directory
from foveate.deploy.keys import with_secrets
from foveate.deploy.limits import within_limits
from foveate.deploy.listen import listen, url_of
from foveate.deploy.resolve import ResolvedModel, resolve_model
from foveate.deploy.supervise import Child, ChildFailed, RestartPolicy, keep_alive
from foveate.deploy.tls import Certificate, read_certificate
from foveate.deploy.webchat import WebChat, require_gradio
from foveate.deploy.welcome import curl_line, ready_line
from foveate.telemetry import configure_logging

if TYPE_CHECKING:
    from foveate.api.incidents import Incidents
    from foveate.engine.client import EngineClient
    from foveate.vision.client import VisionClient

EXIT_CHILD_FAILED = 4
EXIT_INTERRUPTED = 130
CHILD_STOP_SECONDS = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger(__name__)


def serve(settings: Settings) -> int:
    """Start the server and keep it running until Ctrl-C.

    Raises:
        ConfigError: a setting is impossible on this machine.
        CheckpointError: the model is not there, or is not one that can be served.
    """
    settings = with_secrets(settings)
    if settings.http.ui:
        require_gradio()
    configure_logging(settings.logs, "api")
    certificate = read_certificate(settings.http)
    with contextlib.closing(inherited_listener() or listen(settings.http)) as listener:
        model = resolve_model(settings.model)
        settings = within_limits(settings.model_copy(update={"model": model.settings}), model.folder)
        print(f"Loading {model.name} from {model.folder} ...", flush=True)
        with instance_directory(settings) as directory:
            worker = Child([sys.executable, "-m", "foveate.worker", str(directory)])
            encoder = Child([sys.executable, "-m", "foveate.vision.process", str(directory)])
            has_encoder = settings.vision.encoder == "own"
            try:
                worker.start()
                if has_encoder:
                    encoder.start()
                service = Service(
                    settings,
                    model,
                    listener,
                    directory,
                    worker,
                    encoder if has_encoder else None,
                    certificate=certificate,
                )
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    return runner.run(service.run())
            finally:
                worker.kill()
                encoder.kill()


command = settings_command(serve, takes=lambda flag: flag.field != "listen")


class Server(uvicorn.Server):
    """Uvicorn, with the signals left to :class:`Service`, which has children to end as well."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Service:
    """The running service: HTTP server, clients of the children, and the children's supervision.

    Without its engine there is no server; without its vision service it goes on answering text.

    Args:
        settings: as resolved.
        model: what is served.
        listener: the bound and listening socket.
        directory: the instance's directory.
        worker: the started engine.
        encoder: the started vision service, if it is a process of its own.
        policy: when they are started again; the default one if not given.
        certificate: for HTTPS.
    """

    def __init__(
        self,
        settings: Settings,
        model: ResolvedModel,
        listener: socket,
        directory: Path,
        worker: Child,
        encoder: Child | None = None,
        policy: RestartPolicy | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        # This takes a second, in which the children, which are already running, import torch.
        from foveate.api.app import create_app
        from foveate.api.forward import PATH
        from foveate.chat.assets import ModelAssets
        from foveate.checkpoint.identity import identity
        from foveate.engine.client import EngineClient
        from foveate.vision.client import VisionClient

        self.model = model
        self.listener = listener
        self.url = url_of(listener, "https" if certificate else "http")
        self.has_key = bool(settings.http.api_key)
        self.certificate = certificate
        self.worker = worker
        self.encoder = encoder
        self.policy = policy
        self.engine: EngineClient = EngineClient(f"ipc://{directory}/engine.ipc")
        self.vision: VisionClient = VisionClient(
            None if settings.vision.encoder == "none" else f"unix:{directory}/vision.sock",
            settings.vision,
            self.engine,
            transport=settings.transport.transport,
            identity=identity(model.folder, dummy=model.settings.load_format == "dummy"),
        )
        assets = ModelAssets.from_folder(model.folder)
        self.chat = WebChat(settings, self.url, PATH, directory) if settings.http.ui else None
        app = create_app(
            settings, assets, model.name, self.engine, self.vision, self.chat.socket if self.chat else None
        )
        self.incidents: Incidents = app.state.incidents
        self.server = Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=certificate.cert if certificate else None,
                ssl_keyfile=certificate.key if certificate else None,
                timeout_graceful_shutdown=math.ceil(settings.http.shutdown_seconds),
            )
        )
        # At the level info uvicorn tells of every step of its own life; ours is told in this module.
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self._died = asyncio.Event()
        self._retire = asyncio.Event()
        self._stopping = asyncio.Event()
        self._interrupted = False

    async def run(self) -> int:
        """Serve until a signal comes or the engine is given up; return the exit code."""
        loop = asyncio.get_running_loop()
        main = asyncio.current_task()
        assert main is not None
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, main)
        loop.add_signal_handler(RETIRE, self._retire.set)
        await self.engine.start()
        await self.vision.start()
        serving = asyncio.create_task(self._serve())
        watching = asyncio.create_task(keep_alive(self.worker, self._on_death, policy=self.policy))
        looking = asyncio.create_task(self._keep_looking())
        announcing = asyncio.create_task(self._announce())
        chatting = asyncio.create_task(self.chat.keep(self._usable) if self.chat else asyncio.sleep(0))
        try:
            await asyncio.wait({serving, watching, looking}, return_when=asyncio.FIRST_COMPLETED)
            return await self._end(serving, watching, looking)
        except asyncio.CancelledError:
            # The second signal: nothing is waited for any more.
            return EXIT_INTERRUPTED
        finally:
            # Whatever has happened: whoever waits for their end keeps this process from its own.
            for child in self._children:
                child.kill()
            for task in (serving, watching, looking, announcing, chatting):
                task.cancel()
            await asyncio.gather(serving, watching, looking, announcing, chatting, return_exceptions=True)
            await self.vision.close()
            await self.engine.close()

    async def _serve(self) -> None:
        """Answer HTTP requests until the end, or until another server takes over."""
        if waits_until_ready():
            await first_of(self._usable(), self._stopping.wait())
        if self._stopping.is_set():
            return
        async with asyncio.TaskGroup() as group:
            retiring = group.create_task(self._hand_over())
            await self.server.serve([self.listener])
            retiring.cancel()

    async def _usable(self) -> None:
        await self.engine.wait_ready()
        await self.vision.wait_usable()

    async def _hand_over(self) -> None:
        await self._retire.wait()
        await retire(self.server)
        self._stop()

    @property
    def _children(self) -> list[Child]:
        return [self.worker, *([self.encoder] if self.encoder else []), *([self.chat.child] if self.chat else [])]

    async def _keep_looking(self) -> None:
        """Keep the vision service alive. Ends only by cancellation, or if it can never have worked.

        Raises:
            ChildFailed: its settings or its checkpoint are at fault.
        """
        if self.encoder is not None:
            try:
                await keep_alive(self.encoder, self._on_blindness, name="the vision service", policy=self.policy)
            except ChildFailed as failure:
                if failure.exit_code is not None:
                    raise
                logger.error("%s; from now on pictures are refused", failure)
                self.vision.own_lost(str(failure), returning=False)
        await asyncio.Event().wait()

    async def _end(self, serving: asyncio.Task[None], watching: asyncio.Task[None], looking: asyncio.Task[None]) -> int:
        """End what is still running, the HTTP server first, and return the exit code."""
        code = 0
        failure = next((task.exception() for task in (watching, looking) if task.done()), None)
        if failure is not None:
            if not isinstance(failure, ChildFailed):
                raise failure
            if failure.exit_code is None:
                # With a final exit code the child itself has said what is wrong.
                print(f"error: {failure}", file=sys.stderr, flush=True)
            code = failure.exit_code or EXIT_CHILD_FAILED
            self._stop()
        await serving
        # Nobody is to start a child again while it is being ended.
        for task in (watching, looking):
            task.cancel()
        await asyncio.gather(*(asyncio.to_thread(child.stop, CHILD_STOP_SECONDS) for child in self._children))
        return code

    def _on_signal(self, main: asyncio.Task[int]) -> None:
        if self._interrupted:
            main.cancel()
            return
        self._interrupted = True
        print("Stopping; running requests may finish. Ctrl-C again ends at once.", flush=True)
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        if self.chat is not None:
            self.chat.end()
        self.server.should_exit = True

    def _on_death(self, reason: str) -> None:
        self.engine.disconnected(reason)
        self.incidents.died("engine", reason)
        if self.encoder is None:
            self.vision.own_lost(reason, returning=True)
        self._died.set()

    def _on_blindness(self, reason: str) -> None:
        self.incidents.died("vision", reason)
        self.vision.own_lost(reason, returning=True)

    async def _announce(self) -> None:
        """Print that requests are answered now, and again after each restart of the engine."""
        again = False
        while True:
            ready = await self.engine.wait_ready()
            await self.vision.wait_usable()
            seconds = None if again else _seconds_since_start()
            print(ready_line(self.url, self.model.name, ready.device, ready.dtype, seconds), flush=True)
            if not again:
                line = curl_line(self.url, self.model.name, self.has_key, certificate=self.certificate)
                print(f"Try it:\n\n{line}\n", flush=True)
                if self.chat is not None:
                    print(f"Web chat: {self.chat.url}", flush=True)
            again = True
            await self._died.wait()
            self._died.clear()


def _seconds_since_start() -> float:
    """Seconds since the process was created: the interpreter's own start counts as well."""
    return time.time() - float(psutil.Process().create_time())
