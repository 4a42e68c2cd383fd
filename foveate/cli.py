"""The ``foveate`` command. Nothing but the command line itself is imported before a command is chosen.

Exit codes: 0 done, 1 failed, 2 a bad setting or flag, 3 a bad checkpoint, 4 the worker could not be kept
alive, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from cyclopts import App, CycloptsError

from foveate.errors import ConfigError, FoveateError
from foveate.version import version

EXIT_INTERRUPTED = 130


def show_version() -> int:
    """Print the version."""
    print(f"foveate {version()}")
    return 0


app = App(
    name="foveate",
    help="Serve vision-language models over an OpenAI-compatible API.",
    version=lambda: f"foveate {version()}",
    help_epilogue="Every command has its own --help.",
    result_action="return_value",
)
# Commands are named, not imported: the first two bring in half a second of libraries each.
app.command("foveate.deploy.serve:command", name="serve", help="Start the server.", sort_key=1)
app.command("foveate.deploy.look:command", name="vision", help="Start a vision service alone.", sort_key=2)
app.command("foveate.client.ask:command", name="ask", help="Ask a server about pictures.", sort_key=5)
app.command("foveate.client.chat:command", name="chat", help="Talk with a server about pictures.", sort_key=6)
app.command("foveate.client.top:command", name="top", help="Watch a server.", sort_key=7)
app.command("foveate.ui.command:command", name="ui", help="Open a web chat for a server.", sort_key=8)
bench = App(name="bench", help="Measure a server under load, or a GPU's kernels.", sort_key=3)
bench.command("foveate.bench.serve:command", name="serve", help="Measure a server under load.")
bench.command("foveate.bench.gpu:kernels", name="kernels", help="Measure every operation of the decoder on a GPU.")
app.command(bench)
app.command("foveate.bench.gpu:tune", name="tune", help="Choose the fastest kernels for this GPU.", sort_key=4)
app.command(
    "foveate.deploy.checkpoints:split", name="split", help="Split a checkpoint into language and vision.", sort_key=10
)
app.command(
    "foveate.deploy.checkpoints:build",
    name="build",
    help="Build an engine directory, quantized if wanted.",
    sort_key=11,
)
app.command("foveate.deploy.checkpoints:inspect", name="inspect", help="Say what is in a model's folder.", sort_key=12)
app.command("foveate.deploy.checkpoints:verify", name="verify", help="Compare a model with its reference.", sort_key=13)
app.command(
    "foveate.deploy.configuration:app", name="config", help="Show the settings and where they come from.", sort_key=20
)
app.command(
    "foveate.manager.archive:command",
    name="archive",
    help="Bundle a model's configuration for starting it.",
    sort_key=30,
)
app.command("foveate.manager.start:command", name="start", help="Start a service in the background.", sort_key=31)
app.command("foveate.manager.listing:command", name="ps", help="List the services.", sort_key=32)
app.command("foveate.manager.logs:command", name="logs", help="Show a service's logs.", sort_key=33)
app.command(
    "foveate.manager.reload:command", name="reload", help="Change a service without refusing a request.", sort_key=34
)
app.command("foveate.manager.restart:command", name="restart", help="Stop a service and start it again.", sort_key=35)
app.command("foveate.manager.stop:command", name="stop", help="Stop services.", sort_key=36)
app.command("foveate.manager.doctor:command", name="doctor", help="Check this machine.", sort_key=40)
app.command(show_version, name="version", help="Print the version.", sort_key=50)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    SIGTERM is treated as Ctrl-C, so that what was started is ended.
    Errors that a user can mend are one line on standard error, without a traceback.

    Args:
        argv: the arguments; those of the process if not given.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    sys.exit(_run(sys.argv[1:] if argv is None else argv))


_interrupts: list[int] = []
"""The signals that came."""


def _interrupt(number: int, _frame: object) -> NoReturn:
    _interrupts.append(number)
    raise KeyboardInterrupt


def _run(argv: Sequence[str]) -> int:
    if {"--help", "-h"}.intersection(argv):
        _show_whole_help(argv)
    try:
        result = app(list(argv), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _fail(f"{error} Try --help.", ConfigError.exit_status)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        # A library that was interrupted may say so in its own way.
        if _interrupts:
            return EXIT_INTERRUPTED
        if isinstance(error, FoveateError):
            return _fail(error.message, error.exit_status)
        raise
    return result if isinstance(result, int) else 0


def _show_whole_help(argv: Sequence[str]) -> None:
    """Let a command's own text, known once it is imported, take the place of its line in the list of commands."""
    command = app
    for name in argv:
        if name.startswith("-") or name not in command:
            break
        command = command[name]
    if command is not app and command.default_command:
        command.help = None


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
