"""The commands that make, describe and compare models' folders: split, build, inspect, verify.

What needs torch is imported when a command is run that computes with tensors.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import Parameter
from pydantic import ByteSize, TypeAdapter, ValidationError

from foveate.chat.assets import ModelFacts
from foveate.checkpoint.limits import (
    MAX_BATCH_SIZE,
    MAX_IMAGE_TOKENS,
    MAX_INPUT_LEN,
    MAX_NUM_TOKENS,
    MAX_SEQ_LEN,
    choose_limits,
)
from foveate.config import ModelSettings
from foveate.deploy.bars import byte_bar, step_bar
from foveate.deploy.resolve import resolve_model
from foveate.errors import CheckpointError, ConfigError
from foveate.quantization.scheme import GROUP_SIZE

Model = Annotated[
    str | None, Parameter(help="A folder, or a name on the Hugging Face hub; without one, the demo model.")
]
Output = Annotated[Path, Parameter(help="The folder to make; it is there as a whole or not at all.")]
Force = Annotated[bool, Parameter(negative=(), help="Replace what this command has made there before.")]
Json = Annotated[bool, Parameter(name="--json", negative=(), help="Print JSON instead of tables.")]


def split(
    model: Model = None,
    *,
    output: Output,
    shard_size: Annotated[str, Parameter(help="Most bytes of a file, such as 4GiB or 500MB.")] = "4GiB",
    force: Force = False,
) -> int:
    """Split a published checkpoint into its language model and its vision part.

    OUTPUT/language is a plain Qwen2 checkpoint, which transformers and other engines load unchanged. OUTPUT/vision
    holds encoder and resampler under their published names.
    """
    shard_bytes = parse_bytes("--shard-size", shard_size)
    folder = _folder(model)
    from foveate.checkpoint.split import split as split_checkpoint

    started = time.monotonic()
    with byte_bar(f"Splitting {folder.name}") as progress:
        split_checkpoint(folder, output, shard_bytes=shard_bytes, force=force, progress=progress)
    _say_written(output, started)
    return 0


def build(
    model: Model = None,
    *,
    output: Output,
    quantization: Annotated[
        Literal["auto", "none", "int8", "fp8", "int4"],
        Parameter(help="How to store the language model's linear layers; auto is as the checkpoint has them."),
    ] = "auto",
    group_size: Annotated[int, Parameter(help="Columns that share a scale in int4.")] = GROUP_SIZE,
    quantize_vision: Annotated[bool, Parameter(negative=(), help="Quantize the vision encoder too.")] = False,
    dtype: Annotated[
        Literal["bfloat16", "float32"], Parameter(help="Type of everything that is not quantized.")
    ] = "bfloat16",
    max_batch_size: Annotated[
        int | None, Parameter(help=f"Sequences that are decoded together. [default: {MAX_BATCH_SIZE}]")
    ] = None,
    max_input_len: Annotated[
        int | None, Parameter(help=f"Tokens of the longest prompt, pictures included. [default: {MAX_INPUT_LEN}]")
    ] = None,
    max_seq_len: Annotated[
        int | None, Parameter(help=f"Tokens of the longest prompt and answer together. [default: {MAX_SEQ_LEN}]")
    ] = None,
    max_num_tokens: Annotated[int | None, Parameter(help=f"Tokens in one step. [default: {MAX_NUM_TOKENS}]")] = None,
    max_image_tokens: Annotated[
        int | None, Parameter(help=f"Tokens of the pictures in one prompt. [default: {MAX_IMAGE_TOKENS}]")
    ] = None,
    device: Annotated[str, Parameter(help="Where weights are packed: auto, cpu, cuda or cuda:N.")] = "auto",
    load_on_cpu: Annotated[bool, Parameter(negative=(), help="The same as --device cpu: needs no GPU.")] = False,
    load_format: Annotated[
        Literal["auto", "dummy"], Parameter(help="dummy makes random weights up, for measuring.")
    ] = "auto",
    config: Annotated[
        str | None, Parameter(help="With --load-format dummy: a preset (minicpm-v-2_6) or a folder with a config.json.")
    ] = None,
    force: Force = False,
) -> int:
    """Build an engine directory: weights fused and packed as the engine reads them, with limits, hashes and error.

    Defaults of the limits are clipped to what the model was trained for. The server's settings may ask for less than
    the limits, not for more.
    """
    if config is not None and load_format != "dummy":
        raise ConfigError("--config: only goes with --load-format dummy; a real model brings its own configuration")
    if load_on_cpu and device not in ("auto", "cpu"):
        raise ConfigError(f"--load-on-cpu: does not go with --device {device}")
    if group_size < 1:
        raise ConfigError(f"--group-size: got {group_size}, expected a multiple of 32")
    folder = resolve_model(ModelSettings(model=model, load_format=load_format, config=config)).folder
    facts = ModelFacts.from_folder(folder)
    limits = choose_limits(
        trained=facts.max_position_embeddings, query_num=facts.pictures.query_num, max_batch_size=max_batch_size,
        max_input_len=max_input_len, max_seq_len=max_seq_len, max_num_tokens=max_num_tokens,
        max_image_tokens=max_image_tokens,
    )  # fmt: skip
    settings = ModelSettings(
        quantization=quantization, quantize_vision=quantize_vision, quantization_group_size=group_size
    )
    from foveate.checkpoint.build import Recipe
    from foveate.checkpoint.build import build as build_engine
    from foveate.checkpoint.place import pick_device, pick_quantization
    from foveate.deploy.samples import text_prompts

    recipe = Recipe(
        quantization=pick_quantization(settings, folder), dtype=dtype, limits=limits,
        device=pick_device("cpu" if load_on_cpu else device), dummy=load_format == "dummy",
        prompts=text_prompts(folder),
    )  # fmt: skip
    started = time.monotonic()
    with byte_bar(f"Building {folder.name}") as progress:
        manifest = build_engine(folder, output, recipe, force=force, progress=progress)
    _say_written(output, started)
    for name, value in (manifest.error or {}).items():
        print(f"  {name.replace('_', ' ')}: {value:g}")
    return 0


def inspect(
    model: Model = None,
    *,
    gpu_memory: Annotated[str | None, Parameter(help="Plan for a GPU of this size too, such as 24GiB.")] = None,
    hashes: Annotated[bool, Parameter(help="Read all of an engine directory and compare it with its hashes.")] = True,
    json: Json = False,
) -> int:
    """Say what is in a folder: a published checkpoint, an engine directory, or a part that was split off.

    Shown are its architecture, parameters, quantization and limits, and what it takes of this machine's memory. An
    engine directory's files are compared with their hashes; exit code 3 if one is another.
    """
    from foveate.checkpoint.inspect import inspect as inspect_folder
    from foveate.checkpoint.memory import gpu_of, this_machine

    machines = this_machine()
    if gpu_memory is not None:
        machines.append(gpu_of(parse_bytes("--gpu-memory", gpu_memory)))
    folder = _folder(model)
    with byte_bar(f"Reading {folder.name}") as progress:
        report = inspect_folder(folder, machines, with_hashes=hashes, progress=progress)
    if json:
        _print_json(report)
    else:
        from foveate.deploy.tables import show_report

        show_report(report)
    if report.hashes:
        raise CheckpointError("\n".join(report.hashes))
    return 0


def verify(
    model: Model = None,
    *,
    reference: Annotated[str, Parameter(help="The checkpoint that counts as right: a folder, or a name on the hub.")],
    device: Annotated[str, Parameter(help="Where both run, one after the other: auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Parameter(help="What the reference computes in; auto is bfloat16 on a GPU and float32 on a CPU."),
    ] = "auto",
    trust_remote_code: Annotated[
        bool, Parameter(negative=(), help="Run the reference with transformers and its own code, which is executed.")
    ] = False,
    json: Json = False,
) -> int:
    """Compare a model with its reference, stage by stage, on built-in pictures and prompts.

    Prompts and pixels must be the same; of vision features, the resampler's output, logits and the tokens of greedy
    answers the differences are printed with their bounds, which depend on types and quantization. Exit code 1 if one is
    outside.
    """
    from foveate.checkpoint.compare import compare_folders
    from foveate.deploy.samples import sample_set
    from foveate.deploy.tables import show_stages

    folder, exact = _folder(model), _folder(reference)
    stages = compare_folders(
        folder, exact, sample_set, step_bar, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if json:
        _print_json(stages)
    else:
        show_stages(f"{folder} against {exact}", stages)
    return 0 if all(stage.ok for stage in stages) else 1


def parse_bytes(flag: str, text: str) -> int:
    """Read a number of bytes with a unit: 24GiB, 500MB, 1073741824.

    Raises:
        ConfigError: it is none, or not positive.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise ConfigError(f"{flag}: got {text!r}, expected a number of bytes, such as 4GiB") from error
    if size < 1:
        raise ConfigError(f"{flag}: got {text!r}, expected at least one byte")
    return size


def _folder(model: str | None) -> Path:
    return resolve_model(ModelSettings(model=model)).folder


def _say_written(output: Path, started: float) -> None:
    seconds = time.monotonic() - started
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"Wrote {output}: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s)")


def _print_json(content: object) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n")
