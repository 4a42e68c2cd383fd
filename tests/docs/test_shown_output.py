"""What counts as the output that a document shows."""

from __future__ import annotations

import pytest
from markdown_blocks import blocks_of
from serving import ROOT
from shown_output import difference


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        (
            "demo: ready: http://127.0.0.1:9997 (model demo, 2.1 s)",
            "demo: ready: http://127.0.0.1:4 (model demo, 12.3 s)",
        ),
        ("9997,unix  demo  19643  ready  2s", "44,unix demo    7  ready     1m 2s".replace("1m 2s", "12s")),
        ("a\n...\nb", "a\n1\n2\nb"),
        ("a\n...\nb", "a\nb"),
        ("0.0035 nats of 283,719 bytes", "0.0036 nats of 283,720 bytes"),
        ('{"id":"chatcmpl-' + 32 * "a" + '","created":1}', '{"id":"chatcmpl-' + 32 * "0" + '","created":22}'),
    ],
)
def test_what_may_differ(shown: str, printed: str) -> None:
    assert difference(shown, printed) is None


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("There are 3 shapes.", "There are 4 shapes."),
        ("a circle", "a square"),
        ("a\n...\nb", "a\n1"),
        ("a", "a\nb"),
        ("a\nb", "a"),
        ("", "a"),
        ("0.0035 nats", "0.0055 nats"),
        ("9997,unix  demo  1  ready  2s", "9997,unix  demo  1  degraded  2s"),
        ('"total_tokens":33', '"total_tokens":34'),
    ],
)
def test_what_may_not(shown: str, printed: str) -> None:
    assert difference(shown, printed) is not None


def test_the_documents_show_something() -> None:
    """A document whose outputs were in blocks of another kind would not be compared."""
    for name in ("docs/walkthrough.md", "docs/walkthrough.zh.md"):
        assert sum(block.shown is not None and block.reason is None for block in blocks_of(ROOT / name)) >= 12
