"""The installed version."""

from __future__ import annotations


def version() -> str:
    """Return the installed package's version, or ``0+unknown`` in a tree that was never installed."""
    # Here, so that a command that does not ask for it starts without it.
    from importlib import metadata

    try:
        return metadata.version("foveate")
    except metadata.PackageNotFoundError:
        return "0+unknown"
