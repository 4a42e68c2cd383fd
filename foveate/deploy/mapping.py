"""What the settings of a typical TensorRT-LLM deployment are called here, for the page about the settings."""

from __future__ import annotations

Row = tuple[str, str, str]
"""Names there, separated by spaces; names here, or nothing; what is to be said about it, such as why there is none."""

INFERENCE: tuple[Row, ...] = (
    ("engine_dir model_path", "model.model", "an engine directory of `foveate build`, or a published checkpoint"),
    ("tokenizer_dir", "", "because the model's folder has its tokenizer and template inside"),
    (
        "gpu_device_ids devices",
        "model.device vision.vision_device",
        "one GPU for each; more encoders: `foveate vision` and `vision.vision`",
    ),
    ("dtype", "model.dtype", ""),
    ("quantization use_weight_only", "model.quantization", "an engine directory says it itself"),
    ("max_batch_size", "engine.max_batch_size", "at most what the engine directory was built for"),
    ("max_input_len", "engine.max_input_len", "likewise; a longer prompt is refused, never cut"),
    ("max_prompt_embedding_table_size", "engine.max_image_tokens", "tokens of one prompt's pictures"),
    (
        "max_output_len max_new_tokens",
        "sampling.max_tokens",
        "where a request does not say; the limit is that of prompt and answer together: `engine.max_seq_len`",
    ),
    ("max_seq_len", "engine.max_seq_len", "likewise"),
    ("max_num_tokens", "engine.max_num_tokens", "likewise"),
    ("max_beam_width", "", "because there is no beam search; `n` samples several answers"),
    (
        "kv_cache_free_gpu_mem_fraction",
        "engine.kv_cache_free_mem_fraction",
        "of what is free when the model is loaded and its largest step was measured",
    ),
    ("max_tokens_in_paged_kv_cache", "engine.num_kv_blocks", "in blocks of `engine.block_size` tokens"),
    ("tokens_per_block", "engine.block_size", "the best for the device, if not set"),
    ("kv_cache_host_memory_bytes", "", "because what does not fit is computed again, not moved to the host's memory"),
    (
        "batch_scheduler_policy",
        "engine.scheduler_policy",
        "with the same words: `guaranteed_no_evict`, `max_utilization`",
    ),
    ("gpt_model_type batching_type", "", "because batches are always put together anew for each step"),
    ("enable_chunked_context", "", "because it is always on: `engine.max_num_tokens` is the largest chunk"),
    ("enable_kv_cache_reuse", "engine.enable_prefix_caching", "on by default; it tells pictures apart, too"),
    (
        "decoding_mode",
        "",
        "because it follows from each request: temperature 0 is greedy, otherwise `top_k`, `top_p` and `min_p` decide",
    ),
    ("exclude_input_in_output", "", "because an answer never has the prompt in it"),
    (
        "end_id",
        "",
        "because the checkpoint says it (`eos_token_id`); requests have `stop_token_ids`, `stop` and `ignore_eos`",
    ),
    ("pad_id", "", "because nothing is padded"),
    ("temperature", "sampling.temperature", ""),
    ("top_k", "sampling.top_k", ""),
    ("top_p", "sampling.top_p", ""),
    ("min_p", "sampling.min_p", ""),
    ("repetition_penalty", "sampling.repetition_penalty", ""),
    ("presence_penalty frequency_penalty", "", "because they are a request's matter: the fields of the same names"),
    ("random_seed", "", "because one for all requests would give all the same answer: `seed`"),
    ("streaming decoupled", "", "because it is a request's matter: `stream`"),
    ("vision.engine_path", "model.model", "the encoder's weights are in the same folder"),
    ("vision.device", "vision.vision_device", "that of the engine, if not set"),
    ("vision.dtype", "vision.vision_dtype", "that of the engine, if not set"),
    ("vision.batch_size", "vision.vision_batch_size", "in slices, from all waiting requests"),
    ("vision.max_concurrency", "vision.max_concurrency", "more wait; `vision.max_vision_queue` says how many may"),
    ("vision.shm_name", "", "because the memory has no name: two servers cannot meet, and a crash leaves nothing"),
    ("vision.shm_size", "transport.arena_bytes", "in units of `transport.arena_block_bytes`"),
    ("vision.max_slice_nums", "", "because the checkpoint says it (`preprocessor_config.json`)"),
)

SERVER: tuple[Row, ...] = (
    ("host", "http.host", "anything but a loopback address needs a key"),
    ("port http_port", "http.port", ""),
    (
        "rpc_port grpc_port",
        "vision.listen",
        "for `foveate vision`; a server's own encoder and engine are reached by sockets in a folder of its own",
    ),
    ("model_name", "model.served_model_name", ""),
    (
        "http_threads workers",
        "",
        "because one event loop serves all; `vision.preprocess_threads` and `model.threads` say who else computes",
    ),
    ("max_request_size", "http.max_body_bytes", "and of a single picture `media.max_image_bytes`"),
    ("max_queue_size", "engine.max_queue_size vision.max_vision_queue", "more are refused with status 503"),
    (
        "timeout request_timeout",
        "",
        "because an answer ends with its last token or with its client; what is waited for has times of its own: "
        "`media.media_total_seconds`, `vision.vision_wait_seconds`, `transport.arena_wait_seconds`",
    ),
    ("shutdown_timeout", "http.shutdown_seconds", ""),
    ("api_key auth_token", "http.api_key http.api_key_file", "several are possible"),
    ("cors_allow_origins", "http.cors_origins", ""),
    ("ssl_certfile", "http.tls_cert", ""),
    ("ssl_keyfile", "http.tls_key", ""),
    ("log_dir", "logs.log_dir", "`api.log`, `engine.log` and `vision.log`"),
    ("log_level", "logs.log_level", ""),
    ("log_max_size log_rotation", "logs.log_max_bytes", "by size"),
    ("log_backup_count", "logs.log_backups", ""),
    ("metrics metrics_port", "", "because `/metrics` is always there, on the same port and behind the same keys"),
    ("daemon pid_file", "", "because `foveate start` and `foveate stop` do that"),
)
