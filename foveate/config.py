"""Every setting, defined once: flags, environment, YAML and the documentation come from here.

Settings are frozen once resolved. Sections follow the parts of the system, and a field's name is its key in YAML, its
flag (``max_batch_size`` is ``--max-batch-size``) and, in upper case behind ``FOVEATE_``, its environment variable.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

DType = Literal["auto", "float32", "bfloat16"]
Kernels = Literal["auto", "reference"]
CacheDType = Literal["auto", "fp8"]
LogLevel = Literal["debug", "info", "warning", "error"]
PositiveInt = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
MOST_VERIFIED_ROWS = 64
"""Of a step with guesses, newest tokens included: a step with more costs clearly more than one with a few."""
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#]+")


def _listed(value: object) -> object:
    """Take one text for a list of it: ``api_key: KEY`` in YAML."""
    return [value] if isinstance(value, str) else value


Strings = Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
# What is not plain text says so in its schema: relative paths mean something only to who wrote them, and secrets are
# shown to nobody.
OptionalPath = Annotated[str | None, Field(json_schema_extra={"format": "path"})]
PathOrName = Annotated[str | None, Field(json_schema_extra={"format": "path-or-name"})]
Address = Annotated[str | None, Field(json_schema_extra={"format": "address"})]
Addresses = Annotated[Strings, Field(json_schema_extra={"format": "address"})]
Secret = Annotated[str | None, Field(json_schema_extra={"writeOnly": True})]
Secrets = Annotated[Strings, Field(json_schema_extra={"writeOnly": True})]


class Section(BaseModel):
    """Base of all sections: frozen, and strict about unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSettings(Section):
    """Which model, and in what form."""

    model: PathOrName = None
    """A checkpoint's folder or its name on the Hugging Face hub. Without one, the built-in demo model."""
    served_model_name: str | None = None
    """The name that requests use. Without one, the last part of the model's path, or foveate-demo."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy makes random weights of the right shapes, for measuring."""
    config: PathOrName = None
    """With --load-format dummy: the size to imitate, a preset (minicpm-v-2_6) or a folder with a config.json."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto takes the first GPU there is."""
    dtype: DType = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    quantization: Literal["auto", "none", "int8", "fp8", "int4"] = "auto"
    """How the language model's weights are stored. auto is what the folder has; anything else is done while loading."""
    quantize_vision: bool = False
    """Quantize the vision encoder too."""
    quantization_group_size: PositiveInt = 128
    """Columns that share a scale in int4."""
    kernels: Kernels = "auto"
    """reference runs plain PyTorch where auto takes faster kernels of our own."""
    threads: NotNegative = 0
    """CPU threads of the engine's process; 0 takes all cores."""

    @model_validator(mode="after")
    def _possible(self) -> ModelSettings:
        if self.config is not None and self.load_format != "dummy":
            raise ValueError("config: only goes with load_format dummy; a real one brings its own configuration")
        return self


class EngineSettings(Section):
    """Limits and policy of the language model's engine."""

    max_batch_size: PositiveInt = 8
    """Sequences that are decoded together."""
    max_input_len: PositiveInt | None = None
    """Longest prompt in tokens, pictures included. Without one, max_seq_len - 1."""
    max_image_tokens: PositiveInt | None = None
    """Most tokens of a prompt that may be of pictures. Without one, all of them."""
    max_seq_len: PositiveInt | None = None
    """Longest prompt and answer together. Without one, what the model was trained for, at most 32768."""
    max_num_tokens: PositiveInt = 2048
    """Tokens in one step: longer prompts are prefilled in chunks."""
    max_mixed_tokens: PositiveInt | None = None
    """Tokens in a step where answers go on beside prompts, a full batch's included: fewer keep the answers' pace, more
    begin new ones sooner. Without one, on a GPU 256 or twice the batch if that is more, on a CPU max_num_tokens."""
    kv_cache_free_mem_fraction: Fraction = 0.9
    """Share of what is free once weights, activations, CUDA graphs and the encoder have theirs, for keys and values; at
    most what 16 full batches need (on a CPU: 4, and 4 GiB)."""
    num_kv_blocks: PositiveInt | None = None
    """Exact number of KV blocks instead of a share of the memory."""
    kv_cache_dtype: CacheDType = "auto"
    """Type of keys and values: auto is the model's; fp8 (8-bit floats) holds twice as many tokens of a bfloat16 model,
    less exactly."""
    block_size: PositiveInt | None = None
    """Tokens in a KV block; prompts that begin alike share whole blocks. Without one, 64 on a GPU and 16 on a CPU."""
    scheduler_policy: Literal["guaranteed_no_evict", "max_utilization"] = "guaranteed_no_evict"
    """Admit only what can surely finish, or fill the memory and recompute what was preempted."""
    enable_prefix_caching: bool = True
    """Reuse keys and values of prompts that begin alike, pictures included."""
    cuda_graphs: bool = True
    """Replay decode steps, short prompts' and the vision encoder's as CUDA graphs, where there is a GPU."""
    speculation: Literal["none", "prompt_lookup"] = "none"
    """prompt_lookup guesses tokens from earlier text and verifies several in one step: answers that repeat their prompt
    come faster, and stay the same."""
    speculative_tokens: PositiveInt = 7
    """Most tokens that are guessed at a time, for each sequence; all together at most 63."""
    max_queue_size: PositiveInt = 256
    """Sequences that may wait; more are refused with status 503."""

    def tokens_per_block(self, *, on_gpu: bool) -> int:
        """Return ``block_size``, or the best one for the device: attention on a GPU reads whole blocks at once."""
        return self.block_size or (64 if on_gpu else 16)

    def mixed_tokens(self, *, on_gpu: bool) -> int | None:
        """Return ``max_mixed_tokens``, or the best number for the device; None: as many as in any step.

        Reading a model's weights takes a GPU as long as computing with about so many tokens.
        """
        return self.max_mixed_tokens or (max(256, 2 * self.max_batch_size) if on_gpu else None)

    def verified_rows(self) -> int:
        """Return the most tokens of a step with guesses, newest ones included; 0 without speculation."""
        if self.speculation == "none":
            return 0
        return min(MOST_VERIFIED_ROWS, self.max_num_tokens, self.max_batch_size * (1 + self.speculative_tokens))

    @model_validator(mode="after")
    def _possible(self) -> EngineSettings:
        if self.max_input_len and self.max_seq_len and self.max_input_len >= self.max_seq_len:
            raise ValueError(
                f"max_input_len ({self.max_input_len}) must be less than max_seq_len ({self.max_seq_len}): "
                "an answer needs at least one token"
            )
        if self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens ({self.max_num_tokens}) must be at least max_batch_size ({self.max_batch_size}): "
                "every running sequence needs one token a step"
            )
        return self


