"""The web chat as a child of ``foveate serve``: ``python -m foveate.ui.process SETTINGS``.

It listens on a unix socket, and the server forwards ``/ui`` to it. What it has to know stands in a file of JSON
(:class:`foveate.deploy.webchat.ChatSettings`).
"""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import msgspec

from foveate.deploy.webchat import ChatSettings, require_gradio
from foveate.errors import FoveateError
from foveate.ui.app import Access, create_app, serve, uploads_folder


def run(settings: ChatSettings) -> None:
    """Serve until a signal comes."""
    require_gradio()
    where = Path(settings.socket)
    # A predecessor's, which was killed.
    where.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, uploads_folder(where.parent) as uploads:
        # The server has looked at the host already, and wants no key for the page: nobody's is in it.
        access = Access(path=settings.path, check_host=False, max_picture_bytes=settings.max_picture_bytes)
        certificate = Path(settings.certificate) if settings.certificate else None
        app = create_app(settings.url, uploads, access, key=None, certificate=certificate)
        # Who connects is answered: it listens only now.
        listener.bind(settings.socket)
        listener.listen()
        serve(app, listener)


def main() -> int:
    """Serve, and return the exit code; an error that a user can mend is one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ChatSettings))
    except FoveateError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
