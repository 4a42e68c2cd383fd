// What the dashboard shows, and how each number comes from /metrics.

import { histogram, increase, quantile, ratio, series, total } from "./metrics.js";

const TTFT = "foveate_time_to_first_token_seconds";
const TPOT = "foveate_time_per_output_token_seconds";
const STAGES = "foveate_stage_seconds";
const QUANTILES = [["p50", 0.5], ["p95", 0.95], ["p99", 0.99]];
const ARENAS = ["arena", "cuda_ipc"];

const percentiles = (key) => QUANTILES.map(([label]) => ({ key: `${key}_${label}`, label }));

// A line that is aside has a unit of its own, and is in the legend only. `lines` may be a function of all points, where their number is the machine's.
export const CHARTS = [
  { id: "requests", title: "Requests", unit: "number", max: 4, help: "chat completions under way; sequences that wait for a place in the batch", lines: [{ key: "running", label: "under way" }, { key: "waiting", label: "queued" }] },
  { id: "tokens", title: "Tokens per second", unit: "number", help: "by the engine, over the last 10 seconds", lines: [{ key: "output_rate", label: "output" }, { key: "prompt_rate", label: "prompt" }] },
  { id: "ttft", title: "Time to first token", unit: "seconds", help: "of requests whose answer ended within the last minute", lines: percentiles("ttft") },
  { id: "tpot", title: "Time per output token", unit: "seconds", help: "of requests whose answer ended within the last minute", lines: percentiles("tpot") },
  { id: "batch", title: "Batch size", unit: "number", max: 4, help: "sequences in the batch; tokens sampled in a step, over the last 10 seconds", lines: [{ key: "batch", label: "sequences" }, { key: "step_tokens", label: "tokens a step" }] },
  { id: "kv", title: "KV cache", unit: "ratio", help: "part of the KV blocks that sequences hold; part of the prompt tokens that were found in it, over the last minute", lines: [{ key: "kv_used", label: "used" }, { key: "prefix_hits", label: "prefix hits" }] },
  { id: "vision", title: "Vision batches", unit: "number", max: 4, help: "slices in a step of the encoder, over the last 10 seconds; slices that wait", lines: [{ key: "slices", label: "slices a step" }, { key: "slices_waiting", label: "waiting" }] },
  { id: "encoder", title: "Encoder, a picture", unit: "seconds", help: "of the last minute", lines: percentiles("encode") },
  { id: "pictures", title: "Pictures", unit: "ratio", help: "part of the pictures that the embedding cache had, over the last minute", lines: [{ key: "cache_hits", label: "cache hits" }, { key: "picture_rate", label: "a second", unit: "number", aside: true }] },
  { id: "arena", title: "Arena", unit: "ratio", help: "part of the memory between encoder and engine that is in use", lines: [{ key: "arena", label: "used" }, { key: "arena_bytes", label: "size", unit: "bytes", aside: true }] },
  { id: "use", title: "Processors", unit: "number", help: "how busy the GPUs are; without any, how many cores each process uses", lines: (point) => machine(point, "use", "gpu_use", "ratio") },
  { id: "memory", title: "Memory", unit: "bytes", help: "of the GPUs; without any, of each process", lines: (point) => machine(point, "memory", "gpu_memory", "bytes") },
];

// GPUs where there are any; elsewhere the service's own processes.
function machine(point, own, gpu) {
  const keys = Object.keys(point ?? {});
  const found = keys.filter((key) => key.startsWith(`${gpu}:`));
  return (found.length ? found : keys.filter((key) => key.startsWith(`${own}:`))).map((key) => ({ key, label: key.slice(key.indexOf(":") + 1) }));
}

export const TILES = [
  { key: "running", title: "under way", unit: "number" },
  { key: "waiting", title: "queued", unit: "number" },
  { key: "output_rate", title: "output tokens/s", unit: "number" },
  { key: "ttft_p95", title: "to first token, p95", unit: "seconds" },
  { key: "tpot_p95", title: "per token, p95", unit: "seconds" },
  { key: "kv_used", title: "KV cache used", unit: "ratio" },
  { key: "answered", title: "answered", unit: "number" },
  { key: "errors", title: "errors", unit: "number" },
];

