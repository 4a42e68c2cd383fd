"""Memory without a name: sealed files that live while somebody holds them, so that a crash leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

from foveate.errors import Unavailable

_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE of fcntl.h, which Python names since 3.13


def create(name: str, num_bytes: int) -> tuple[mmap.mmap, int]:
    """Make memory that only its maker can write.

    Args:
        name: shown in ``/proc``; need not be unique.
        num_bytes: its size, which never changes.

    Returns:
        The writable mapping, and a descriptor to give away, which only allows reading. The mapping ends with its last
        reference; the descriptor is the caller's to close.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        memory = mmap.mmap(fd, num_bytes)
        # A reader that could shrink the file would kill the writer with SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_SIZE)
        # Who holds a descriptor can open it again for writing through /proc; this seal, where known, stops that too.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FUTURE_WRITE)
        return memory, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def map_read_only(fd: int, num_bytes: int) -> mmap.mmap:
    """Map memory that another process made, for reading. The descriptor stays the caller's to close.

    Raises:
        Unavailable: it is not sealed, or has another size: reading it could kill this process.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise Unavailable(f"an arena's memory cannot be sealed: {error.strerror}") from error
    if seals & _FIXED_SIZE != _FIXED_SIZE:
        raise Unavailable("an arena's memory is not sealed against changes of its size")
    size = os.fstat(fd).st_size
    if size != num_bytes:
        raise Unavailable(f"an arena's memory has {size} bytes, and its layout says {num_bytes}")
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
