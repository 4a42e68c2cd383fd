"""Who may come in, and what every answer carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from serving import RunningServer, running_server

Eventually = Callable[[Callable[[], bool]], None]

KEY = "correct horse"
BODY = {"model": "model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("locked"), "--api-key", KEY) as running:
        yield running


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", f"Basic {KEY}", "Bearer wrong", f"Bearer {KEY}!", KEY, "Bearer \u00e9"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/model", PATH, "/metrics", "/v1/nothing"])
def test_without_the_key(locked: RunningServer, path: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    method = "POST" if path == PATH else "GET"
    answer = httpx.request(method, locked.url + path, headers=headers, content=b"{")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "invalid_api_key",
        None,
    )
    assert KEY not in answer.text


def test_with_the_key(locked: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["model"]
    stranger = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
    with stranger as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    metrics = httpx.get(f"{locked.url}/metrics", headers={"authorization": f"bearer {KEY}"})
    assert metrics.status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/version"])
def test_probes_need_no_key(locked: RunningServer, path: str) -> None:
    # With a key there is no check of the name, because a proxy may use any.
    assert httpx.get(locked.url + path, headers={"host": "models.example.com"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1", "a:b"])
def test_another_sites_name_is_not_answered(http: httpx.Client, host: str) -> None:
    answer = http.get("/v1/models", headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:9997", "localhost.:1"])
def test_this_machines_names_are_answered(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_what_a_web_page_can_send_unasked_is_refused(http: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = http.post(PATH, content=httpx.Request("POST", "http://x", json=BODY).content, headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"


def test_json_may_name_its_encoding(http: httpx.Client) -> None:
    content = httpx.Request("POST", "http://x", json=BODY).content
    kinds = {"content-type": "Application/JSON; charset=utf-8"}
    assert http.post(PATH, content=content, headers=kinds).status_code == 200
    packed = http.post(PATH, content=content, headers=kinds | {"content-encoding": "gzip"})
    assert packed.status_code == 415


def test_a_web_page_may_not_ask(http: httpx.Client) -> None:
    headers = {
        "origin": "https://evil.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    answer = http.options(PATH, headers=headers)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_request_ids(http: httpx.Client, server: RunningServer, eventually: Eventually) -> None:
    sane = http.get("/health", headers={"x-request-id": "trace-1.a:b"})
    assert sane.headers["x-request-id"] == "trace-1.a:b"
    for odd in ("a b", "x" * 129, "\u00e9", 'a"b', ""):
        made = http.get("/health", headers={"x-request-id": odd.encode("latin-1")}).headers["x-request-id"]
        assert len(made) == 32
    refused = http.post(PATH, json={}, headers={"x-request-id": "trace-2"})
    assert refused.headers["x-request-id"] == "trace-2"
    # The line is written once the answer has been sent.
    eventually(lambda: "[trace-2]" in server.log.read_text())


def test_status_pages(http: httpx.Client, client: openai.OpenAI) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    version = http.get("/version").json()
    assert version["model"] == "model"
    assert version["version"]
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("model", "model", "foveate")
    assert client.models.retrieve("model") == model


def test_the_description(http: httpx.Client) -> None:
    assert http.get("/docs").status_code == 200
    description = http.get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    request = schemas["ChatCompletionRequest"]["properties"]
    assert {"messages", "top_k", "stop", "stream_options"} <= request.keys()

    def references(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            yield from [str(node["$ref"])] if isinstance(node.get("$ref"), str) else []
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    named = {reference.removeprefix("#/components/schemas/") for reference in references(description)}
    assert named
    assert named <= schemas.keys()


def test_metrics(http: httpx.Client, server: RunningServer, eventually: Eventually) -> None:
    counted = [
        'foveate_requests_total{route="/v1/chat/completions",status="200"}',
        "foveate_prompt_tokens_total",
        "foveate_completion_tokens_total",
        "foveate_time_to_first_token_seconds_count",
        "foveate_time_per_output_token_seconds_count",
        "foveate_request_seconds_count",
        "foveate_engine_generated_tokens_total",
        "foveate_engine_finished_total",
    ]
    assert http.post(PATH, json=BODY | {"ignore_eos": True}).status_code == 200
    before = [server.metric(name) for name in counted]
    assert http.post(PATH, json=BODY | {"ignore_eos": True}).status_code == 200
    # Some are counted once the answer has been sent.
    eventually(lambda: all(server.metric(name) > early for name, early in zip(counted, before, strict=True)))
    assert server.metric(counted[2]) == before[2] + 2
