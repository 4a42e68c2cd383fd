"""The API's description (OpenAPI), made from the types that do the work.

Requests are read and answers written without the framework, so it has to be told what they look like.
The page at ``/docs`` (``static/docs.js``) is made of ``/openapi.json`` in the browser.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from foveate.api.completion import ChatCompletion, ChatCompletionChunk, Model, ModelList
from foveate.api.errors import ErrorBody
from foveate.api.schema import ChatCompletionRequest

_REF = "#/components/schemas/{name}"
_ANSWERS = (ChatCompletion, ChatCompletionChunk, Model, ModelList, ErrorBody)


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=name)}}}


def _operation(description: str, content: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "responses": {
            "200": {"description": description, "content": content},
            "default": {"description": "An error, in OpenAI's shape.", "content": _json("ErrorBody")},
        },
        **more,
    }


_EVENTS = {"text/event-stream": {"schema": {"$ref": _REF.format(name="ChatCompletionChunk")}}}
CHAT_COMPLETION = _operation(
    "The answer; with `stream`, server-sent events that end with `[DONE]`.",
    _json("ChatCompletion") | _EVENTS,
    requestBody={"required": True, "content": _json("ChatCompletionRequest")},
)
MODEL_LIST = _operation("All models.", _json("ModelList"))
MODEL = _operation("The model.", _json("Model"))
STATUS = _operation("Yes.", {"application/json": {"schema": {"type": "object"}}})
METRICS = _operation("All metrics.", {"text/plain": {"schema": {"type": "string"}}})


class DocumentedApp(FastAPI):
    """An application whose description includes our own types."""

    def openapi(self) -> dict[str, Any]:
        """Return the description, made once."""
        if not self.openapi_schema:
            schemas = super().openapi().setdefault("components", {}).setdefault("schemas", {})
            _, answers = msgspec.json.schema_components(_ANSWERS, ref_template=_REF)
            template = _REF.format(name="{model}")
            _, requests = models_json_schema([(ChatCompletionRequest, "validation")], ref_template=template)
            schemas |= answers | requests["$defs"]
        assert self.openapi_schema is not None
        return self.openapi_schema
