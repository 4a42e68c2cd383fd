"""Conversations of the demo world as tensors: what one worker process hands to the training loop."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from foveate.chat.assets import ModelAssets
from foveate.chat.template import Message, Part, PicturePart, TextPart
from foveate.media.slicing import SlicePlan, plan_slices
from foveate.vision.preprocess import preprocess
from training.world.conversation import HELD_OUT, draw, families_at
from training.world.records import Conversation, Mark


@dataclass
class Sample:
    """One conversation, tokenized. ``spans`` are (first, end, turn) of the tokens that answers predict."""

    token_ids: list[int]
    spans: list[tuple[int, int, int]]
    image_rows: list[int]
    tgt_sizes: list[tuple[int, int]]
    patches: np.ndarray
    labels: np.ndarray
    conversation: Conversation


def encode(conversation: Conversation, assets: ModelAssets) -> Sample:
    """Turn a conversation into token ids, patches and labels, exactly as the server would."""
    settings = assets.pictures
    plans = [
        plan_slices(
            *picture.size, max_slice_nums=settings.max_slice_nums,
            scale_resolution=settings.scale_resolution, patch_size=settings.patch_size,
        )
        for picture in conversation.pictures
    ]  # fmt: skip
    messages: list[Message] = []
    for index, turn in enumerate(conversation.turns):
        parts: list[Part] = [PicturePart(plan) for plan in plans] if index == 0 else []
        messages += [
            Message("user", [*parts, TextPart(turn.question)]),
            Message("assistant", [TextPart(turn.answer)]),
        ]
    prompt = assets.tokenizer.encode_prompt(assets.template.render(messages, settings, add_generation_prompt=False))
    pixels = [
        preprocess(picture.convert("RGB"), plan) for picture, plan in zip(conversation.pictures, plans, strict=True)
    ]
    marked = zip(conversation.marks, conversation.pictures, plans, strict=True)
    labels = [label_patches(marks, picture.size, plan) for marks, picture, plan in marked]
    return Sample(
        token_ids=prompt.token_ids,
        spans=_answer_spans(prompt.token_ids, assets),
        image_rows=[
            row for ranges in prompt.image_ranges for start, length in ranges for row in range(start, start + length)
        ],
        tgt_sizes=[size for plan in plans for size in plan.tgt_sizes],
        patches=np.concatenate([p.patches for p in pixels]) if pixels else np.zeros((0, 588), np.uint8),
        labels=np.concatenate(labels) if labels else np.zeros((0, 2), np.uint8),
        conversation=conversation,
    )


def _answer_spans(ids: list[int], assets: ModelAssets) -> list[tuple[int, int, int]]:
    start_id, end_id = (assets.tokenizer.token_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    header = [start_id, *assets.tokenizer.encode_text("assistant\n")]
    spans = []
    position = 0
    while position < len(ids):
        if ids[position : position + len(header)] == header:
            first = position + len(header)
            end = ids.index(end_id, first) + 1
            spans.append((first, end, len(spans)))
            position = end
        else:
            position += 1
    return spans


def label_patches(marks: list[Mark], size: tuple[int, int], plan: SlicePlan) -> np.ndarray:
    """Say what each half (left, right) of each patch shows: uint8 [patches, 2], 0 where there is nothing."""
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
        grid = np.zeros((patch_rows, patch_columns * 2), np.uint8)
        c0, c1 = _cells(
            (boxes[:, 0] - left * width) / (width * across),
            (boxes[:, 2] - left * width) / (width * across),
            patch_columns * 2,
        )
        r0, r1 = _cells(
            (boxes[:, 1] - top * height) / (height * down),
            (boxes[:, 3] - top * height) / (height * down),
            patch_rows,
        )
        for index in np.flatnonzero((c1 > c0) & (r1 > r0)):
            grid[r0[index] : r1[index], c0[index] : c1[index]] = names[index]
        grids.append(grid.reshape(-1, 2))
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
                samples.append(encode(draw(seed % HELD_OUT, family=family, stage=self.stage), assets))
                seed += workers
            yield collate(samples)


def collate(samples: list[Sample]) -> dict[str, object]:
    """Pack samples: patches one after another, tokens padded to the longest conversation."""
    longest = max(len(sample.token_ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int32)
    rows: list[Tensor] = []
    positions, targets, turns = [], [], []
    categories: list[str] = []
    for index, sample in enumerate(samples):
        ids[index, : len(sample.token_ids)] = torch.tensor(sample.token_ids, dtype=torch.int32)
        rows.append(torch.tensor(sample.image_rows, dtype=torch.int64) + index * longest)
        for first, end, turn in sample.spans:
            positions += range(index * longest + first - 1, index * longest + end - 1)
            targets += sample.token_ids[first:end]
            turns += [len(categories)] * (end - first)
            categories.append(f"{sample.conversation.turns[turn].category}/{sample.conversation.turns[turn].language}")
    return {
        "ids": ids,
        "image_rows": torch.cat(rows),
        "patches": torch.from_numpy(np.concatenate([sample.patches for sample in samples])),
        "labels": torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
        "tgt_sizes": [size for sample in samples for size in sample.tgt_sizes],
        "positions": torch.tensor(positions),
        "targets": torch.tensor(targets),
        "turns": torch.tensor(turns),
        "categories": categories,
    }
