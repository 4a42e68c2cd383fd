"""The process that a supervisor runs: ``foveate serve`` or ``foveate vision``, with settings from a file alone.

``python -m foveate.manager.child SETTINGS ROLE [LISTEN]``. Its exit codes are those of the commands.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import NoReturn

from foveate.config import Settings
from foveate.deploy.sources import settings_from_file
from foveate.errors import FoveateError

EXIT_INTERRUPTED = 130
UNLIMITED_SECONDS = 7 * 24 * 3600.0
"""How long running requests may take: it is the supervisor who has a deadline, which differs from time to time."""


def run(settings: Settings, role: str, listen: str | None) -> int:
    """Serve until a signal comes; return the exit code.

    Args:
        settings: all of them.
        role: ``all``, ``llm`` or ``vision``.
        listen: where a vision service listens, if not where its settings say.
    """
    if role == "vision":
        from foveate.deploy.look import look

        vision = settings.vision.model_copy(update={"listen": listen or settings.vision.listen})
        return look(settings.model_copy(update={"vision": vision}))
    from foveate.deploy.serve import serve

    http = settings.http.model_copy(update={"shutdown_seconds": UNLIMITED_SECONDS})
    return serve(settings.model_copy(update={"http": http}))


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Serve, and end with the exit code; an error that a user can mend is one line for each problem."""
    # Before the server has handlers of its own.
    signal.signal(signal.SIGTERM, _interrupt)
    path, role, *listen = sys.argv[1:]
    try:
        code = run(settings_from_file(Path(path)), role, listen[0] if listen else None)
    except FoveateError as error:
        for line in error.message.splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)
        code = error.exit_status
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
