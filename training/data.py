"""Conversations of the demo world as tensors: what one worker process hands to the training loop."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from foveate.chat.assets import ModelAssets
from foveate.chat.pieces import Prompt
from foveate.chat.template import Message, Part, PicturePart, TextPart
from foveate.media.slicing import SlicePlan, plan_slices
from foveate.vision.preprocess import preprocess
from training.world.conversation import HELD_OUT, draw, families_at
from training.world.records import Conversation, Mark, Turn

CELLS = 4
"""Columns of a patch that are labelled each: the smallest print has two characters in a patch, and more."""
APART = 0.75
"""Share of the conversations whose questions do not see each other."""
BACKGROUND = 1 / 16
"""Share of the patches without anything in them that are labelled."""


@dataclass
class Sample:
    """One conversation, tokenized.

    The pictures come once, then segments: what does not belong together must not see each other, or every second
    question would be answered by copying an earlier answer instead of looking.

    Attributes:
        token_ids: the common beginning, then the segments.
        positions: each token's place in its own segment, the common beginning included.
        segments: 0 for the common beginning, then 1, 2, ...
        spans: (first, end, turn) of the tokens of each answer.
        image_rows: tokens that stand for rows of embeddings.
        tgt_sizes: (rows, columns) of each slice in patches.
        patches: uint8 [patches, 588].
        labels: uint8 [patches, CELLS], what each column of each patch shows.
        conversation: where all this comes from.
    """

    token_ids: list[int]
    positions: list[int]
    segments: list[int]
    spans: list[tuple[int, int, int]]
    image_rows: list[int]
    tgt_sizes: list[tuple[int, int]]
    patches: np.ndarray
    labels: np.ndarray
    conversation: Conversation


def encode(conversation: Conversation, assets: ModelAssets, *, apart: bool) -> Sample:
    """Turn a conversation into token ids, patches and labels, exactly as the server would.

    Args:
        conversation: pictures and turns.
        assets: tokenizer, template, how pictures are cut.
        apart: make a segment of every question with its follow-ups, instead of one of the whole conversation.
    """
    plans = [_plan(picture.size, assets) for picture in conversation.pictures]
    units = _units(conversation.turns) if apart and plans else [conversation.turns]
    prompts = [_prompt(unit, plans, assets) for unit in units]
    # Everything up to the last picture's closing token is the same for all of them.
    common = max((start + length + 1 for ranges in prompts[0].image_ranges for start, length in ranges), default=0)
    ids = prompts[0].token_ids[:common]
    positions, segments = list(range(common)), [0] * common
    spans: list[tuple[int, int, int]] = []
    for number, prompt in enumerate(prompts, start=1):
        shift = len(ids) - common
        found = _answer_spans(prompt.token_ids, assets)
        spans += [(first + shift, end + shift, len(spans) + turn) for turn, (first, end) in enumerate(found)]
        ids += prompt.token_ids[common:]
        positions += range(common, len(prompt.token_ids))
        segments += [number] * (len(prompt.token_ids) - common)
    pixels = [
        preprocess(picture.convert("RGB"), plan) for picture, plan in zip(conversation.pictures, plans, strict=True)
    ]
    marked = zip(conversation.marks, conversation.pictures, plans, strict=True)
    labels = [label_patches(marks, picture.size, plan) for marks, picture, plan in marked]
    ranges = [one for each in prompts[0].image_ranges for one in each]
    return Sample(
        token_ids=ids,
        positions=positions,
        segments=segments,
        spans=spans,
        image_rows=[row for start, length in ranges for row in range(start, start + length)],
        tgt_sizes=[size for plan in plans for size in plan.tgt_sizes],
        patches=np.concatenate([p.patches for p in pixels]) if pixels else np.zeros((0, 588), np.uint8),
        labels=np.concatenate(labels) if labels else np.zeros((0, CELLS), np.uint8),
        conversation=conversation,
    )


def _plan(size: tuple[int, int], assets: ModelAssets) -> SlicePlan:
    settings = assets.pictures
    return plan_slices(
        *size,
        max_slice_nums=settings.max_slice_nums,
        scale_resolution=settings.scale_resolution,
        patch_size=settings.patch_size,
    )


def _units(turns: list[Turn]) -> list[list[Turn]]:
    """Split turns into questions, each with the follow-ups that need it."""
    units: list[list[Turn]] = []
    for turn in turns:
        if turn.category == "follow_up" and units:
            units[-1].append(turn)
        else:
            units.append([turn])
    return units


def _prompt(turns: list[Turn], plans: list[SlicePlan], assets: ModelAssets) -> Prompt:
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        parts: list[Part] = [PicturePart(plan) for plan in plans] if index == 0 else []
        messages.append(Message("user", [*parts, TextPart(turn.question)]))
        messages.append(Message("assistant", [TextPart(turn.answer)]))
    pieces = assets.template.render(messages, assets.pictures, add_generation_prompt=False)
    return assets.tokenizer.encode_prompt(pieces)


def _answer_spans(ids: list[int], assets: ModelAssets) -> list[tuple[int, int]]:
    start_id, end_id = (assets.tokenizer.token_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    header = [start_id, *assets.tokenizer.encode_text("assistant\n")]
    spans = []
    for position, token in enumerate(ids):
        if token == start_id and ids[position : position + len(header)] == header:
            first = position + len(header)
            spans.append((first, ids.index(end_id, first) + 1))
    return spans


def label_patches(marks: list[Mark], size: tuple[int, int], plan: SlicePlan) -> np.ndarray:
    """Say what each of ``CELLS`` columns of each patch shows: uint8 [patches, CELLS], 0 where there is nothing."""
    width, height = size
    boxes = np.array([mark.box for mark in marks], np.float64).reshape(-1, 4)
    names = [mark.label for mark in marks]
    views = [(0.0, 0.0, 1.0, 1.0, plan.tgt_sizes[0])]
    if plan.grid is not None:
        columns, rows = plan.grid
        views += [(c / columns, r / rows, 1 / columns, 1 / rows, plan.tgt_sizes[1])
                  for r in range(rows) for c in range(columns)]  # fmt: skip
    grids = []
    for left, top, across, down, (patch_rows, patch_columns) in views:
        grid = np.zeros((patch_rows, patch_columns * CELLS), np.uint8)
        c0, c1 = _cells(
            (boxes[:, 0] - left * width) / (width * across),
            (boxes[:, 2] - left * width) / (width * across),
            patch_columns * CELLS,
        )
        r0, r1 = _cells(
            (boxes[:, 1] - top * height) / (height * down),
            (boxes[:, 3] - top * height) / (height * down),
            patch_rows,
        )
        for index in np.flatnonzero((c1 > c0) & (r1 > r0)):
            grid[r0[index] : r1[index], c0[index] : c1[index]] = names[index]
        grids.append(grid.reshape(-1, CELLS))
    return np.concatenate(grids)


def _cells(first: np.ndarray, last: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of 0..count with their centre in [first, last] (fractions); the nearest one for less than a cell."""
    start, end = np.ceil(first * count - 0.5).astype(int), np.ceil(last * count - 0.5).astype(int)
    middle = np.floor((first + last) / 2 * count).astype(int)
    start, end = np.where(end <= start, middle, start), np.where(end <= start, middle + 1, end)
    return start.clip(0, count), end.clip(0, count)


