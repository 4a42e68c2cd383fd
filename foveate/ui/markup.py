"""HTML of the page's own making. Whatever comes from a model, a user or a server is escaped here or made harmless."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from foveate.ui.facts import STAGES, Facts, Seen

_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_FENCE = re.compile(r"(`{3,}(?=[^`]*$)|~{3,})")
_MOST_CELLS = 144


def harmless(text: str) -> str:
    """Return Markdown in which no ``<`` begins HTML: an invisible character follows it, except in code blocks.

    The page renders the text as Markdown, which lets HTML through.
    """
    lines = []
    fence = ""
    for line in text.split("\n"):
        found = _FENCE.match(line)
        if not fence and found:
            fence = found[1]
        elif fence and line.startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        elif not fence:
            line = _TAG.sub("<\u2060", line)
        lines.append(line)
    return "\n".join(lines)


def thumbnails(urls: Sequence[str], names: Sequence[str]) -> str:
    """Show a question's pictures."""
    return f'<div class="fv-pictures">{"".join(_shown(*one) for one in zip(urls, names, strict=True))}</div>'


def _shown(url: str, name: str) -> str:
    if not url:
        return f'<div class="fv-broken" title="{escape(name)}">{escape(name)}</div>'
    return f'<img src="{escape(url)}" alt="{escape(name)}" title="{escape(name)}">'


def error_box(message: str, words: Mapping[str, str]) -> str:
    """Show why there is no answer, or no more of it."""
    return f'<div class="fv-error" role="alert"><b>{words["error"]}</b> {escape(message)}</div>'


def facts_box(facts: Facts, pictures: Sequence[tuple[str, str]], words: Mapping[str, str], note: str = "") -> str:
    """Show one line of numbers, which unfolds to the stages and the slices.

    Args:
        facts: what is known.
        pictures: names and thumbnails of the request's pictures, in the order of the conversation.
        words: the page's language.
        note: how the answer ended, if not by itself.
    """
    line = " · ".join(_line(facts, words))
    if note:
        line = f'<span class="fv-note">{note}</span>' + (f" · {line}" if line else "")
    more = _stages(facts, words)
    # A server that tells of other pictures than were sent means something else.
    if len(pictures) == len(facts.seen):
        more += "".join(_grid(one, *picture, words) for one, picture in zip(facts.seen, pictures, strict=True))
    if not more:
        return f'<div class="fv-facts">{line}</div>' if line else ""
    return f'<details class="fv-facts"><summary>{line}</summary><div class="fv-more">{more}</div></details>'


def _line(facts: Facts, words: Mapping[str, str]) -> Iterator[str]:
    if facts.prompt_tokens is not None:
        if facts.image_tokens is None:
            yield f"{facts.prompt_tokens} {words['tokens']}"
        else:
            text = facts.prompt_tokens - facts.image_tokens
            yield f"{text} {words['text_tokens']} + {facts.image_tokens} {words['picture_tokens']} {words['tokens']}"
    if facts.cached_tokens is not None:
        yield f"{facts.cached_tokens} {words['cached']}"
    if facts.completion_tokens is not None:
        yield f"{words['answer_tokens']} {facts.completion_tokens}"
    if facts.first_token_seconds is not None:
        yield f"{words['first_token']} {seconds(facts.first_token_seconds)}"
    if facts.tokens_per_second is not None:
        yield f"{facts.tokens_per_second:.{0 if facts.tokens_per_second >= 100 else 1}f} {words['per_second']}"


def _stages(facts: Facts, words: Mapping[str, str]) -> str:
    """Draw the way to the first token as a bar. What no stage accounts for is the network's, or waiting."""
    found = [(name, facts.timings[name]) for name in STAGES if facts.timings.get(name, 0) > 0]
    if not found:
        return ""
    whole = facts.first_token_seconds or 0.0
    rest = whole - sum(value for _, value in found)
    if rest > 0:
        found.append(("other", rest))
    bar = "".join(
        f'<i class="fv-{name}" style="flex-grow:{value * 1000:.3f}" title="{words[name]} {seconds(value)}"></i>'
        for name, value in found
    )
    legend = "".join(
        f'<span><i class="fv-{name}"></i>{words[name]} <b>{seconds(value)}</b></span>' for name, value in found
    )
    title = f'<div class="fv-title">{words["stages"]} <b>{seconds(whole)}</b></div>'
    return f'{title}<div class="fv-bar">{bar}</div><div class="fv-legend">{legend}</div>'


def _grid(seen: Seen, name: str, thumbnail: str, words: Mapping[str, str]) -> str:
    """Draw the slices over the picture, each with its tokens."""
    each = seen.tokens // seen.slices if seen.slices else seen.tokens
    cells = ""
    if seen.grid is not None:
        columns, rows = seen.grid
        if columns * rows <= _MOST_CELLS:
            cell = f"<span>{each}</span>"
            cells = f'<div class="fv-cells" style="--columns:{columns};--rows:{rows}">{cell * (columns * rows)}</div>'
        how = f"{words['overview']} {each} + {columns}×{rows} × {each} = <b>{seen.tokens} {words['tokens']}</b>"
    else:
        how = f"<b>{seen.tokens} {words['tokens']}</b>, {words['no_slices']}"
    cached = f" · {words['from_cache']}" if seen.cached else ""
    caption = f"<figcaption>{escape(name)} · {seen.width}×{seen.height}<br>{how}{cached}</figcaption>"
    return f'<figure class="fv-slices"><div>{_shown(thumbnail, name)}{cells}</div>{caption}</figure>'


def seconds(value: float) -> str:
    """Write a time with as many digits as mean something."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.{0 if value >= 0.01 else 1}f} ms"
