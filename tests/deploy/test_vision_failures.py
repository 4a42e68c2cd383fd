"""Processes are killed and stopped in every state: pictures are late or refused, text goes on, no answer is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from live import Live, Talker, ask, live_server, picture, question, refused
from serving import ROOT, TINY_MODEL, RunningServer

from foveate.config import EngineSettings, HttpSettings, ModelSettings, Settings
from foveate.deploy.listen import listen, url_of
from foveate.deploy.resolve import resolve_model
from foveate.deploy.serve import Service
from foveate.deploy.supervise import Child, RestartPolicy
from foveate.transport.layout import WRITING

Eventually = Callable[[Callable[[], bool]], None]

LARGE = [picture(seed, 7900, 7900, detail="low") for seed in (1, 2)]
"""Decoding each takes most of a second."""
PAGES = [picture(seed, 1300, 1300) for seed in range(10, 16)]
"""Of 10 slices each."""
SLOW = ("--vision-batch-size=1", "--preprocess-threads=1")
ONE, OTHER, THIRD = picture(30), picture(31), picture(32)
BLOCK_BYTES = 2**16
"""The embeddings of a picture with one slice, exactly."""


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """Let a process stand still."""
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def kill_encoder(live: Live, talker: Talker, eventually: Eventually) -> None:
    """Kill the vision service; text goes on while it is away, and another one takes its place."""
    victim = live.encoder
    victim.kill()
    eventually(live.is_degraded)
    pieces = talker.pieces
    eventually(lambda: talker.pieces > pieces)
    assert live.is_degraded()
    eventually(live.is_ready)
    assert live.encoder.pid != victim.pid


def test_the_answers_that_tests_compare_differ(server: RunningServer) -> None:
    assert len({ask(server.url, one) for one in (ONE, OTHER, THIRD, PAGES[0], PAGES[1])}) == 5


def test_killed_when_idle(runtime: Path, server: RunningServer, eventually: Eventually) -> None:
    expected = ask(server.url, ONE)
    with live_server(runtime) as live, Talker(live) as talker:
        eventually(lambda: talker.pieces > 0)
        live.encoder.kill()
        assert live.ask(ONE) == expected
        kill_encoder(live, talker, eventually)
        assert live.ask(ONE) == expected


def is_decoding(live: Live) -> bool:
    numbers = live.vision_numbers()
    slices = [numbers.get(name) for name in ("slices_waiting", "slices_running", "slices_total")]
    return numbers.get("pictures_running") == len(LARGE) and slices == [0, 0, 0]


def is_encoding(live: Live) -> bool:
    numbers = live.vision_numbers()
    return numbers.get("slices_running") == 1 and numbers.get("arena_published_total") == 0


@pytest.mark.parametrize(("state", "pictures"), [(is_decoding, LARGE), (is_encoding, PAGES)])
def test_killed_at_work(
    state: Callable[[Live], bool],
    pictures: list[dict[str, Any]],
    runtime: Path,
    server: RunningServer,
    pool: ThreadPoolExecutor,
    eventually: Eventually,
) -> None:
    expected = ask(server.url, *pictures)
    with live_server(runtime, *SLOW) as live, Talker(live) as talker:
        eventually(lambda: talker.pieces > 0)
        asked = pool.submit(live.ask, *pictures)
        eventually(lambda: state(live))
        kill_encoder(live, talker, eventually)
        assert asked.result() == expected
        # They were all sent again, once.
        assert live.vision("pictures_total") == len(pictures)


def test_what_was_published_before_is_not_sent_again(
    runtime: Path, server: RunningServer, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    expected = ask(server.url, *PAGES)
    with live_server(runtime, *SLOW) as live, Talker(live) as talker:
        eventually(lambda: talker.pieces > 0)
        asked = pool.submit(live.ask, *PAGES)
        eventually(lambda: live.vision("arena_published_total") > 0)
        kill_encoder(live, talker, eventually)
        assert asked.result() == expected
        assert 0 < live.vision("pictures_total") < len(PAGES)


def arena_words(live: Live) -> npt.NDArray[np.uint64]:
    """Return the words of all blocks of the vision service's arena as they are, even while it stands still."""
    paths = Path(f"/proc/{live.encoder.pid}/fd").iterdir()
    path = next(path for path in paths if os.readlink(path).startswith("/memfd:vision-"))
    return np.memmap(path, np.uint64, mode="r", shape=(int(live.vision("arena_blocks")),))


