"""``foveate bench serve``: a load generator that measures a server as its clients see it.

Each level keeps a number of requests in flight (a closed loop): whoever has an answer sends the next request.
Prompts and pictures differ from request to request, so that no cache answers for the model, and every answer
has the same length (greedy, ``ignore_eos``). All is drawn before the clock starts: the generator shares the
machine with the server.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import uvloop
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from foveate.bench.counters import guesses
from foveate.deploy.launch import LaunchFailed, launched
from foveate.errors import ConfigError, FoveateError
from foveate.workload import Workload

REQUEST_SECONDS = 600.0
_TAIL_BYTES = 8192
_FIRST_TEXT = re.compile(rb'"content":\s*"(?!")')


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = 0
    image_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered request. Times are in seconds."""

    ttft: float
    tpot: float
    e2e: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    image_tokens: int


async def ask(client: httpx.AsyncClient, body: bytes, output_tokens: int) -> Answer | str:
    """Send one request and read its stream to the end; return what was measured, or what went wrong."""
    started = time.perf_counter()
    first = last = 0.0
    tail = b""
    try:
        async with client.stream("POST", "/v1/chat/completions", content=body) as response:
            if response.status_code != 200:
                text = (await response.aread())[:300].decode(errors="replace")
                return f"status {response.status_code}: {text}"
            async for chunk in response.aiter_raw():
                # Only what has to be known is parsed here: a token every few hundred microseconds is
                # possible.
                tail = (tail + chunk)[-_TAIL_BYTES:]
                if b'"content"' in chunk:
                    last = time.perf_counter()
                    if not first and _FIRST_TEXT.search(tail):
                        first = last
        ended = time.perf_counter()
        usage = _read_end(tail)
    except (httpx.HTTPError, msgspec.MsgspecError, FoveateError) as error:
        return f"{type(error).__name__}: {error}"
    if usage.completion_tokens != output_tokens:
        return f"the answer has {usage.completion_tokens} tokens instead of {output_tokens}"
    if not first:
        return "the answer has no text"
    details = usage.prompt_tokens_details or _PromptDetails()
    return Answer(
        ttft=first - started,
        tpot=(last - first) / max(output_tokens - 1, 1),
        e2e=ended - started,
        output_tokens=usage.completion_tokens,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=details.cached_tokens or 0,
        image_tokens=details.image_tokens or 0,
    )


def _read_end(tail: bytes) -> _Usage:
    """Return the usage from a stream's last events.

    Raises:
        FoveateError: the stream tells of an error, or breaks off.
    """
    usage = None
    events = [event.removeprefix(b"data: ") for event in re.split(rb"\r?\n\r?\n", tail.strip())]
    for data in events[1:] if len(tail) == _TAIL_BYTES else events:
        if data.startswith(b"{"):
            event = msgspec.json.decode(data, type=_Event)
            if event.error is not None:
                raise FoveateError(str(event.error.get("message", event.error)))
            usage = event.usage or usage
    if events[-1] != b"[DONE]" or usage is None:
        raise FoveateError("the stream broke off")
    return usage


@dataclass(frozen=True, slots=True)
class Level:
    """What one level of concurrency came to. Times are in milliseconds: (median, 99th percentile)."""

    concurrency: int
    requests: int
    errors: dict[str, int]
    seconds: float
    ttft_ms: tuple[float, float]
    tpot_ms: tuple[float, float]
    e2e_ms: tuple[float, float]
    output_tokens_per_s: float
    requests_per_s: float
    prompt_tokens: float
    cached_tokens: float
    image_tokens: float
    draft_tokens: int = 0
    accepted_tokens: int = 0


def summarize(concurrency: int, seconds: float, outcomes: Sequence[Answer | str]) -> Level:
    """Condense the outcomes of one level, which took so many seconds in all. Errors enter no other number."""
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]

    def mean(name: str) -> float:
        return statistics.fmean([getattr(answer, name) for answer in answers] or [0.0])

    def percentiles(name: str) -> tuple[float, float]:
        values = [1000 * getattr(answer, name) for answer in answers] or [0.0]
        # Two copies of a single value make quantiles of it.
        cuts = statistics.quantiles(values if len(values) > 1 else values * 2, n=100, method="inclusive")
        return round(cuts[49], 3), round(cuts[98], 3)

    return Level(
        concurrency=concurrency,
        requests=len(outcomes),
        errors=dict(Counter(outcome for outcome in outcomes if isinstance(outcome, str))),
        seconds=round(seconds, 3),
        ttft_ms=percentiles("ttft"),
        tpot_ms=percentiles("tpot"),
        e2e_ms=percentiles("e2e"),
        output_tokens_per_s=round(sum(answer.output_tokens for answer in answers) / seconds, 2),
        requests_per_s=round(len(answers) / seconds, 3),
        prompt_tokens=mean("prompt_tokens"),
        cached_tokens=mean("cached_tokens"),
        image_tokens=mean("image_tokens"),
    )


async def run_level(client: httpx.AsyncClient, bodies: Sequence[bytes], concurrency: int, tokens: int) -> Level:
    """Send the bodies, so many at a time."""
    waiting = iter(bodies)
    outcomes: list[Answer | str] = []

    async def keep_asking() -> None:
        for body in waiting:
            outcomes.append(await ask(client, body, tokens))

    before = await guesses(client)
    started = time.perf_counter()
    await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    level = summarize(concurrency, time.perf_counter() - started, outcomes)
    return replace(level, **(await guesses(client)).since(before)._asdict())


