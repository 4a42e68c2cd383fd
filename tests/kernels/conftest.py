"""Has Triton's kernels interpreted where there is no GPU, and their tests left out where there is no Triton."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore_glob = ["test_triton_*.py"]
else:
    import kernels.interpreted  # noqa: F401 - before any test imports a kernel