def stop_while_writing(live: Live, asked: Future[str]) -> bool:
    """Watch the arena until rows are being written, and stop the vision service in the middle of that."""
    pid, words = live.encoder.pid, arena_words(live)

    def is_writing() -> bool:
        return bool((words & np.uint64(3) == WRITING).any())

    while not asked.done():
        if is_writing():
            os.kill(pid, signal.SIGSTOP)
            # Each of its threads stops when it next comes by.
            time.sleep(0.05)
            if is_writing():
                return True
            os.kill(pid, signal.SIGCONT)
    return False


def test_killed_when_writing(
    runtime: Path, server: RunningServer, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    with live_server(runtime, "--arena-bytes=16777216") as live, Talker(live) as talker:
        eventually(lambda: talker.pieces > 0)
        # Writing takes less than a millisecond: on a busy machine it may be over before anybody looks.
        for attempt in range(20):
            pages = [picture(100 + 10 * attempt + number, 1300, 1300) for number in range(len(PAGES))]
            asked = pool.submit(live.ask, *pages)
            if stop_while_writing(live, asked):
                break
        else:
            pytest.fail("it was never caught writing")
        kill_encoder(live, talker, eventually)
        assert asked.result() == ask(server.url, *pages)
        assert live.vision("pictures_total") > 0


def test_killed_when_a_handle_is_published_and_not_read(
    runtime: Path, server: RunningServer, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    expected = ask(server.url, ONE)
    with live_server(runtime) as live, Talker(live) as talker:
        eventually(lambda: talker.pieces > 0)
        with stopped(live.engine):
            asked = pool.submit(live.ask, ONE)
            eventually(lambda: live.vision("arena_leases") == 1)
            victim = live.encoder
            victim.kill()
            eventually(live.is_degraded)
        assert asked.result() == expected
        eventually(live.is_ready)
        assert live.encoder.pid != victim.pid
        # The rows were read where the dead had left them.
        assert live.vision("pictures_total") == 0
        assert live.ask(ONE) == expected


def test_a_killed_engine_leaves_no_leases(
    runtime: Path, server: RunningServer, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    expected = ask(server.url, ONE)
    with live_server(runtime) as live:
        encoder, engine = live.encoder.pid, live.engine
        with stopped(engine):
            asked = [pool.submit(live.post, ONE), pool.submit(live.post)]
            eventually(lambda: live.vision("arena_leases") == 1)
            engine.kill()
            for one in asked:
                assert one.result().status_code == 500
                assert one.result().json()["error"]["code"] == "engine_error"
        eventually(lambda: live.vision("arena_leases") == 0)
        assert live.vision("arena_leases_died_total") == 1
        assert live.ready()[0] == 503
        eventually(lambda: live.ready()[0] == 200)
        # It need not be attached to the vision service yet.
        assert live.ask(ONE) == expected
        assert live.engine.pid != engine.pid
        assert live.encoder.pid == encoder
        assert live.vision("arena_readers") == 1


def test_a_reader_stalled_beyond_its_lease_gets_an_error(
    runtime: Path, server: RunningServer, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    expected = {name: ask(server.url, one) for name, one in (("one", ONE), ("other", OTHER))}
    with live_server(runtime, "--lease-seconds=1", f"--arena-bytes={BLOCK_BYTES}") as live:
        with stopped(live.engine):
            late = pool.submit(live.post, ONE)
            eventually(lambda: live.vision("arena_leases_expired_total") == 1)
            # The same block is used again, for another picture.
            next_one = pool.submit(live.post, OTHER)
            eventually(lambda: live.vision("arena_published_total") == 2)
        assert "given up before they were read" in refused(late.result())
        if next_one.result().status_code == 200:
            assert next_one.result().json()["choices"][0]["message"]["content"] == expected["other"]
        else:
            refused(next_one.result())
        assert live.ask(ONE) == expected["one"]


def test_a_full_arena_refuses(
    runtime: Path, server: RunningServer, pool: ThreadPoolExecutor, eventually: Eventually
) -> None:
    expected = [ask(server.url, one) for one in (ONE, OTHER)]
    with live_server(runtime, "--arena-wait-seconds=0.5", f"--arena-bytes={BLOCK_BYTES}") as live:
        with stopped(live.engine):
            held = pool.submit(live.ask, ONE)
            eventually(lambda: live.vision("arena_leases") == 1)
            assert "no room" in refused(live.post(OTHER))
            assert "no room" in refused(live.post(THIRD))
            assert live.vision("arena_refusals_total") == 2
            assert not held.done()
        assert [held.result(), live.ask(OTHER)] == expected
        eventually(lambda: live.vision("arena_blocks_free") == 1)


def send_and_hang_up(live: Live, fields: dict[str, Any], when: Callable[[], bool], eventually: Eventually) -> None:
    """Send a request and close the connection when something is true."""
    body = json.dumps(fields).encode()
    url = httpx.URL(live.url)
    with socket.create_connection((url.host, url.port)) as connection:
        head = ["POST /v1/chat/completions HTTP/1.1", f"Host: {url.host}", f"Content-Length: {len(body)}"]
        connection.sendall("\r\n".join([*head, "Content-Type: application/json", "", ""]).encode() + body)
        eventually(when)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_cancels_its_encode(stream: bool, runtime: Path, eventually: Eventually) -> None:
    with live_server(runtime, *SLOW) as live:
        fields = question(*PAGES, stream=stream)
        send_and_hang_up(live, fields, lambda: live.vision("slices_running") == 1, eventually)
        eventually(lambda: live.vision("cancelled_pictures_total") > 0)
        eventually(lambda: live.vision("slices_running") == 0)
        numbers = live.vision_numbers()
        assert numbers["slices_total"] < 10 * len(PAGES)
        for nothing in ("pictures_running", "requests_running", "slices_waiting", "shares"):
            assert numbers[nothing] == 0, nothing
        eventually(lambda: live.vision("arena_leases") == 0)
        assert live.metrics()["foveate_requests_running"] == 0


def test_without_an_encoder_there_is_text(runtime: Path) -> None:
    with live_server(runtime, "--encoder=none") as live:
        assert "none is configured" in refused(live.post(ONE))
        assert live.post().status_code == 200
        assert live.is_ready()


def test_without_an_encoder_that_answers_there_is_text(runtime: Path) -> None:
    with live_server(runtime, "--encoder=none", "--vision=unix:/nonexistent") as live:
        assert "unix:/nonexistent" in refused(live.post(ONE))
        assert live.post().status_code == 200
        assert live.is_degraded()


async def test_an_encoder_that_keeps_failing_is_given_up(eventually: Eventually) -> None:
    settings = Settings(
        model=ModelSettings(model=str(TINY_MODEL), device="cpu", threads=1),
        engine=EngineSettings(num_kv_blocks=64),
        http=HttpSettings(port=0),
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, listen(settings.http) as listener:
        (Path(folder) / "settings.json").write_text(settings.model_dump_json())
        worker = Child([sys.executable, "-m", "foveate.worker", folder], environment={"PYTHONPATH": str(ROOT)})
        encoder = Child([sys.executable, "-c", "raise SystemExit(7)"])
        worker.start()
        encoder.start()
        policy = RestartPolicy(first_delay=0.01, max_quick_failures=3)
        service = Service(
            settings, resolve_model(settings.model), listener, Path(folder), worker, encoder, policy=policy
        )
        running = asyncio.create_task(service.run())
        try:
            await asyncio.to_thread(see_that_pictures_are_refused, url_of(listener), eventually)
        finally:
            service.server.should_exit = True
            assert await running == 0


def see_that_pictures_are_refused(url: str, eventually: Eventually) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        eventually(lambda: client.get("/ready").status_code == 200)
        refusal = client.post("/v1/chat/completions", json=question(ONE))
        assert "ended with exit code 7, 3 times in a row" in refused(refusal)
        assert client.post("/v1/chat/completions", json=question()).status_code == 200
        assert client.get("/ready").json()["status"] == "degraded"
