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
from foveate.checkpoint.activations import ROW_BYTES
from foveate.checkpoint.memory import MemoryPlan, check, describe
from foveate.checkpoint.place import load, pick_device, pick_dtype
from foveate.checkpoint.plan import first_look, longest_sequence, machine_of, plan_service
from foveate.config import EngineSettings, Settings
from foveate.engine.core import EngineCore
from foveate.engine.runner import ModelRunner
from foveate.engine.sampling import SamplingInputs, SamplingState, Variant, choose
from foveate.engine.scheduler import Scheduler
from foveate.errors import CheckpointError, ConfigError
from foveate.kernels import ops
from foveate.models.qwen2 import Qwen2
from foveate.telemetry import configure_logging
from foveate.transport.local import LocalArena
from foveate.transport.sources import Sources
from foveate.vision.process import make_server

logger = logging.getLogger("foveate.worker")

_SMALL_BYTES = 64 * 2**20
_ENCODER_SECONDS = 300.0


def build(
    settings: Settings,
    plan: MemoryPlan,
    local: LocalArena | None,
    instance: Path,
    compile_ahead: ops.CompileAhead,
    encoder_bytes: int = 0,
) -> EngineCore:
    """Load the language model and put the engine around it.

    Args:
        settings: the whole service's.
        plan: of the memory.
        local: where an encoder in this process leaves its rows, if there is one.
        instance: the folder where an encoder of its own process says that it has its memory.
        compile_ahead: compiles kernels before they are launched.
        encoder_bytes: what an encoder in this process needs of the device beside its weights.

    Raises:
        ConfigError: a setting is impossible on this machine.
        CheckpointError: the checkpoint cannot be served.
    """
    device = pick_device(settings.model.device)
    dtype = pick_dtype(settings.model.dtype, device)
    facts = ModelFacts.from_folder(settings.model.model or "")
    max_seq_len = longest_sequence(settings, facts.max_position_embeddings)
    model = load(settings.model, device, dtype, part="language").language
    if ops.has_kernels(device):
        _compile(model, settings.engine, max_seq_len, compile_ahead)
    # Not earlier: until here there is enough to do that needs little memory.
    _await_encoder(settings, instance)
    reserved = _reserved_bytes(model, settings.engine, plan) + encoder_bytes
    runner = ModelRunner(model, settings.engine, max_seq_len, reserved_bytes=reserved)
    capture_seconds = runner.capture()
    if capture_seconds:
        free = machine_of(device).free_bytes / 2**20
        logger.info("CUDA graphs captured in %.1f s, %.0f MiB are left free", capture_seconds, free)
    scheduler = Scheduler(
        settings.engine,
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_seq_len=runner.max_seq_len,
        mixed_tokens=settings.engine.mixed_tokens(on_gpu=device.type == "cuda"),
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


def _decode_threads(model: Qwen2) -> int:
    """Choose the decoder's threads: with weights that fit a core's cache, waking the others costs more than they do."""
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return 1 if size < _SMALL_BYTES else torch.get_num_threads()


def _compile(model: Qwen2, settings: EngineSettings, max_seq_len: int, compile_ahead: ops.CompileAhead) -> None:
    """Have all kernels compiled that steps of any size launch, with a runner whose cache is as small as can be."""
    started = time.monotonic()
    small = settings.model_copy(update={"num_kv_blocks": 1, "max_seq_len": None})
    runner = ModelRunner(model, small, max_seq_len)

    def run() -> None:
        with model.only_one_layer():
            _largest_step(model, settings)()
        runner.warm_up()

    number = compile_ahead(run)
    logger.info("%d kernels compiled in %.1f s", number, time.monotonic() - started)


def _reserved_bytes(model: Qwen2, settings: EngineSettings, plan: MemoryPlan) -> int:
    """Return what is still to be taken of the device's free memory, by anything but keys and values.

    On a GPU the encoder has its memory, and the largest step is measured. Elsewhere the plan must do: what the encoder
    has taken so far, nobody knows.
    """
    if not plan.machine.is_gpu:
        return plan.fixed_bytes - plan.weights["language"]
    step = _activation_bytes(model, settings)
    logger.info("the largest step takes %.1f MiB", step / 2**20)
    if step > plan.language_step:
        logger.warning("that is more than the %.1f MiB that were planned", plan.language_step / 2**20)
    return step + plan.graphs + ROW_BYTES


def _activation_bytes(model: Qwen2, settings: EngineSettings) -> int:
    """Measure what the largest step needs of a GPU beside the weights."""
    device = model.embed_tokens.weight.device
    run = _largest_step(model, settings)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _largest_step(model: Qwen2, settings: EngineSettings) -> Callable[[], None]:
    """Return what runs a step of as many tokens as possible, and the most that sampling can have to do."""
    weight, config = model.embed_tokens.weight, model.config
    rows = max(settings.max_batch_size, settings.verified_rows())
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


def _plan(settings: Settings, instance: Path) -> MemoryPlan:
    """Plan the device's memory, and end here if it cannot be enough."""
    device = pick_device(settings.model.device)
    plan = plan_service(settings, device, first_look(instance, device))
    check(plan)
    logger.info("planned memory: %s", describe(plan))
    return plan


def _start_encoder(settings: Settings, instance: Path, local: LocalArena) -> int:
    """Serve the vision encoder from a thread of this process, and return the bytes that its largest step needs."""
    device = pick_device(settings.vision.vision_device or settings.model.device)
    server = make_server(settings, device, lambda: local)
    listen = f"unix:{instance}/vision.sock"
    threading.Thread(target=server.run, args=(listen,), name="vision", daemon=True).start()
    return server.encoder.step_bytes


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
        ops.choose(settings.model.kernels)
        with ops.compiler(pick_device(settings.model.device)) as compile_ahead:
            plan = _plan(settings, instance)
            local = LocalArena(f"local-{secrets.token_hex(6)}") if settings.vision.encoder == "engine" else None
            encoder_bytes = _start_encoder(settings, instance, local) if local is not None else 0
            core = build(settings, plan, local, instance, compile_ahead, encoder_bytes)
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
