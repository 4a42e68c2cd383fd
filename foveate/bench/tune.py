"""Finding the fastest variants of the quantized products on this GPU, and keeping them for all servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from foveate.bench.sizes import language_config, products
from foveate.errors import ConfigError
from foveate.kernels.triton import tuning
from foveate.kernels.triton.tuning_search import tune


def tune_decoder(config: str, methods: Sequence[str], rows: Sequence[int], out: Path | None) -> Path:
    """Measure the variants of a decoder's products, and store the fastest ones; what is stored of others is kept.

    Args:
        config: a preset, or a folder with a config.json.
        methods: types of weights.
        rows: numbers of rows, of :data:`foveate.kernels.triton.tuning.BUCKETS`; all of them if there are none.
        out: the file; the one that servers on this GPU read if None.

    Returns:
        the file

    Raises:
        ConfigError: there is no such decoder, nothing is stored for such a number of rows, or the file's folder is not
            there.
    """
    sizes = list(rows) or list(tuning.BUCKETS)
    unknown = [str(size) for size in sizes if size not in tuning.BUCKETS]
    if unknown:
        raise ConfigError(f"--rows: got {', '.join(unknown)}, expected some of {', '.join(map(str, tuning.BUCKETS))}")
    decoder = language_config(config)
    device = torch.cuda.get_device_name()
    path = out or tuning.TUNED / f"{tuning.device_key(device)}.json"
    if not path.parent.is_dir():
        raise ConfigError(f"--out: got {str(path)!r}, expected a file in a folder that exists")
    for method in methods:
        what = list(products(decoder, method).values())
        with torch.inference_mode():
            found = tune(what, sizes)
        tuning.write_table(path, device, tuning.merge(tuning.read_table(path), found))
    return path
