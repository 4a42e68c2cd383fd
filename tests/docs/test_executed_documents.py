"""What the documents tell people to type is typed here, block after block, and must do what they show."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from markdown_blocks import Block, blocks_of
from serving import ROOT
from shell_session import DocumentError, reading

DOCUMENTS = (
    "README.md",
    "README.zh.md",
    "docs/index.md",
    "docs/walkthrough.md",
    "docs/walkthrough.zh.md",
    "docs/quantization.md",
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_does_what_the_document_says(name: str) -> None:
    blocks = [block for block in blocks_of(ROOT / name) if block.reason is None]
    assert blocks, "there is nothing to run"
    # Not pytest's own folder: its name is too long for sockets.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder, reading(Path(folder)) as reader:
        for block in blocks:
            reader.do(block)


def block(content: str, shown: str | None = None, title: str = "") -> Block:
    return Block(Path("page.md"), 7, "sh", content, title, shown)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (block("true\nfalse\n"), "page.md, line 7: exit code 1"),
        (block("false | true\n"), "page.md, line 7: exit code 1"),
        (block("echo $NOBODY_SET_THIS\n"), "page.md, line 7: exit code 1"),
        (block("echo no\n", "yes\n"), "page.md, line 7: printed something else"),
        (block("echo gone\n", title="In a terminal of its own"), "page.md, line 7: did not get ready"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(wrong: Block, told: str, tmp_path: Path) -> None:
    with reading(tmp_path) as reader:
        reader.do(block("there=yes; cd foveate\n"))
        reader.do(block("test $there = yes; pwd; cat\n", "/home/you/foveate/foveate\n"))
        with pytest.raises(DocumentError) as caught:
            reader.do(wrong)
    assert told in str(caught.value)