class World(IterableDataset):
    """An endless stream of batches of ``size`` conversations, different in every worker.

    ``stage`` is the generator's; ``mix`` has shares of the families, if they are not to be those of the stage.
    """

    def __init__(self, model: Path, size: int, seed: int, stage: float, mix: dict[str, float]) -> None:
        super().__init__()
        self.model, self.size, self.seed, self.stage, self.mix = model, size, seed, stage, mix

    def __iter__(self) -> Iterator[dict[str, object]]:
        torch.set_num_threads(1)
        if get_worker_info():
            # The process that drives the device goes first.
            os.nice(10)
        assets = ModelAssets.from_folder(self.model)
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        seed = self.seed + worker
        while True:
            samples = []
            while len(samples) < self.size:
                family = families_at(self.stage, seed)
                if self.mix:
                    family = random.Random(f"mix {seed}").choices([*self.mix], [*self.mix.values()])[0]
                conversation = draw(seed % HELD_OUT, family=family, stage=self.stage)
                # Some stay whole, so that real conversations are known too.
                apart = random.Random(f"apart {seed}").random() < APART
                samples.append(encode(conversation, assets, apart=apart))
                seed += workers
            yield collate(samples)


def collate(samples: list[Sample]) -> dict[str, object]:
    """Pack samples: patches and tokens one after another, ``lengths`` tokens each.

    ``labels`` are those of the patches ``labelled``: all that show something, and one in sixteen of the others,
    which would outweigh everything.
    """
    rows: list[int] = []
    answering: list[int] = []
    targets: list[int] = []
    turns: list[int] = []
    categories: list[str] = []
    before = 0
    for sample in samples:
        rows += [before + row for row in sample.image_rows]
        for first, end, turn in sample.spans:
            answering += range(before + first - 1, before + end - 1)
            targets += sample.token_ids[first:end]
            turns += [len(categories)] * (end - first)
            categories.append(f"{sample.conversation.turns[turn].category}/{sample.conversation.turns[turn].language}")
        before += len(sample.token_ids)
    labels = np.concatenate([sample.labels for sample in samples])
    chance = np.random.default_rng(len(labels)).random(len(labels))
    labelled = np.flatnonzero(labels.any(1) | (chance < BACKGROUND))
    joined = {name: [value for sample in samples for value in getattr(sample, name)] for name in _TOKEN_FIELDS}
    return {
        **{name: torch.tensor(values, dtype=torch.int32) for name, values in joined.items()},
        "lengths": [len(sample.token_ids) for sample in samples],
        "image_rows": torch.tensor(rows),
        "patches": torch.from_numpy(np.concatenate([sample.patches for sample in samples])),
        "labels": torch.from_numpy(labels[labelled]),
        "labelled": torch.from_numpy(labelled),
        "tgt_sizes": [size for sample in samples for size in sample.tgt_sizes],
        "answering": torch.tensor(answering),
        "targets": torch.tensor(targets),
        "turns": torch.tensor(turns),
        "categories": categories,
    }


_TOKEN_FIELDS = ("token_ids", "positions", "segments")
