"""What a machine needs to serve: each check says how it is, and what to do about it if that is not well."""

from __future__ import annotations

import getpass
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import psutil

from foveate.deploy.instance import runtime_folder
from foveate.errors import ConfigError
from foveate.manager.gpu import query
from foveate.manager.state import home

State = Literal["ok", "note", "warn", "fail"]

OLDEST, NEWEST = (3, 11), (3, 13)
DEFAULT_PORT = 9997
_GIB = 2**30
_MIN_MEMORY = 4 * _GIB
_MIN_DISK = 2 * _GIB
_MIN_FILES = 4096
_TORCH_SECONDS = 120.0
_HUB_SECONDS = 2.0
_ARENA_BYTES = 2**20
_SHM = Path("/dev/shm")  # noqa: S108 (nothing is written there)
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_LINGER = Path("/var/lib/systemd/linger")
_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """What was found.

    Attributes:
        name: what was looked at.
        state: ``ok``, ``note`` (good to know), ``warn`` (some things will not work) or ``fail`` (nothing will).
        detail: what is there.
        remedy: what to do; empty if nothing has to be done.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


def machine_checks(port: int) -> Iterator[Check]:
    """Look at everything but what dead services have left behind.

    Args:
        port: one that a service is to listen on.
    """
    yield _python()
    has_gpu = bool(query("--query-gpu=name"))
    yield _torch(has_gpu)
    yield _gpu()
    yield _memory()
    yield _shared_memory()
    yield _memfd()
    yield from _limits()
    yield _runtime()
    yield _home()
    yield _port(port)
    yield _hub()


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    good = OLDEST <= sys.version_info[:2] <= NEWEST
    remedy = "" if good else "install Python 3.11, 3.12 or 3.13"
    return Check("python", "ok" if good else "fail", f"{version} ({sys.executable})", remedy)


def _torch(has_gpu: bool) -> Check:
    """Ask another process, since torch takes seconds and half a gigabyte to import."""
    try:
        command = [sys.executable, "-c", _TORCH]
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Check(
            "torch", "fail", f"cannot be imported within {_TORCH_SECONDS:.0f} s", "see what slows the disk down"
        )
    if result.returncode:
        why = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Check("torch", "fail", f"cannot be imported: {why}", "pip install foveate brings it along")
    found = json.loads(result.stdout.splitlines()[-1])
    built = f"for CUDA {found['cuda']}" if found["cuda"] else "for CPUs"
    detail = f"{found['version']} {built}, sees {', '.join(found['gpus']) or 'no GPU'}"
    if has_gpu and not found["gpus"]:
        return Check("torch", "warn", detail, "install a build of torch for the driver's CUDA (see pytorch.org)")
    return Check("torch", "ok", detail)


def _gpu() -> Check:
    rows = query("--query-gpu=name,driver_version,memory.free,memory.total")
    if rows:
        words = [f"{name} ({free} of {total} MiB free)" for name, _, free, total in rows]
        return Check("gpu", "ok", f"{', '.join(words)}, driver {rows[0][1]}")
    if Path("/dev/nvidiactl").exists():
        remedy = "run nvidia-smi: it says what is wrong with the driver; in a container, start that with --gpus all"
        return Check("gpu", "warn", "there is one, but nvidia-smi does not answer", remedy)
    return Check("gpu", "note", "none; models run on the CPU")


def _memory() -> Check:
    available = int(psutil.virtual_memory().available)
    total = int(psutil.virtual_memory().total)
    limit = ""
    if _CGROUP.is_file() and (text := _CGROUP.read_text().strip()).isdigit() and int(text) < total:
        limit = f"; this container may use {int(text) / _GIB:.1f} GiB"
        available = min(available, int(text))
    detail = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB available{limit}"
    if available < _MIN_MEMORY:
        return Check("memory", "warn", detail, "end other programs, or give the container more memory")
    return Check("memory", "ok", detail)


def _shared_memory() -> Check:
    folder = _SHM
    if not folder.is_dir():
        return Check(
            "shared memory", "warn", f"{folder} is not there", "mount a tmpfs there; libraries of torch use it"
        )
    usage = shutil.disk_usage(folder)
    sizes = f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB free"
    detail = f"{folder}: {sizes} (embeddings are not there)"
    if not os.access(folder, os.W_OK):
        return Check("shared memory", "warn", f"{detail}; it cannot be written to", f"chmod 1777 {folder}, as root")
    return Check("shared memory", "ok", detail)


def _memfd() -> Check:
    """Make a small piece of the memory that embeddings travel in."""
    try:
        handle = os.memfd_create("foveate-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (OSError, AttributeError) as error:
        remedy = "use --transport inline; in a container, allow memfd_create"
        return Check("memfd", "warn", f"shared memory without a name cannot be made ({error})", remedy)
    try:
        os.posix_fallocate(handle, 0, _ARENA_BYTES)
    except OSError as error:
        remedy = "use --transport inline, or give the container more memory"
        return Check("memfd", "warn", f"shared memory cannot be allocated ({error.strerror})", remedy)
    finally:
        os.close(handle)
    return Check("memfd", "ok", "shared memory for embeddings can be made")


def _limits() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < _MIN_FILES
    remedy = f"ulimit -n {min(65536, hard) if hard > 0 else 65536} (LimitNOFILE= in a systemd unit)" if few else ""
    each = "each connection takes one"
    yield Check("open files", "warn" if few else "ok", f"at most {_amount(soft)} a process; {each}", remedy)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield Check("locked memory", "ok", f"at most {_amount(soft)} bytes a process (CUDA's pinned memory is beside that)")


def _amount(limit: int) -> str:
    return "any number of" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _runtime() -> Check:
    """Look at where sockets go; a login session's folder goes away with the session."""
    try:
        folder = runtime_folder()
    except ConfigError as error:
        return Check("sockets", "fail", error.message, "set XDG_RUNTIME_DIR to a folder of yours with a short path")
    if folder.parent == Path("/run/user") and _LINGER.parent.is_dir() and not (_LINGER / getpass.getuser()).exists():
        remedy = "loginctl enable-linger, so that services outlive your login, or use deploy/foveate.service"
        return Check("sockets", "warn", f"{folder} goes away when you log out, and services with it", remedy)
    return Check("sockets", "ok", f"in {folder}")


def _home() -> Check:
    folder = home()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        detail = f"{there} cannot be written to ({error.strerror})"
        return Check("services", "fail", detail, "set FOVEATE_HOME to a folder of yours")
    free = shutil.disk_usage(there).free
    detail = f"{free / _GIB:.1f} GiB free for {folder}"
    if free < _MIN_DISK:
        return Check("services", "warn", detail, "free some: archives with weights and logs need it")
    return Check("services", "ok", detail)


def _port(port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError as error:
            remedy = "foveate ps shows whether it is a service's; others are chosen with --port, or --set port=PORT"
            return Check("port", "warn", f"{port} cannot be listened on ({error.strerror})", remedy)
    return Check("port", "ok", f"{port} is free")


def _hub() -> Check:
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        httpx.head(url, timeout=_HUB_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        return Check("hub", "note", f"{url} is not reachable ({why}); name models by their folders")
    return Check("hub", "ok", f"{url} is reachable")
