"""The process that holds the model: engine and vision encoder, as one child of the API process.

``python -m foveate.worker INSTANCE_DIR`` reads ``settings.json`` there and connects to the sockets beside it.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
import time
from pathlib import Path

import torch
import zmq
from rich.console import Console
from rich.progress import Progress

from foveate.chat.assets import ModelAssets
from foveate.checkpoint.load import dummy_model, load_model
from foveate.config import Settings
from foveate.engine.core import EngineCore
from foveate.engine.runner import ModelRunner
from foveate.engine.scheduler import Scheduler
from foveate.errors import CheckpointError, ConfigError
from foveate.kernels import ops
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import MiniCPMV
from foveate.telemetry import configure_logging
from foveate.transport.local import LocalArena
from foveate.vision.encoder import VisionEncoder
from foveate.vision.preprocess import Pixels
from foveate.vision.service import VisionService

logger = logging.getLogger("foveate.worker")

_LONGEST = 32768
_SMALL_BYTES = 64 * 2**20


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that is there.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name} is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn ``auto``, ``float32`` or ``bfloat16`` into a type."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def build(settings: Settings) -> tuple[EngineCore, VisionService]:
    """Load the model and put engine and encoder around it.

    Raises:
        ConfigError: a setting is impossible on this machine.
        CheckpointError: the checkpoint cannot be served.
    """
    if settings.model.model is None:
        raise ConfigError("model: the worker needs a folder")
    folder = Path(settings.model.model)
    device = pick_device(settings.model.device)
    dtype = pick_dtype(settings.model.dtype, device)
    assets = ModelAssets.from_folder(folder)
    model = _load(settings, folder, device, dtype)
    encoder = VisionEncoder(
        model.vision,
        mean=assets.pictures.norm_mean,
        std=assets.pictures.norm_std,
        batch_size=settings.vision.vision_batch_size,
    )
    reserved = _activation_bytes(model, encoder, settings, assets) if device.type == "cuda" else 0
    runner = ModelRunner(model.language, settings.engine, _max_seq_len(settings, assets), reserved_bytes=reserved)
    scheduler = Scheduler(settings.engine, num_blocks=runner.num_blocks, max_seq_len=runner.max_seq_len)
    arena = LocalArena(f"local-{id(runner):x}")
    core = EngineCore(
        runner, scheduler, arena, eos_token_ids=frozenset(assets.eos_token_ids), max_seq_len=runner.max_seq_len
    )
    if device.type == "cpu":
        torch.set_num_threads(settings.model.threads or _decode_threads(model))
    identity = hashlib.sha256(f"{folder.resolve()} {model.config} {dtype}".encode()).hexdigest()
    return core, VisionService(encoder, arena, assets.pictures, settings, identity)


def _load(settings: Settings, folder: Path, device: torch.device, dtype: torch.dtype) -> MiniCPMV:
    if settings.model.load_format == "dummy":
        return dummy_model(ModelConfig.from_folder(folder), device, dtype)
    # Shown where somebody is looking, and only while there is something to wait for.
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"Loading {folder.name}", total=None)
        return load_model(
            folder, device, dtype, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )


def _decode_threads(model: MiniCPMV) -> int:
    """Choose the decoder's threads: with weights that fit a core's cache, waking the others costs more than they do."""
    size = sum(parameter.nbytes for parameter in model.language.parameters())
    return 1 if size < _SMALL_BYTES else torch.get_num_threads()


def _max_seq_len(settings: Settings, assets: ModelAssets) -> int:
    trained = assets.max_position_embeddings
    wanted = settings.engine.max_seq_len or min(trained, _LONGEST)
    if wanted > trained:
        raise ConfigError(f"max_seq_len: got {wanted}, and the model was trained for {trained} tokens at most")
    return wanted


def _activation_bytes(model: MiniCPMV, encoder: VisionEncoder, settings: Settings, assets: ModelAssets) -> int:
    """Measure what the largest step of the decoder and of the encoder need beside the weights."""
    device = encoder.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    side = assets.pictures.scale_resolution // assets.pictures.patch_size
    # A slice may have a few patches more than the square, after rounding to whole ones.
    patches = torch.zeros((side + 1) * (side + 2), 3 * assets.pictures.patch_size**2, dtype=torch.uint8).numpy()
    pixels = Pixels(patches, ((side + 1, side + 2),))
    encoder.encode([pixels] * settings.vision.vision_batch_size)
    config = model.language.config
    x = torch.zeros(settings.engine.max_num_tokens, config.hidden_size, dtype=encoder.dtype, device=device)
    positions = torch.arange(len(x), device=device)
    with torch.inference_mode():
        model.language.logits(model.language(x, positions, lambda _layer, query, _key, _value: query)[-8:])
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def main() -> None:
    """Serve until the parent ends it. Exit codes: 2 for impossible settings, 3 for a bad checkpoint."""
    instance = Path(sys.argv[1])
    settings = Settings.model_validate_json((instance / "settings.json").read_bytes())
    configure_logging(settings.logs.log_level)
    started = time.monotonic()
    try:
        core, vision = build(settings)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_status)
    logger.info(
        "model loaded in %.1f s on %s as %s, %d KV blocks of %d tokens, operations: %s",
        time.monotonic() - started, core.runner.device, core.runner.dtype, core.runner.num_blocks,
        core.runner.block_size, ops.implementations(core.runner.device),
    )  # fmt: skip
    context = zmq.Context()

    def connected(name: str) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        socket.set_hwm(0)
        socket.connect(f"ipc://{instance}/{name}.ipc")
        return socket

    threading.Thread(target=vision.serve, args=(connected("vision"),), name="vision", daemon=True).start()
    core.serve(connected("engine"))


if __name__ == "__main__":
    main()
