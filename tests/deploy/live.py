"""A whole server to be treated badly, and what a test needs to see how it takes that."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from PIL import Image
from test_serve import child_of, serving

SECONDS = 180
"""A client's patience: longer than any test should need."""
FLAGS = ("--device=cpu", "--dtype=float32", "--num-kv-blocks=2048")


def picture(seed: float, width: int = 200, height: int = 200, **image_url: Any) -> dict[str, Any]:
    """Return a message's part: a picture of 8 by 8 random colours, another one for each seed.

    Up to 448 by 448 pixels it has one slice; with 1300 by 1300 and the defaults it has 10.
    """
    colours = Image.frombytes("RGB", (8, 8), random.Random(seed).randbytes(8 * 8 * 3))
    file = io.BytesIO()
    colours.resize((width, height), Image.Resampling.NEAREST).save(file, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, **image_url}}


def question(*pictures: dict[str, Any], tokens: int = 8, **more: Any) -> dict[str, Any]:
    """Return the fields of a greedy request about pictures, or about nothing."""
    content = [*pictures, {"type": "text", "text": "What is it?"}]
    return {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        **more,
    }


def ask(url: str, *pictures: dict[str, Any], tokens: int = 8) -> str:
    """Ask about pictures with OpenAI's own client, which does not try again, and return the answer's text."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client:
        fields = question(*pictures, tokens=tokens, extra_body={"ignore_eos": True})
        answer = client.chat.completions.create(**fields)
    assert answer.choices[0].message.content is not None
    return answer.choices[0].message.content


@dataclass(frozen=True)
class Live:
    """A running server."""

    process: subprocess.Popen[str]
    url: str

    @property
    def engine(self) -> psutil.Process:
        """The process of its engine."""
        return child_of(self.process, "foveate.worker")

    @property
    def encoder(self) -> psutil.Process:
        """The process of its vision service."""
        return child_of(self.process, "foveate.vision.process")

    def ask(self, *pictures: dict[str, Any]) -> str:
        """Ask about pictures and return the answer's text."""
        return ask(self.url, *pictures)

    def post(self, *pictures: dict[str, Any], **more: Any) -> httpx.Response:
        """Ask about pictures and return whatever comes."""
        return httpx.post(f"{self.url}/v1/chat/completions", json=question(*pictures, **more), timeout=SECONDS)

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics``, by its name with labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=SECONDS).raise_for_status().text
        return {name: float(value) for name, value in re.findall(r"^([a-z].*) (\S+)$", text, re.MULTILINE)}

    def vision_numbers(self, service: str = "own") -> dict[str, float]:
        """What a vision service says of itself; nothing while it does not answer."""
        label = f'{{service="{service}"}}'
        return {
            name.removeprefix("foveate_vision_").removesuffix(label): value
            for name, value in self.metrics().items()
            if name.endswith(label)
        }

    def vision(self, name: str, service: str = "own") -> float:
        """One number of a vision service; -1 while it does not answer."""
        return self.vision_numbers(service).get(name, -1.0)

    def ready(self) -> tuple[int, dict[str, Any]]:
        """Status and body of ``/ready``."""
        answer = httpx.get(f"{self.url}/ready", timeout=SECONDS)
        return answer.status_code, answer.json()

    def is_ready(self) -> bool:
        """Whether text and pictures are answered."""
        return self.ready() == (200, {"status": "ready"})

    def is_degraded(self) -> bool:
        """Whether text is answered, and pictures may not be."""
        status, body = self.ready()
        return status == 200 and body["status"] == "degraded" and all(body["problems"])


@contextlib.contextmanager
def live_server(runtime: Path, *flags: str) -> Iterator[Live]:
    """Run a server with the tiny model on the CPU, and see that it ends well whatever has been done to it."""
    with serving(runtime, *FLAGS, *flags) as (process, url):
        yield Live(process, url)
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(60) == 0
        _, alive = psutil.wait_procs(family, 30)
        assert not alive, "the server left processes behind"


def refused(answer: httpx.Response) -> str:
    """See that a request was refused for now, as clients expect it, and return the reason."""
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    message = answer.json()["error"]["message"]
    assert isinstance(message, str)
    return message


class Talker:
    """Somebody who has text streamed all the time, from the beginning of the block to its end.

    Attributes:
        pieces: how many pieces of answers have come.
    """

    def __init__(self, live: Live) -> None:
        self.pieces = 0
        self._live = live
        self._enough = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Talker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with openai.OpenAI(
                base_url=f"{self._live.url}/v1", api_key="none", max_retries=0, timeout=SECONDS
            ) as client:
                while not self._enough.is_set():
                    self._listen(client)
        except BaseException as error:  # noqa: BLE001 (raised again in the main thread)
            self._error = error

    def _listen(self, client: openai.OpenAI) -> None:
        fields = question(tokens=2000, stream=True, extra_body={"ignore_eos": True})
        reason = None
        with client.chat.completions.create(**fields) as stream:
            for event in stream:
                reason = event.choices[0].finish_reason
                self.pieces += 1
                if self._enough.is_set():
                    return
        assert reason == "length"