// The rows of the table of times: [label, histogram, stage].
export function timed(now) {
  const stages = new Set(series(now, `${STAGES}_count`).map((one) => one.labels.stage));
  const words = { picture_decode: "decode picture", write: "write rows", read: "read rows", wait: "wait for engine", queue: "wait for encoder" };
  return [
    ["time to first token", TTFT], ["time per output token", TPOT], ["whole request", "foveate_request_seconds"],
    ...[...stages].map((stage) => [words[stage] ?? stage, STAGES, stage]),
  ];
}

export function times(now, then, [, name, stage]) {
  return histogram(now, then, name, (labels) => stage === undefined || labels.stage === stage);
}

// One point of every line. `recent` is a sample of some seconds ago, `minute` of a minute ago; each is null at first.
export function point(sample, recent, minute) {
  const { families: now, time } = sample;
  const per = (name, wanted) => (recent ? over(increase(now, recent.families, name, wanted), (time - recent.time) / 1000) : null);
  const grew = (name, then) => (then ? increase(now, then.families, name) : null);
  const values = {
    time,
    running: total(now, "foveate_requests_running"),
    waiting: total(now, "foveate_engine_num_waiting"),
    output_rate: per("foveate_engine_generated_tokens_total"),
    prompt_rate: per("foveate_engine_prompt_tokens_total"),
    batch: total(now, "foveate_engine_num_running"),
    step_tokens: ratio(grew("foveate_engine_generated_tokens_total", recent), grew("foveate_engine_steps_total", recent)),
    kv_used: used(total(now, "foveate_engine_free_blocks"), total(now, "foveate_engine_total_blocks")),
    prefix_hits: ratio(grew("foveate_engine_cached_tokens_total", minute), grew("foveate_engine_prompt_tokens_total", minute)),
    slices: ratio(grew("foveate_vision_slices_total", recent), grew("foveate_vision_batches_total", recent)),
    slices_waiting: total(now, "foveate_vision_slices_waiting"),
    cache_hits: ratio(minute ? increase(now, minute.families, "foveate_pictures_total", (labels) => labels.cached === "true") : null, grew("foveate_pictures_total", minute)),
    picture_rate: per("foveate_pictures_total"),
    ...arena(now),
    errors: total(now, "foveate_errors_total") ?? 0,
    answered: total(now, "foveate_request_seconds_count"),
  };
  for (const [key, name, stage] of [["ttft", TTFT], ["tpot", TPOT], ["encode", STAGES, "encode"]]) {
    const buckets = minute ? times(now, minute.families, ["", name, stage]) : [];
    for (const [label, q] of QUANTILES) values[`${key}_${label}`] = quantile(q, buckets);
  }
  for (const one of series(now, "foveate_process_cpu_seconds_total")) {
    const { process } = one.labels;
    values[`use:${process}`] = per("foveate_process_cpu_seconds_total", (labels) => labels.process === process);
  }
  for (const one of series(now, "foveate_process_resident_memory_bytes")) values[`memory:${one.labels.process}`] = one.value;
  for (const one of series(now, "foveate_gpu_utilization_ratio")) values[`gpu_use:GPU ${one.labels.gpu}`] = one.value;
  for (const one of series(now, "foveate_gpu_memory_used_bytes")) values[`gpu_memory:GPU ${one.labels.gpu}`] = one.value;
  return values;
}

function over(value, seconds) {
  return value === null ? null : value / seconds;
}

function used(free, whole) {
  return free === null || !whole ? null : 1 - free / whole;
}

// Of the arena that is fullest: with a GPU there are two, and rows go through one of them.
function arena(now) {
  const found = ARENAS.map((name) => ({
    arena: used(total(now, `foveate_vision_${name}_blocks_free`), total(now, `foveate_vision_${name}_blocks`)),
    arena_bytes: total(now, `foveate_vision_${name}_bytes`),
  }));
  return found.reduce((best, one) => ((one.arena ?? -1) > (best.arena ?? -1) ? one : best));
}