class VisionSettings(Section):
    """The vision encoder, and where others are."""

    encoder: Literal["own", "engine", "none"] = "own"
    """Where this server's own encoder runs: in a process of its own, inside the engine's, or nowhere."""
    vision: Addresses = []
    """Another vision service to use too: unix:PATH or HOST:PORT (may be repeated)."""
    listen: Address = None
    """Where the vision service listens: unix:PATH or HOST:PORT. An address that others reach needs a token or TLS."""
    vision_token: Secret = None
    """Shared secret of vision services over TCP and those who use them."""
    vision_token_file: OptionalPath = None
    """File with that secret, instead."""
    vision_tls_cert: OptionalPath = None
    """This side's certificate (PEM file) for mutual TLS over TCP."""
    vision_tls_key: OptionalPath = None
    """The certificate's private key (PEM file)."""
    vision_tls_ca: OptionalPath = None
    """Certificate authority that the other side's certificate must come from (PEM file)."""
    vision_device: str | None = None
    """The encoder's device, if it is not the engine's: cpu, cuda or cuda:N."""
    vision_dtype: DType | None = None
    """The encoder's number type, if it is not the engine's."""
    vision_batch_size: PositiveInt = 16
    """Slices that are encoded in one step."""
    max_concurrency: PositiveInt = 64
    """Requests that an encoder works on at once; more wait in its queue."""
    embedding_cache_bytes: NotNegative = 256 * 2**20
    """Memory for the embeddings of pictures seen before (least recently used go first)."""
    max_vision_queue: PositiveInt = 256
    """Pictures that may wait for an encoder; more are refused with status 503."""
    preprocess_threads: NotNegative = 0
    """Threads that decode and resize pictures; 0 takes one a core."""
    vision_wait_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long a picture waits for an encoder that is being restarted, before it is refused with status 503."""

    @model_validator(mode="after")
    def _possible(self) -> VisionSettings:
        if self.vision_token is not None and self.vision_token_file is not None:
            raise ValueError("vision_token, vision_token_file: there is one secret; give one of them")
        return self


class TransportSettings(Section):
    """How embeddings get from vision encoders to the engine."""

    transport: Literal["auto", "arena", "cuda-ipc", "inline"] = "auto"
    """Shared memory, one GPU's memory, or bytes on the wire; auto takes the fastest that both sides have."""
    arena_bytes: PositiveInt = 256 * 2**20
    """Memory in which an encoder leaves embeddings for engines."""
    arena_block_bytes: PositiveInt = 64 * 2**10
    """The arena's unit: a multiple of 4096."""
    arena_wait_seconds: Annotated[float, Field(ge=0)] = 2.0
    """How long a picture waits for room in the arena, before it is refused with status 503."""
    lease_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long an engine may take to read a picture's embeddings."""

    @model_validator(mode="after")
    def _possible(self) -> TransportSettings:
        if self.arena_block_bytes % 4096:
            raise ValueError(f"arena_block_bytes ({self.arena_block_bytes}) must be a multiple of 4096")
        if self.arena_bytes < self.arena_block_bytes:
            raise ValueError(
                f"arena_bytes ({self.arena_bytes}) must be at least arena_block_bytes ({self.arena_block_bytes})"
            )
        return self


