"""The chat as a web application, and the process that serves it."""

from __future__ import annotations

import contextlib
import hmac
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from socket import socket

from foveate.ui.guard import Guard

# As the server bounds them by default.
MAX_PICTURE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Access:
    """Who may open the page.

    Attributes:
        path: where the page is, ``/`` or such as ``/ui``.
        password: what visitors have to give, with any name; None lets all in.
        check_host: see :class:`foveate.ui.guard.Guard`.
        max_picture_bytes: the largest file that can be uploaded.
    """

    path: str = "/"
    password: str | None = None
    check_host: bool = True
    max_picture_bytes: int = MAX_PICTURE_BYTES


@contextlib.contextmanager
def uploads_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make the folder for all of Gradio's files, and remove it in the end. To be called before Gradio is imported.

    Args:
        parent: where; the folder for temporary files if not given.
    """
    with tempfile.TemporaryDirectory(prefix="foveate-ui-", dir=parent) as folder:
        # Nobody else on this machine reads them; nobody is told of this page; nothing comes from elsewhere.
        os.environ.update(
            GRADIO_TEMP_DIR=folder,
            GRADIO_ANALYTICS_ENABLED="False",
            GRADIO_RUN_HISTORY="False",
            HF_HUB_OFFLINE="1",
            HF_HUB_DISABLE_TELEMETRY="1",
        )
        yield Path(folder).resolve()


def create_app(url: str, uploads: Path, access: Access, *, key: str | None, certificate: Path | None) -> Guard:
    """Make the application.

    Args:
        url: of the server that answers.
        uploads: from :func:`uploads_folder`.
        access: who may open it, and where it is.
        key: the API key to send for visitors who give none.
        certificate: the server's, if it is to be trusted as it is.
    """
    import gradio as gr
    from fastapi import FastAPI

    from foveate.ui.handlers import Handlers
    from foveate.ui.page import Page, style, theme
    from foveate.ui.server import Server

    server = Server(url, key=key, certificate=certificate)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await server.close()

    page = Page(Handlers(server, uploads)).blocks
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    password = access.password
    gr.mount_gradio_app(
        app,
        page,
        access.path,
        auth=None if password is None else (lambda _, given: _same(given, password)),
        footer_links=[],
        run_history=False,
        max_file_size=access.max_picture_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
        theme=theme(),
        head=f"<style>{style()}</style>",
    )
    return Guard(app, uploads, check_host=access.check_host)


def serve(app: Guard, listener: socket, announce: Callable[[], None] = lambda: None) -> None:
    """Serve on a listening socket until Ctrl-C or SIGTERM.

    Args:
        app: what to serve.
        listener: the socket.
        announce: is called when visitors are answered.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket] | None = None) -> None:
            await super().startup(sockets)
            announce()

        async def shutdown(self, sockets: list[socket] | None = None) -> None:
            # Open pages hold a connection each, which nothing ends by itself.
            app.end()
            await super().shutdown(sockets)

    config = uvicorn.Config(app, ws="none", log_level="warning", access_log=False, server_header=False)
    with contextlib.suppress(KeyboardInterrupt):
        Server(config).run([listener])


def _same(given: str, password: str) -> bool:
    return hmac.compare_digest(given.encode(), password.encode())
