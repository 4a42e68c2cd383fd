"""Clients for the tests of the API, and the checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from serving import TINY_MODEL, RunningServer

from foveate.chat.assets import ModelAssets


@pytest.fixture(scope="session")
def assets() -> ModelAssets:
    """What the server knows of its checkpoint."""
    return ModelAssets.from_folder(TINY_MODEL)


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """OpenAI's own client; it does not try again, so that every refusal is seen."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A bare client, for what OpenAI's would never send."""
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made