class HttpSettings(Section):
    """The HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but a loopback address needs --api-key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9997
    """Port to listen on; 0 takes a free one and prints it."""
    api_key: Secrets = []
    """Clients must send this key as a bearer token (may be repeated: any of the keys is good)."""
    api_key_file: OptionalPath = None
    """File with such keys, one a line; empty lines and those that begin with # do not count."""
    cors_origins: Strings = []
    """A web site whose pages may use this server from a browser, such as https://chat.example.com, or * for every one
    (may be repeated)."""
    tls_cert: OptionalPath = None
    """The server's certificate with those that it depends on (PEM file): HTTPS instead of HTTP."""
    tls_key: OptionalPath = None
    """The certificate's private key (PEM file, not encrypted)."""
    ui: bool = False
    """Serve a web chat at /ui too, from a process of its own. It needs pip install 'foveate[ui]'."""
    max_body_bytes: PositiveInt = 64 * 2**20
    """Largest request body."""
    shutdown_seconds: Annotated[float, Field(ge=0)] = 10.0
    """How long running requests may take to finish after Ctrl-C."""

    @field_validator("api_key")
    @classmethod
    def _usable(cls, keys: list[str]) -> list[str]:
        for key in keys:
            if not key:
                raise ValueError("got an empty key; leave it out to serve without one")
            if key.strip() != key or not key.isprintable():
                raise ValueError("got a key that no header can carry: no spaces around it, no line breaks")
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"got {origin!r}, expected * or an origin as browsers send it, such as https://chat.example.com "
                    "(in small letters, nothing behind the host and port)"
                )
        return origins

    @model_validator(mode="after")
    def _possible(self) -> HttpSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert, tls_key: one is of no use without the other")
        if "*" in self.cors_origins and not self.api_key and self.api_key_file is None:
            raise ValueError(
                "cors_origins: got *, which lets every web page use this server: clients must show a key then; "
                "set one with api_key or api_key_file"
            )
        return self


class MediaSettings(Section):
    """What the server fetches, and how much of it."""

    allow_private_media: bool = False
    """Fetch pictures from private and link-local addresses too."""
    allowed_media_hosts: Strings = []
    """Hosts whose pictures are fetched although their addresses are private."""
    allowed_media_path: OptionalPath = None
    """Folder whose pictures may be named by file: URLs."""
    media_connect_seconds: Annotated[float, Field(gt=0)] = 5.0
    """How long connecting to a picture's host may take."""
    media_total_seconds: Annotated[float, Field(gt=0)] = 20.0
    """How long fetching a picture may take in all."""
    max_image_bytes: PositiveInt = 32 * 2**20
    """Largest picture file."""
    max_image_pixels: PositiveInt = 64_000_000
    """Largest picture in pixels (width times height)."""
    max_images_per_request: PositiveInt = 64
    """Pictures in one request."""


class LogSettings(Section):
    """What is written down, and where."""

    log_level: LogLevel = "info"
    """Least severity that is written; info has a line for every request."""
    log_format: Literal["text", "json"] = "text"
    """A line of text or an object of JSON for each event."""
    log_stderr: bool = True
    """Write to standard error."""
    log_dir: OptionalPath = None
    """Folder for api.log, engine.log and vision.log too. One for each server: the files have one writer."""
    log_max_bytes: PositiveInt = 32 * 2**20
    """Size at which a file of --log-dir is put aside as api.log.1 and a new one is begun."""
    log_backups: PositiveInt = 5
    """Files that are kept aside; older ones are deleted."""

    @model_validator(mode="after")
    def _possible(self) -> LogSettings:
        if not self.log_stderr and self.log_dir is None:
            raise ValueError("log_stderr: without it and without log_dir nothing would be written down")
        return self


class SamplingSettings(Section):
    """How tokens are chosen when a request does not say. What is not set is as the checkpoint says."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Divides the logits; 0 is exactly greedy."""
    top_p: Fraction | None = None
    """Keep the likeliest tokens that have this share of the probability."""
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Keep so many of the likeliest tokens; 0 and -1 keep all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Keep tokens that are at least this share as likely as the likeliest."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Divides the positive logits of tokens that the answer has already, and multiplies the negative ones."""
    max_tokens: PositiveInt | None = None
    """Longest answer. Without one, all that fits behind the prompt."""


class Settings(Section):
    """The whole service."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    vision: VisionSettings = VisionSettings()
    transport: TransportSettings = TransportSettings()
    http: HttpSettings = HttpSettings()
    media: MediaSettings = MediaSettings()
    logs: LogSettings = LogSettings()
    sampling: SamplingSettings = SamplingSettings()
