"""The process that holds a vision encoder.

``python -m foveate.vision.process INSTANCE_DIR`` reads ``settings.json`` there, listens on ``vision.sock`` beside it
and hands out memory on ``arena.sock``. ``foveate vision`` calls :func:`serve` with addresses of its own.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from foveate.chat.assets import ModelFacts
from foveate.checkpoint.identity import identity
from foveate.checkpoint.place import load, pick_device, pick_dtype
from foveate.checkpoint.plan import check_encoder, first_look
from foveate.config import Settings
from foveate.errors import ConfigError, FoveateError
from foveate.kernels import ops
from foveate.kernels.memory import use_few_heaps
from foveate.telemetry import configure_logging
from foveate.transport.handle import Publisher
from foveate.transport.identity import device_id
from foveate.transport.publisher import SharedPublisher
from foveate.vision.encoder import VisionEncoder
from foveate.vision.guard import check_listen
from foveate.vision.service import Ready, VisionServer, measure

logger = logging.getLogger("foveate.vision")

NICENESS = 10
"""On a CPU: the kernel lets the engine go first, since somebody reads its tokens as they come."""


def serve(
    settings: Settings, *, listen: str, arena_address: str, ready: Ready | None = None, instance: Path | None = None
) -> None:
    """Load the encoder and serve it until SIGTERM or SIGINT. For the main thread.

    Args:
        settings: ``model.model`` is a folder already.
        listen: ``unix:PATH`` or ``HOST:PORT``.
        arena_address: path of the unix socket where memory is handed out to engines of this machine.
        ready: called when clients can connect, with the address that was listened on.
        instance: the folder of the service that this is a part of, with an engine of its own; None without one.

    Raises:
        ConfigError: a setting is impossible here, such as an address that is open to strangers.
        CheckpointError: the checkpoint cannot be served.
        Unavailable: the device failed.
    """
    use_few_heaps()
    check_listen(listen, settings.vision)
    device = pick_device(settings.vision.vision_device or settings.model.device)
    if device.type == "cpu":
        os.nice(NICENESS)
    publisher: SharedPublisher | None = None
    beside_engine = False
    if instance is not None:
        first_look(instance, device)
        beside_engine = device_id(device) == device_id(pick_device(settings.model.device))

    def make_publisher() -> SharedPublisher:
        nonlocal publisher
        publisher = SharedPublisher(
            settings.transport, f"vision-{secrets.token_hex(6)}", arena_address, device, shares_gpu=beside_engine
        )
        return publisher

    server = make_server(settings, device, make_publisher)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: server.stop())
        server.run(listen, ready)
    finally:
        if publisher is not None:
            publisher.close()


def make_server(settings: Settings, device: torch.device, make_publisher: Callable[[], Publisher]) -> VisionServer:
    """Load the encoder and put a service around it, whose largest step is known to fit.

    Args:
        settings: ``model.model`` is a folder already.
        device: where the encoder goes.
        make_publisher: called when the encoder has its memory: where it leaves embeddings.

    Raises:
        ConfigError: a setting is impossible here.
        CheckpointError: the checkpoint cannot be served.
    """
    if settings.model.model is None:
        raise ConfigError("model: the vision service needs a folder")
    started = time.monotonic()
    folder = Path(settings.model.model)
    dtype = pick_dtype(settings.vision.vision_dtype or settings.model.dtype, device)
    name = identity(folder, dummy=settings.model.load_format == "dummy")
    pictures = ModelFacts.from_folder(folder).pictures
    planned = check_encoder(settings)
    encoder = VisionEncoder(
        load(settings.model, device, dtype, "vision").vision,
        mean=pictures.norm_mean,
        std=pictures.norm_std,
        batch_size=settings.vision.vision_batch_size,
        cuda_graphs=settings.engine.cuda_graphs,
    )
    measure(encoder, pictures, settings.vision.vision_batch_size, planned)
    logger.info(
        "vision encoder loaded in %.1f s on %s as %s, attention: %s",
        time.monotonic() - started, device, dtype, ops.implementations(device)["varlen_attention"],
    )  # fmt: skip
    return VisionServer(encoder, make_publisher(), pictures, settings, name)


def main() -> None:
    """Serve until the parent ends it. Exit codes: 2 for impossible settings, 3 for a bad checkpoint, 1 for the rest."""
    instance = Path(sys.argv[1])
    settings = Settings.model_validate_json((instance / "settings.json").read_bytes())
    code = 0
    try:
        configure_logging(settings.logs, "vision")
        listen, arena_address = f"unix:{instance}/vision.sock", f"{instance}/arena.sock"
        serve(settings, listen=listen, arena_address=arena_address, instance=instance)
    except FoveateError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_status
    logging.shutdown()
    # A thread may be in the middle of a step of many seconds, and the interpreter would wait for it.
    os._exit(code)


if __name__ == "__main__":
    main()
