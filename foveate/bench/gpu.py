"""The commands ``foveate bench kernels`` and ``foveate tune``, as they are typed. Torch comes in when they run."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from foveate.errors import ConfigError

_METHODS = ("int8", "fp8", "int4", "bf16")


def kernels(
    *,
    config: str = "minicpm-v-2_6",
    quantization: str = "int8",
    rows: str = "1,8,16",
    prefill: str = "512,2048",
    context: int = 512,
    json: Path | None = None,
) -> int:
    """Measure every operation of the decoder on this GPU, as part of what the device allows.

    Args:
        config: A preset, or a folder with a config.json, whose sizes are measured.
        quantization: Weights of this type (int8, fp8, int4 or bf16).
        rows: Tokens of a decode step, one number after another.
        prefill: Tokens of a prompt, likewise.
        context: Keys that each token of a decode step attends to.
        json: Write the results to this file as well.
    """
    decode_rows, prefill_rows = _numbers("--rows", rows), _numbers("--prefill", prefill)
    methods = _methods(quantization)
    if len(methods) > 1:
        raise ConfigError(f"--quantization: got {quantization!r}, expected one of {', '.join(_METHODS)}")
    _need_gpu("foveate bench kernels")
    from foveate.bench.kernels import measure

    report = measure(config, methods[0], decode_rows, prefill_rows, context)
    if json is not None:
        json.write_text(json_format.dumps(report, indent=1) + "\n")
    return 0


def tune(
    *, config: str = "minicpm-v-2_6", quantization: str = "int8", rows: str | None = None, out: Path | None = None
) -> int:
    """Measure which variants of the decoder's products are the fastest on this GPU, and store them.

    What is stored for other shapes and numbers of rows is kept. It takes a few minutes; no server should use the GPU.

    Args:
        config: A preset, or a folder with a config.json, whose sizes are tuned.
        quantization: Types of weights (int8, fp8, int4, bf16), separated by commas.
        rows: Numbers of rows, of those under which variants are stored; all of them without it.
        out: The file to write; by default the one that servers on this GPU read.
    """
    methods, sizes = _methods(quantization), _numbers("--rows", rows) if rows else []
    _need_gpu("foveate tune")
    from foveate.bench.tune import tune_decoder

    print(f"written to {tune_decoder(config, methods, sizes, out)}")
    return 0


def _need_gpu(command: str) -> None:
    """Refuse to go on without a GPU and the compiler for it.

    Raises:
        ConfigError: one of them is missing.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"{command}: there is no CUDA device")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{command}: Triton is not installed ({error})") from error


def _methods(text: str) -> list[str]:
    methods = [part.strip() for part in text.split(",")]
    if unknown := [method for method in methods if method not in _METHODS]:
        raise ConfigError(f"--quantization: got {', '.join(unknown)}, expected some of {', '.join(_METHODS)}")
    return methods


def _numbers(flag: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{flag}: got {text!r}, expected integers such as 1,8")
    return [int(part) for part in parts]
