"""What the pages say of the code: generated pages are current, and messages, files, flags and figures are there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from serving import ROOT, RunningServer

from foveate.api import reference, schema
from foveate.checkpoint import cards
from foveate.config import EngineSettings, ModelSettings, Settings
from foveate.deploy.fields import flags
from foveate.media.slicing import plan_slices

DOCS = ROOT / "docs"
OURS = sorted(
    DOCS / f"{name}.md" for name in ("adding-a-model", "quantization", "real-model", "security", "troubleshooting")
)
ANYTHING = "…"


@pytest.mark.parametrize(("name", "maker"), [("api", reference), ("real-model", cards)])
def test_made_pages_are_current(name: str, maker: ModuleType) -> None:
    # In a process of its own: other tests have errors of their own, which this one knows then.
    made = subprocess.run([sys.executable, "-m", maker.__name__], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == made.stdout, "make docs-reference"


def test_the_reference_has_every_route(server: RunningServer) -> None:
    served = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path.replace(':path', '')}" for path, methods in served.items() for method in methods}
    pages = {"GET /", "GET /docs", "GET /openapi.json", "GET /ui"}
    assert routes | pages == {route for route, _, _ in reference.ENDPOINTS}


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **fields}


def test_what_the_reference_calls_refused_is() -> None:
    named = [name for names in reference.REFUSED.values() for name in names]
    wrong = [request(**{name: 1}) for name in named]
    wrong += [request(messages=[{"role": role, "content": "Hello"}]) for role in reference.ROLES]
    wrong += [request(messages=[{"role": "user", "content": [{"type": part}]}]) for part in reference.PARTS]
    schema.ChatCompletionRequest.model_validate(request())
    for body in wrong:
        with pytest.raises(ValidationError) as caught:
            schema.ChatCompletionRequest.model_validate(body)
        assert caught.value.errors()[0]["type"] in ("extra_forbidden", "union_tag_invalid"), body


def test_the_reference_has_every_field_once() -> None:
    (request_fields,) = re.findall(r"### ChatCompletionRequest\n(.*?)\n### ", reference.page(), re.DOTALL)
    (refused,) = re.findall(r"## What is refused\n(.*?)\n## ", reference.page(), re.DOTALL)
    for name in schema.ChatCompletionRequest.model_fields:
        known = len(re.findall(rf"^\| `{name}`", request_fields, re.MULTILINE))
        not_supported = len(re.findall(rf"^\| ChatCompletionRequest \| `{name}` ", refused, re.MULTILINE))
        is_supported = reference.neutral_values(schema.ChatCompletionRequest, name) is None
        assert (known, not_supported) == ((1, 0) if is_supported else (0, 1)), name
    assert "`tools`" in refused


def test_the_cards_request_is_as_large_as_the_page_says() -> None:
    plan = plan_slices(1344, 1344, max_slice_nums=9)
    picture = plan.num_slices * (64 + 2)
    assert plan.num_slices == 10
    assert picture + 512 < cards.PICTURE_TOKENS < picture + 1024


def test_the_cards_flags_are_what_was_planned() -> None:
    known = {flag.name: flag for flag in flags()}
    for choice in cards.CHOICES:
        words = choice.flags.split()
        for name in (word for word in words if word.startswith("--")):
            assert name.replace("--no-", "--") in known
        value = dict(pairwise([*words, ""]))
        assert value.get("--max-num-tokens", str(EngineSettings().max_num_tokens)) == str(choice.max_num_tokens)
        assert value.get("--vision-batch-size", str(Settings().vision.vision_batch_size)) == str(
            choice.vision_batch_size
        )
        assert ("--quantize-vision" in words) == choice.vision
        assert ("--no-cuda-graphs" in words) == (not choice.cuda_graphs)
    assert not ModelSettings().quantize_vision


def test_the_cards_say_what_does_not_fit() -> None:
    for card, method, fits in ((12, "none", False), (16, "none", False), (24, "none", True), (12, "int4", True)):
        assert cards.plan_for(card, method, "auto", cards.Choice(), 8).fits == fits


@cache
def literals() -> tuple[str, ...]:
    """Every text in the source, with ``…`` for what is put in, and the Makefile's."""
    found = [(ROOT / "Makefile").read_text().replace("$(PYTHON)", ANYTHING)]
    for path in (ROOT / "foveate").rglob("*.py"):
        found += _texts(ast.parse(path.read_text(encoding="utf-8")))
    return tuple(" ".join(text.split()) for text in found)


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(_constant(part) for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Texts that are filled in later.
            yield re.sub(r"%[a-z.0-9]+|\{\w*\}", ANYTHING, node.value)


def _constant(part: ast.expr) -> str:
    return part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else ANYTHING


def messages() -> list[str]:
    """Every message of the troubleshooting page: the code in the first column of its tables of messages."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## It works, and is not")[0]
    return [
        message
        for cell in re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE)
        for message in re.findall("`([^`]+)`", cell)
    ]


def test_there_are_messages() -> None:
    assert len(messages()) > 40


@pytest.mark.parametrize("message", messages())
def test_messages_are_in_the_source(message: str) -> None:
    # Two things that are put in one behind the other look like one.
    wanted = re.sub("…+", ANYTHING, message)
    assert any(wanted in re.sub("…+", ANYTHING, text) for text in literals())


@pytest.mark.parametrize("page", OURS, ids=lambda path: path.stem)
def test_files_and_flags_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.*-]+)`", text):
        if "." in name.rpartition("/")[2]:
            assert any(list(base.glob(name)) for base in (ROOT, ROOT / "foveate")), name
    known = {name for flag in flags() for name in (flag.name, f"--no-{flag.name[2:]}")}
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "foveate").rglob("*.py"))
    for name in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
        argument = name[2:].replace("-", "_")
        assert name in known or name in sources or re.search(rf"^    {argument}_?: ", sources, re.MULTILINE), name


def test_links_to_the_repository_name_files_that_are_there() -> None:
    places = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "README.zh.md"]
    for page in places:
        for path in re.findall(
            r"github\.com/foveate/foveate/(?:blob|tree)/main/([^)\s#]+)", page.read_text(encoding="utf-8")
        ):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
    for page in places[-2:]:
        for path in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
