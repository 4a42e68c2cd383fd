"""Pages for people: the dashboard at ``/``, the reference at ``/docs``, and the files that both are made of.

They come from the package alone, hold nothing but themselves, and need no key: what they show they ask for, with the
key that is typed into them. A browser is told to load nothing from elsewhere and to run no script of the page's text.
"""

from __future__ import annotations

import time
from importlib import resources
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

from foveate.api import docs
from foveate.api.errors import json_response
from foveate.api.incidents import Incidents
from foveate.engine.client import EngineClient
from foveate.version import version
from foveate.vision.client import VisionClient

_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # A new version's files are not to be mixed with an old one's.
    "cache-control": "no-cache",
}
_PLACE_OF_KEY = b'data-key="none"'


def add_pages(app: FastAPI, *, needs_key: bool) -> None:
    """Serve the pages and their files.

    Args:
        app: the application.
        needs_key: whether ``/metrics`` and ``/status`` do: then the dashboard asks for it before it asks for them.
    """
    files = {file.name: file.read_bytes() for file in (resources.files("foveate.api") / "static").iterdir()}
    assert _PLACE_OF_KEY in files["dashboard.html"]
    if needs_key:
        files["dashboard.html"] = files["dashboard.html"].replace(_PLACE_OF_KEY, b'data-key="needed"')

    def answer(name: str) -> Response:
        kind = _TYPES["." + name.rpartition(".")[2]]
        return Response(files[name], headers={**_HEADERS, "content-type": f"{kind}; charset=utf-8"})

    @app.get("/", include_in_schema=False)
    async def dashboard() -> Response:
        return answer("dashboard.html")

    @app.get("/docs", include_in_schema=False)
    async def reference() -> Response:
        return answer("docs.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return answer(name)


def add_status(app: FastAPI, model_name: str, engine: EngineClient, vision: VisionClient, incidents: Incidents) -> None:
    """Serve ``/status``: what ``/metrics`` cannot say in numbers."""
    started = time.time()

    @app.get("/status", openapi_extra=docs.STATUS)
    async def show_status() -> Response:
        """Say what is served, how it is, and what went wrong lately: the latest 25 failures and 25 refusals."""
        facts: dict[str, Any] = {
            "version": version(),
            "model": model_name,
            "started": started,
            "state": _state(engine, vision),
            "problems": vision.problems,
            "device": engine.ready.device if engine.ready else None,
            "dtype": engine.ready.dtype if engine.ready else None,
            "errors": incidents.latest(),
            "error_counts": incidents.counts,
            # A web chat in the same application is linked as soon as there is one.
            "links": {"Chat": "ui"} if _serves(app, "/ui") else {},
        }
        return json_response(facts, headers={"x-content-type-options": "nosniff", "cache-control": "no-store"})


def _state(engine: EngineClient, vision: VisionClient) -> str:
    if engine.ready is None:
        return "starting"
    return "degraded" if vision.problems else "ready"


def _serves(app: FastAPI, path: str) -> bool:
    return any(getattr(route, "path", None) in (path, f"{path}/") for route in app.routes)
