"""Two services of one model: the encoder, and the language model that asks it."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable

import httpx
import pytest
from managed import TINY, VISION_SETTINGS, Home, ask, ended, picture, sets
from serving import TINY_MODEL

Eventually = Callable[[Callable[[], bool]], None]
EYES = (str(TINY_MODEL), "--role=vision", *sets(*VISION_SETTINGS))


@pytest.fixture(scope="module")
def layout(home: Home) -> str:
    """The services eyes and mind; the URL of the latter."""
    home.run("start", *EYES, "--name=eyes")
    home.run("start", *TINY, "--name=mind", "--role=llm", "--vision=eyes")
    return str(home.service("mind")["url"])


def test_both_are_listed(home: Home, layout: str) -> None:
    rows = home.services()
    assert {name: row["status"] for name, row in rows.items()} == {"eyes": "ready", "mind": "ready"}
    assert rows["eyes"]["address"] == f"unix:{home.path}/services/eyes/vision.sock"
    assert (rows["eyes"]["url"], rows["mind"]["address"]) == (None, None)
    ports = {name: re.split("  +", line)[0] for line in home.run("ps").splitlines() for name in rows if name in line}
    assert ports == {"eyes": "-,unix", "mind": f"{rows['mind']['http_port']},-"}
    modules = [process.cmdline()[2] for process in home.family("mind") + home.family("eyes")]
    assert sorted(modules) == [
        "foveate.manager.child",
        "foveate.manager.child",
        "foveate.manager.supervisor",
        "foveate.manager.supervisor",
        "foveate.worker",
    ]


def test_pictures_are_looked_at_by_the_other_one(home: Home, layout: str, eventually: Eventually) -> None:
    seen = ask(layout, picture())
    killed = home.process("eyes", "foveate.manager.child")
    killed.kill()
    eventually(lambda: ended([killed]) and home.service("eyes")["status"] == "ready")
    eventually(lambda: home.service("mind")["status"] == "ready")
    assert ask(layout, picture()) == seen
    assert home.service("eyes")["restarts"] == 1


def test_the_encoder_is_reloaded_without_a_refusal(home: Home, layout: str) -> None:
    old = home.process("eyes", "foveate.manager.child")
    reloading = home.popen("reload", "eyes", "--set=vision_batch_size=4")
    answers = 0
    while reloading.poll() is None:
        # Another picture each time: none is known already.
        assert ask(layout, picture(64 + answers))
        answers += 1
    out, err = reloading.communicate()
    assert reloading.returncode == 0, out + err
    assert answers > 0
    assert ended([old])
    assert ask(layout, picture(400))
    assert home.service("eyes")["status"] == "ready"


def test_on_a_port(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = (*EYES, "--name=far", f"--set=listen=127.0.0.1:{port}")
        said = home.run("start", *flags, code=2, FOVEATE_VISION_TOKEN="secret")
        assert f"cannot listen on 127.0.0.1:{port}" in said
    home.run("start", *flags, FOVEATE_VISION_TOKEN="secret")
    row = home.service("far")
    assert (row["address"], row["rpc"], row["status"]) == (f"127.0.0.1:{port}", str(port), "ready")
    assert "secret" not in json.dumps(home.services())
    assert "a port has one vision service" in home.run("reload", "far", code=2)
    assert home.service("far")["status"] == "ready"
    home.run("stop", "far", "--remove")


def test_what_does_not_go_together(home: Home, layout: str) -> None:
    assert "--vision: a vision service uses no other ones" in home.run(
        "start", *EYES, "--name=x", "--vision=eyes", code=2
    )
    said = home.run("start", *TINY, "--name=x", "--role=llm", "--vision=mind", code=2)
    assert "the service mind is not one of the role vision" in said
    address = home.service("eyes")["address"]
    assert "is in use by another program" in home.run("start", *EYES, "--name=x", f"--set=listen={address}", code=2)
    assert set(home.services()) == {"eyes", "mind"}


def test_without_the_encoder_text_is_answered(home: Home, layout: str, eventually: Eventually) -> None:
    home.run("stop", "eyes")
    eventually(lambda: home.service("mind")["status"] == "degraded")
    assert "eyes/vision.sock" in home.service("mind")["reason"]
    assert ask(layout)
    assert httpx.get(f"{layout}/ready").status_code == 200
