"""The engine's process, a child of the API process; it may have the vision encoder inside.

``python -m foveate.worker INSTANCE_DIR`` reads ``settings.json`` there and connects to the socket beside it.
"""

from __future__ import annotations

import logging
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zmq

from foveate.chat.assets import ModelFacts
from foveate.checkpoint.place import load, pick_device, pick_dtype
from foveate.config import EngineSettings, Settings
from foveate.engine.core import EngineCore
from foveate.engine.graphs import graphs_bytes
from foveate.engine.runner import ModelRunner
from foveate.engine.sampling import SamplingInputs, SamplingState, Variant, choose
from foveate.engine.scheduler import Scheduler
from foveate.engine.speculation import most_rows
from foveate.errors import CheckpointError, ConfigError
from foveate.kernels import ops
from foveate.models.qwen2 import Qwen2
from foveate.telemetry import configure_logging
from foveate.transport.local import LocalArena
from foveate.transport.sources import Sources
from foveate.vision.process import make_server

logger = logging.getLogger("foveate.worker")

_LONGEST = 32768
# Reading the weights takes as long as computing with about so many tokens.
_GPU_MIXED_TOKENS = 256
_SMALL_BYTES = 64 * 2**20
_ENCODER_SECONDS = 300.0


def build(settings: Settings, local: LocalArena | None, instance: Path) -> EngineCore:
    """Load the language model and put the engine around it.

    Args:
        settings: the whole service's.
        local: where an encoder in this process leaves its rows, if there is one.
        instance: the folder where an encoder of its own process says that it has its memory.

    Raises:
        ConfigError: a setting is impossible on this machine.
        CheckpointError: the checkpoint cannot be served.
    """
    device = pick_device(settings.model.device)
    dtype = pick_dtype(settings.model.dtype, device)
    ops.choose(settings.model.kernels)
    settings = _for_device(settings, device)
    facts = ModelFacts.from_folder(settings.model.model or "")
    max_seq_len = _max_seq_len(settings, facts)
    with ops.compiler(device) as compile_ahead:
        model = load(settings.model, device, dtype, part="language").language
        if ops.has_kernels(device):
            _compile(model, settings.engine, max_seq_len, compile_ahead)
    # Not earlier: until here there is enough to do that needs little memory.
    _await_encoder(settings, instance)
    reserved = _activation_bytes(model, settings.engine) if device.type == "cuda" else 0
    runner = ModelRunner(model, settings.engine, max_seq_len, reserved_bytes=reserved)
    capture_seconds = runner.capture()
    if capture_seconds:
        logger.info("CUDA graphs captured in %.1f s", capture_seconds)
    scheduler = Scheduler(
        settings.engine,
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_seq_len=runner.max_seq_len,
        depth=runner.depth,
    )
    if device.type == "cpu":
        torch.set_num_threads(settings.model.threads or _decode_threads(model))
    return EngineCore(
        runner,
        scheduler,
        Sources(device, local),
        eos_token_ids=frozenset(facts.eos_token_ids),
        max_seq_len=runner.max_seq_len,
    )


def _for_device(settings: Settings, device: torch.device) -> Settings:
    """Fill in the engine's settings that depend on the device."""
    if device.type == "cpu" or settings.engine.max_mixed_tokens is not None:
        return settings
    engine = settings.engine.model_copy(update={"max_mixed_tokens": _GPU_MIXED_TOKENS})
    return settings.model_copy(update={"engine": engine})


def _decode_threads(model: Qwen2) -> int:
    """Choose the decoder's threads: with weights that fit a core's cache, waking the others costs more than they do."""
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return 1 if size < _SMALL_BYTES else torch.get_num_threads()


def _max_seq_len(settings: Settings, facts: ModelFacts) -> int:
    trained = facts.max_position_embeddings
    wanted = settings.engine.max_seq_len or min(trained, _LONGEST)
    if wanted > trained:
        raise ConfigError(f"max_seq_len: got {wanted}, and the model was trained for {trained} tokens at most")
    return wanted