async def measure(
    url: str, key: str | None, workload: Workload, levels: Sequence[int], requests: int, warmup: int
) -> tuple[str, list[Level]]:
    """Measure a running server; return the name of its model and one result for each level.

    Raises:
        FoveateError: the server does not say which model it serves.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=REQUEST_SECONDS, limits=limits, trust_env=False
    ) as client:
        model = await _model_name(client)
        bodies = workload.bodies(model)
        # As many at once as later: the first large batch allocates, too.
        await run_level(client, [next(bodies) for _ in range(warmup)], max(levels), workload.output_tokens)
        results = []
        for concurrency in levels:
            batch = [next(bodies) for _ in range(max(requests, concurrency))]
            results.append(await run_level(client, batch, concurrency, workload.output_tokens))
        return model, results


async def _model_name(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise FoveateError(f"{client.base_url}: the server does not say what it serves ({error})") from error


def print_table(title: str, results: Sequence[Level]) -> None:
    """Print one column for each level, and the errors below."""
    console = Console()
    table = Table(title=title)
    table.add_column("clients")
    for level in results:
        table.add_column(str(level.concurrency), justify="right")

    def add(heading: str, show: Callable[[Level], str]) -> None:
        table.add_row(heading, *map(show, results))

    def pair(times: tuple[float, float]) -> str:
        return f"{times[0]:.1f} / {times[1]:.1f}"

    add("requests", lambda level: str(level.requests))
    add("errors", lambda level: str(sum(level.errors.values())))
    add("first token, ms, p50 / p99", lambda level: pair(level.ttft_ms))
    add("each further token, ms, p50 / p99", lambda level: pair(level.tpot_ms))
    add("whole answer, ms, p50 / p99", lambda level: pair(level.e2e_ms))
    add("output tokens/s", lambda level: f"{level.output_tokens_per_s:.1f}")
    add("requests/s", lambda level: f"{level.requests_per_s:.2f}")
    add("prompt tokens", lambda level: f"{level.prompt_tokens:.0f}")
    add("  from the prefix cache", lambda level: f"{level.cached_tokens:.0f}")
    add("  of pictures", lambda level: f"{level.image_tokens:.0f}")
    if any(level.draft_tokens for level in results):
        add("tokens guessed", lambda level: str(level.draft_tokens))
        add("  right", lambda level: f"{100 * level.accepted_tokens / max(level.draft_tokens, 1):.0f} %")
    console.print(table)
    for level in results:
        for message, count in level.errors.items():
            line = f"{count} x at {level.concurrency} clients: {message}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def command(
    *serve_flags: Annotated[str, Parameter(allow_leading_hyphen=True)],
    url: str | None = None,
    concurrency: str = "1,8",
    requests: int = 32,
    output_tokens: int = 64,
    prompt_words: int = 12,
    picture: str | None = None,
    same_picture: bool = False,
    read_back: bool = False,
    warmup: int = 8,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """Measure a server under load.

    Without --url a server is started for the time of the measurement, with the model and flags of foveate
    serve that stand on the same line: foveate bench serve --picture 448x448 --max-batch-size 16. The server's key,
    if it wants one, is taken from FOVEATE_API_KEY.

    Args:
        serve_flags: MODEL and flags of foveate serve, for the server that is started.
        url: A running server to measure, such as http://127.0.0.1:9997.
        concurrency: How many requests are in flight, level after level.
        requests: Requests of each level (at least as many as are in flight).
        output_tokens: Tokens of each answer.
        prompt_words: Words of each question.
        picture: Show a picture of this size, such as 448x448, with each question.
        same_picture: Show the same picture each time, which the server may remember.
        read_back: Ask for the question's own words again, which --speculation prompt_lookup makes faster.
        warmup: Requests before the first level; they are not counted.
        seed: Another number draws other questions and pictures.
        json: Write the results to this file as well.
    """
    if url is not None and serve_flags:
        raise ConfigError(f"{' '.join(serve_flags)}: not understood (flags of foveate serve do not go with --url)")
    for name, value in {
        "requests": requests,
        "output-tokens": output_tokens,
        "prompt-words": prompt_words,
    }.items():
        _positive(f"--{name}", str(value), "an integer greater than 0")
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise ConfigError(f"--json: got {str(json)!r}, expected a file in a folder that exists")
    levels = [_positive("--concurrency", part, "integers such as 1,8") for part in concurrency.split(",")]
    workload = Workload(output_tokens, prompt_words, _size(picture), same_picture, seed, read_back)
    try:
        with nullcontext((url, None)) if url is not None else launched(serve_flags) as (address, ready_seconds):
            key = os.environ.get("FOVEATE_API_KEY")
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                model, results = runner.run(measure(address, key, workload, levels, requests, warmup))
    except LaunchFailed as error:
        # The server has said why on standard error.
        return error.exit_code if error.exit_code > 0 else 1
    scenario = "text" if picture is None else f"{picture} {'same ' if same_picture else ''}picture"
    scenario += " to read back" if read_back else ""
    print_table(f"{model}: {scenario}, {output_tokens} tokens out", results)
    if ready_seconds is not None:
        print(f"from start to ready: {ready_seconds:.1f} s")
    if json is not None:
        report = {
            "model": model,
            "workload": asdict(workload),
            "serve_flags": list(serve_flags),
            "cpus": os.cpu_count(),
            "start_to_ready_s": ready_seconds,
            "levels": [asdict(level) for level in results],
        }
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    return 1 if any(level.errors for level in results) else 0


def _size(picture: str | None) -> tuple[int, int] | None:
    if picture is None:
        return None
    width, _, height = picture.partition("x")
    expected = "WIDTHxHEIGHT in pixels, such as 448x448"
    return _positive("--picture", width, expected), _positive("--picture", height, expected)


def _positive(flag: str, text: str, expected: str) -> int:
    if not text.strip().isascii() or not text.strip().isdigit() or int(text) < 1:
        raise ConfigError(f"{flag}: got {text!r}, expected {expected}")
    return int(text)
