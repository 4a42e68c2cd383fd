"""Where a request's time goes, as the answer, its last stream event and /metrics say."""

from __future__ import annotations

import base64
import io
from typing import Any

import openai
from chat_messages import text, user
from PIL import Image
from serving import RunningServer

from foveate.telemetry import STAGES

OF_PICTURES = {"fetch", "picture_decode", "slice", "queue", "encode", "write", "read"}
TIMINGS = {"timings": True}


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> dict[str, Any]:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def fields(server: RunningServer, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"model": server.model, "messages": [user(*parts, text("What is it?"))], "max_tokens": 4, "temperature": 0}


def counts(server: RunningServer) -> dict[str, float]:
    return {stage: server.metric(f'foveate_stage_seconds_count{{stage="{stage}"}}') for stage in STAGES}


def test_the_answer_tells_every_stage(client: openai.OpenAI, server: RunningServer) -> None:
    before = counts(server)
    answer = client.chat.completions.create(**fields(server, plain((1, 2, 3))), extra_body=TIMINGS)
    assert answer.model_extra is not None
    timings = answer.model_extra["timings"]
    assert list(timings) == [*STAGES, "total"]
    assert all(seconds >= 0 for seconds in timings.values())
    assert timings["encode"] > 0
    assert timings["prefill"] > 0
    assert max(timings.values()) == timings["total"]
    assert counts(server) == {stage: count + 1 for stage, count in before.items()}


def test_a_stage_counts_once_for_each_picture_in_the_metrics(client: openai.OpenAI, server: RunningServer) -> None:
    before = counts(server)
    client.chat.completions.create(**fields(server, plain((4, 5, 6)), plain((7, 8, 9))))
    added = {stage: count - before[stage] for stage, count in counts(server).items()}
    assert (added["encode"], added["picture_decode"], added["prefill"]) == (2, 2, 1)


def test_only_the_last_event_of_a_stream_tells(client: openai.OpenAI, server: RunningServer) -> None:
    with client.chat.completions.create(
        **fields(server, plain((10, 11, 12))), stream=True, extra_body=TIMINGS
    ) as stream:
        told = [(event.model_extra or {}).get("timings") for event in stream]
    assert told[:-1] == [None] * (len(told) - 1)
    assert told[-1] is not None
    assert list(told[-1]) == [*STAGES, "total"]


def test_the_event_with_the_usage_is_the_last_one(client: openai.OpenAI, server: RunningServer) -> None:
    with client.chat.completions.create(
        **fields(server), stream=True, stream_options={"include_usage": True}, extra_body=TIMINGS
    ) as stream:
        events = list(stream)
    told = [bool((event.model_extra or {}).get("timings")) for event in events]
    assert told == [False] * (len(events) - 1) + [True]
    assert events[-1].usage is not None


def test_text_has_no_stages_of_pictures(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.chat.completions.create(**fields(server), extra_body=TIMINGS)
    assert answer.model_extra is not None
    assert not OF_PICTURES & set(answer.model_extra["timings"])
    assert {"prefill", "decode", "total"} <= set(answer.model_extra["timings"])


def test_the_answer_tells_how_each_picture_was_seen(client: openai.OpenAI, server: RunningServer) -> None:
    wide, small = plain((13, 14, 15), (900, 450)), plain((16, 17, 18))
    whole = {**wide, "max_slice_nums": 1}
    answers = [
        client.chat.completions.create(**fields(server, *parts), extra_body=TIMINGS)
        for parts in ([small], [wide, small, whole])
    ]
    first, told = (answer.model_extra["pictures"] for answer in answers if answer.model_extra)
    per_slice = first[0]["tokens"]
    assert first == [
        {"width": 64, "height": 64, "slices": 1, "grid": None, "tokens": per_slice, "cached": False},
    ]
    assert told == [
        {"width": 900, "height": 450, "slices": 3, "grid": [2, 1], "tokens": 3 * per_slice, "cached": False},
        {"width": 64, "height": 64, "slices": 1, "grid": None, "tokens": per_slice, "cached": True},
        {"width": 900, "height": 450, "slices": 1, "grid": None, "tokens": per_slice, "cached": False},
    ]
    assert answers[1].to_dict()["usage"]["prompt_tokens_details"]["image_tokens"] == 5 * per_slice


def test_the_last_event_tells_of_pictures_too(client: openai.OpenAI, server: RunningServer) -> None:
    picture = plain((19, 20, 21))
    with client.chat.completions.create(**fields(server, picture), stream=True, extra_body=TIMINGS) as stream:
        told = [(event.model_extra or {}).get("pictures") for event in stream]
    assert told[:-1] == [None] * (len(told) - 1)
    assert [one["cached"] for one in told[-1]] == [False]


def test_who_does_not_ask_is_not_told(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.chat.completions.create(**fields(server), extra_body={"timings": False})
    assert not {"timings", "pictures"} & set(answer.model_extra or {})
