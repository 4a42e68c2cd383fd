"""Measures the demo model on unseen conversations, over HTTP: ``python -m training.evaluate --help``.

Every answer is compared with the only right one, character by character.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from training.world.conversation import HELD_OUT, Conversation, Turn, draw
from training.world.vocabulary import LANGUAGES

# Where the questions of a category come from; only those of small text have pictures that are sliced.
_SCENE = ("shape", "colour", "count", "place", "size", "describe", "compare", "relation", "yes_no", "absent")
CATEGORY_FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_SCENE, ("scene",)),
    "text": ("text",),
    "small_text": ("small_text",),
    "chart": ("chart",),
    "receipt": ("receipt",),
    "difference": ("pair",),
    "pair": ("pair",),
    "follow_up": ("scene", "scene", "text", "chart", "receipt", "pair"),
    "chat": ("chat",),
}
# Rows of the table: name, categories, detail of the pictures.
ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("shapes", ("shape", "colour", "count", "place"), "auto"),
    ("  shape", ("shape",), "auto"),
    ("  colour", ("colour",), "auto"),
    ("  count", ("count",), "auto"),
    ("  place", ("place",), "auto"),
    ("text", ("text",), "auto"),
    ("small text", ("small_text",), "auto"),
    ("small text, detail low", ("small_text",), "low"),
    ("difference", ("difference",), "auto"),
    ("follow-up", ("follow_up",), "auto"),
    *((name.replace("_", "/"), (name,), "auto") for name in (*_SCENE[4:], "chart", "receipt", "pair", "chat")),
)


@dataclass(frozen=True)
class Question:
    """One turn of a conversation, with the true turns before it where it needs them."""

    pictures: Sequence[Image.Image]
    history: tuple[Turn, ...]
    turn: Turn
    detail: str = "auto"

    def messages(self) -> list[dict[str, object]]:
        """The request's messages; all pictures belong to the first one."""
        messages: list[dict[str, object]] = []
        for index, turn in enumerate((*self.history, self.turn)):
            content: list[dict[str, object]] = []
            if index == 0:
                for picture in self.pictures:
                    image = {"url": data_url(picture), "detail": self.detail}
                    content.append({"type": "image_url", "image_url": image})
            content.append({"type": "text", "text": turn.question})
            messages.append({"role": "user", "content": content})
            if turn is not self.turn:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages


@dataclass(frozen=True)
class Result:
    """What was answered."""

    question: Question
    answer: str

    @property
    def right(self) -> bool:
        return self.answer == self.question.turn.answer


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def questions_of(conversation: Conversation) -> list[Question]:
    """Every turn as a question of its own; only follow-ups are given what came before."""
    found = []
    for index, turn in enumerate(conversation.turns):
        history = tuple(conversation.turns[:index]) if turn.category == "follow_up" else ()
        found.append(Question(conversation.pictures, history, turn))
    return found


def held_out(category: str, language: str, count: int) -> list[Question]:
    """``count`` questions of a category from unseen seeds, at most two about the same pictures."""
    families = CATEGORY_FAMILIES[category]
    found: list[Question] = []
    seed = HELD_OUT
    while len(found) < count:
        conversation = draw(seed, family=families[seed % len(families)], language=language, stage=0.0)
        fitting = [one for one in questions_of(conversation) if one.turn.category == category]
        distinct = list({one.turn.answer: one for one in fitting}.values())
        found += distinct[: min(2, count - len(found))]
        seed += 1
    return found


def score(conversations: Iterable[Conversation], ask: Callable[[Question], str]) -> list[Result]:
    """Ask everything about some conversations, one question after another."""
    return [Result(one, ask(one)) for each in conversations for one in questions_of(each)]


def accuracies(results: Sequence[Result]) -> dict[str, dict[str, dict[str, float]]]:
    """For each row of the table and each language (and both): accuracy (0 to 1) and number of questions."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, categories, detail in ROWS:
        row = {}
        for language in (*LANGUAGES, "both"):
            flags = [
                result.right
                for result in results
                if result.question.turn.category in categories
                and result.question.detail == detail
                and language in (result.question.turn.language, "both")
            ]
            if flags:
                row[language] = {"accuracy": sum(flags) / len(flags), "questions": len(flags)}
        if row:
            table[name.strip()] = row
    return table


def as_table(results: Sequence[Result]) -> Table:
    """The accuracies for reading."""
    table = Table(title="Held-out accuracy, exact match (%)")
    table.add_column("questions")
    for column in (*LANGUAGES, "both", "n"):
        table.add_column(column, justify="right")
    found = accuracies(results)
    for name, _, _ in ROWS:
        row = found.get(name.strip())
        if row:
            cells = [f"{100 * row[one]['accuracy']:.1f}" if one in row else "" for one in (*LANGUAGES, "both")]
            table.add_row(name, *cells, str(int(row["both"]["questions"])))
    return table


async def ask_all(url: str, questions: Sequence[Question], concurrency: int, progress: Progress) -> list[Result]:
    """Ask a server, ``concurrency`` questions at a time.

    Raises:
        httpx.HTTPError: it does not answer, or refuses a question.
    """
    task = progress.add_task("asking", total=len(questions))
    turnstile = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]

        async def ask(question: Question) -> Result:
            async with turnstile:
                body = {"model": model, "messages": question.messages(), "temperature": 0, "max_tokens": 200}
                response = await client.post("/v1/chat/completions", json=body)
            progress.advance(task)
            answer = response.raise_for_status().json()["choices"][0]["message"]["content"]
            return Result(question, answer)

        return await asyncio.gather(*(ask(question) for question in questions))


def make_questions(per_category: int, languages: Sequence[str], progress: Progress) -> list[Question]:
    """Every category in every language; small text twice, the second time without slices."""
    task = progress.add_task("drawing", total=len(CATEGORY_FAMILIES) * len(languages))
    questions: list[Question] = []
    for category in CATEGORY_FAMILIES:
        for language in languages:
            found = held_out(category, language, per_category)
            questions += found
            if category == "small_text":
                questions += [Question(one.pictures, one.history, one.turn, "low") for one in found]
            progress.advance(task)
    return questions


def write_json(path: Path, results: Sequence[Result]) -> None:
    """The table, and every question that was answered wrongly."""
    wrong = [
        {
            "category": result.question.turn.category,
            "detail": result.question.detail,
            "question": result.question.turn.question,
            "expected": result.question.turn.answer,
            "answer": result.answer,
        }
        for result in results
        if not result.right
    ]
    report = {"accuracy": accuracies(results), "wrong": wrong}
    path.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:9997")
    parser.add_argument("--per-category", type=int, default=100, help="questions a category and language")
    parser.add_argument("--language", choices=LANGUAGES, help="only this one")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the table and the wrong answers here")
    args = parser.parse_args()
    console = Console()
    languages = (args.language,) if args.language else LANGUAGES
    with Progress(console=console) as progress:
        questions = make_questions(args.per_category, languages, progress)
        try:
            results = asyncio.run(ask_all(args.url, questions, args.concurrency, progress))
        except httpx.HTTPError as error:
            raise SystemExit(f"{args.url}: {error}") from error
    console.print(as_table(results))
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