def _compile(model: Qwen2, settings: EngineSettings, max_seq_len: int, compile_ahead: ops.CompileAhead) -> None:
    """Have all kernels compiled that steps of any size launch, with a runner whose cache is as small as can be."""
    started = time.monotonic()
    small = settings.model_copy(update={"num_kv_blocks": 1, "max_seq_len": None})
    runner = ModelRunner(model, small, max_seq_len)

    def run() -> None:
        _largest_step(model, settings)()
        runner.run_all()

    number = compile_ahead(run)
    logger.info("%d kernels compiled in %.1f s", number, time.monotonic() - started)


def _activation_bytes(model: Qwen2, settings: EngineSettings) -> int:
    """Measure what the largest step needs beside the weights, and add what CUDA graphs take."""
    device = model.embed_tokens.weight.device
    run = _largest_step(model, settings)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    step = torch.cuda.max_memory_allocated(device) - before
    if not settings.cuda_graphs or not ops.has_kernels(device):
        return step
    num_tokens = settings.max_batch_size + settings.max_num_tokens
    return step + graphs_bytes(settings.max_batch_size, num_tokens, most_rows(settings))


def _largest_step(model: Qwen2, settings: EngineSettings) -> Callable[[], None]:
    """Return what runs a step of as many tokens as possible, and the most that sampling can have to do."""
    weight, config = model.embed_tokens.weight, model.config
    rows = max(settings.max_batch_size, most_rows(settings))
    heads, device = config.num_attention_heads, weight.device
    state = SamplingState(
        *(torch.zeros(rows, config.vocab_size, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32))
    )
    whole, ones = torch.arange(rows, device=device), torch.ones(rows, device=device)
    sampling = SamplingInputs(whole, whole, whole, whole.int(), *[ones] * 6)
    # The whole vocabulary in order, for every row.
    most = Variant(adjusts=True, draws=True, width=config.vocab_size)

    @torch.inference_mode()
    def run() -> None:
        x = torch.zeros(settings.max_num_tokens, config.hidden_size, dtype=weight.dtype, device=device)
        hidden = model.run(x, lambda _, qkv: qkv[:, : heads * config.head_dim].unflatten(1, (heads, -1)).contiguous())
        choose(model.logits(hidden[:rows]), sampling, state, most)

    return run


def _start_encoder(settings: Settings, instance: Path, local: LocalArena) -> None:
    """Serve the vision encoder from a thread of this process."""
    device = pick_device(settings.vision.vision_device or settings.model.device)
    server = make_server(settings, device, lambda: local)
    listen = f"unix:{instance}/vision.sock"
    threading.Thread(target=server.run, args=(listen,), name="vision", daemon=True).start()


def _await_encoder(settings: Settings, instance: Path) -> None:
    """Let an encoder that shares the GPU take its memory first: what is left is planned for keys and values."""
    shares = settings.vision.encoder == "own" and pick_device(settings.model.device).type == "cuda"
    deadline = time.monotonic() + _ENCODER_SECONDS
    while shares and not (instance / "arena.sock").exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"the vision service did not take its memory within {_ENCODER_SECONDS:.0f} s")
        time.sleep(0.05)


def main() -> None:
    """Serve until the parent ends it. Exit codes: 2 for impossible settings, 3 for a bad checkpoint."""
    instance = Path(sys.argv[1])
    settings = Settings.model_validate_json((instance / "settings.json").read_bytes())
    started = time.monotonic()
    try:
        configure_logging(settings.logs, "engine")
        local = LocalArena(f"local-{secrets.token_hex(6)}") if settings.vision.encoder == "engine" else None
        if local is not None:
            _start_encoder(settings, instance, local)
        core = build(settings, local, instance)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_status)
    logger.info(
        "model loaded in %.1f s on %s as %s, %d KV blocks of %d tokens as %s, operations: %s",
        time.monotonic() - started, core.runner.device, core.runner.dtype, core.runner.num_blocks,
        core.runner.block_size, core.runner.kv_cache.dtype, ops.implementations(core.runner.device),
    )  # fmt: skip
    socket = zmq.Context().socket(zmq.DEALER)
    socket.set_hwm(0)
    socket.connect(f"ipc://{instance}/engine.ipc")
    core.serve(socket)


if __name__ == "__main__":
    main()
