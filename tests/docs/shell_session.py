"""A reader of a document: a fresh home, a clone's folder, and one shell into which block after block is pasted."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from markdown_blocks import Block
from serving import ROOT
from shown_output import difference

PORT, CHAT_PORT = "9997", "7860"
# How what a server and a web chat print ends when they are ready.
_READY = ("\n\n", "(Ctrl-C ends it)\n")
# Settings of whoever runs the tests, and what make tells a make below it, such as to name its folders.
_NOT_A_READER_S = ("FOVEATE_", "XDG_", "MAKE", "MFLAGS", "ARGS")
BLOCK_SECONDS = 120
READY_SECONDS = 120
STOP_SECONDS = 30
_DONE = b"\x1e"
_OPTIONS = ("-e", "-u", "-o", "pipefail")


class DocumentError(AssertionError):
    """A block did not do what its document says."""


class Reader:
    """Does what a document says, block by block, in a folder of its own.

    Args:
        folder: an empty one with a short name: sockets lie below it.
    """

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "foveate"
        self.home = folder / "home"
        self.port, self.chat_port = str(_free_port()), str(_free_port())
        _make_clone(self.clone)
        self.home.mkdir()
        (folder / "run").mkdir(mode=0o700)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_A_READER_S)}
        self.environment = {
            **inherited,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "FOVEATE_PORT": self.port,
            "FOVEATE_UI_PORT": self.chat_port,
            "FOVEATE_URL": f"http://127.0.0.1:{self.port}",
            "FOVEATE_DEVICE": "cpu",
            "HF_HUB_OFFLINE": "1",
            # The documents show what a machine without a GPU prints.
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            "LC_ALL": "C.UTF-8",
        }
        self._errors = (folder / "errors.log").open("w+b")
        self._blocks = folder
        self._staying: list[tuple[Block, subprocess.Popen[bytes], Path]] = []
        self._shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc", *_OPTIONS],
            cwd=self.clone,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the shell and what stays, and whatever services a failure has left behind."""
        for _, process, _ in self._staying:
            _kill(process)
        _kill(self._shell)
        foveate = [sys.executable, "-m", "foveate.cli"]
        stop = [*foveate, "stop", "--all", "--timeout=1", "--remove"]
        subprocess.run(stop, env=self.environment, capture_output=True, timeout=STOP_SECONDS, check=False)
        self._errors.close()

    def do(self, block: Block) -> None:
        """Run a block and compare what it prints with what the document shows.

        Raises:
            DocumentError: it failed, took too long, or printed something else; the message has document and line.
        """
        if block.stays:
            printed = self._begin(block)
        elif block.language == "python":
            printed = self._run_python(block)
        else:
            printed = self._paste(block)
        if block.shown is None:
            return
        told = difference(self._for_this_port(block.shown), self._anonymous(printed))
        if told is not None:
            raise DocumentError(f"{block}: printed something else than the document shows\n{told}")

    def end(self) -> None:
        """Press Ctrl-C in the terminals in which something still runs.

        Raises:
            DocumentError: it did not end by that.
        """
        for block, process, log in self._staying:
            # As a terminal does it: to all processes in it.
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise DocumentError(f"{block}: Ctrl-C did not end it\n{_text(log)}") from error
            # A make that runs a server dies of the signal itself, whatever the server does.
            if process.returncode and "Stopping; running requests may finish" not in _text(log):
                raise DocumentError(f"{block}: did not end well\n{_text(log)}")

    def _paste(self, block: Block) -> str:
        file = self._write(block)
        assert self._shell.stdin is not None
        # What reads its input finds none, and does not take the next block for it.
        command = f". {file} < /dev/null; printf '{_DONE.decode()}'\n"
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.write(command.encode())
            self._shell.stdin.flush()
        return self._read_output(block)

    def _read_output(self, block: Block) -> str:
        assert self._shell.stdout is not None
        output, deadline = b"", time.monotonic() + BLOCK_SECONDS
        while not output.endswith(_DONE):
            ready, _, _ = select.select([self._shell.stdout], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise DocumentError(f"{block}: not done after {BLOCK_SECONDS} s\n{self._said(output)}")
            piece = os.read(self._shell.stdout.fileno(), 65536)
            if not piece:
                code = self._shell.wait(STOP_SECONDS)
                raise DocumentError(f"{block}: exit code {code}\n{block.content}\n{self._said(output)}")
            output += piece
        return output.removesuffix(_DONE).decode()

    def _run_python(self, block: Block) -> str:
        result = subprocess.run(
            [sys.executable, str(self._write(block))],
            cwd=self.clone,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=BLOCK_SECONDS,
            check=False,
        )
        if result.returncode:
            raise DocumentError(f"{block}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
        return result.stdout

    def _begin(self, block: Block) -> str:
        """Run a block in a terminal of its own, and wait until what it starts is ready."""
        log = self._blocks / f"terminal-{block.line}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", *_OPTIONS, str(self._write(block))],
                cwd=self.clone,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=self._errors,
                start_new_session=True,
            )
        for _ in range(READY_SECONDS * 10):
            if _text(log).endswith(_READY):
                self._staying.append((block, process, log))
                return _text(log)
            if process.poll() is not None:
                break
            time.sleep(0.1)
        _kill(process)
        raise DocumentError(f"{block}: did not get ready\n{_text(log)}{self._said(b'')}")

    def _write(self, block: Block) -> Path:
        path = self._blocks / f"block-{block.line}.{'py' if block.language == 'python' else 'sh'}"
        path.write_text(self._for_this_port(block.content), encoding="utf-8")
        return path

    def _for_this_port(self, text: str) -> str:
        return text.replace(PORT, self.port).replace(CHAT_PORT, self.chat_port)

    def _anonymous(self, text: str) -> str:
        """Name the folders as a document does."""
        folders = {self.clone: "/home/you/foveate", ROOT: "/home/you/foveate", self.home: "/home/you"}
        for folder, shown in folders.items():
            text = text.replace(str(folder), shown)
        return text

    def _said(self, output: bytes) -> str:
        self._errors.seek(0)
        return output.decode(errors="replace") + self._errors.read().decode(errors="replace")


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[Reader]:
    """Begin to read a document; in the end, everything that it started has to have ended."""
    with Reader(folder) as reader:
        yield reader
        reader.end()


def _make_clone(folder: Path) -> None:
    """Make what ``git clone`` and an earlier ``make serve`` would have made, without copying or installing anything."""
    folder.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    environment = folder / ".venv"
    environment.mkdir()
    (environment / "bin").symlink_to(Path(sys.executable).parent)
    # Younger than pyproject.toml: what it asks for is installed, or this test would not run.
    (environment / ".installed").touch()
    (environment / ".installed-dev").touch()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _text(path: Path) -> str:
    return path.read_text(errors="replace")
