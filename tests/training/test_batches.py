"""Training sees what the server would see: the same tokens, and nothing of another question's answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from foveate.chat.assets import ModelAssets
from foveate.chat.template import Message, PicturePart, TextPart
from foveate.checkpoint.load import load_model
from foveate.media.slicing import plan_slices
from foveate.models.config import ModelConfig
from foveate.models.minicpmv import MiniCPMV
from training.attention import SegmentAttention, join
from training.data import Sample, collate, encode, label_patches
from training.export import export
from training.train import Trainer, parse_mix
from training.world.conversation import draw
from training.world.records import Mark

DEMO = Path(__file__).parents[2] / "foveate" / "demo" / "model"


@pytest.fixture(scope="module")
def assets() -> ModelAssets:
    return ModelAssets.from_folder(DEMO)


def segment(sample: Sample, number: int) -> list[int]:
    """The tokens that the tokens of a segment see: the common beginning and itself."""
    pairs = zip(sample.token_ids, sample.segments, strict=True)
    return [token for token, one in pairs if one in (0, number)]


@pytest.mark.parametrize("family", ["text", "pair", "small_text"])
def test_a_segment_is_a_prompt_of_the_server_with_its_answer(family: str, assets: ModelAssets) -> None:
    conversation = draw(5, family=family)
    sample = encode(conversation, assets, apart=True)
    turn = conversation.turns[0]
    plans = [plan_slices(*picture.size) for picture in conversation.pictures]
    question = Message("user", [*map(PicturePart, plans), TextPart(turn.question)])
    asked = assets.tokenizer.encode_prompt(assets.template.render([question], assets.pictures))
    answer = assets.tokenizer.encode_text(turn.answer)
    first = segment(sample, 1)
    length = len(asked.token_ids)
    assert first[:length] == asked.token_ids
    assert first[length : length + len(answer)] == answer
    rows = [row for ranges in asked.image_ranges for start, count in ranges for row in range(start, start + count)]
    assert sample.image_rows == rows
    start, end, number = sample.spans[0]
    assert sample.token_ids[start : end - 1] == answer
    assert number == 0
    assert len(sample.spans) == len(conversation.turns)


def test_follow_ups_stay_with_their_question(assets: ModelAssets) -> None:
    for seed in range(30):
        conversation = draw(seed, family="scene")
        sample = encode(conversation, assets, apart=True)
        starts = sum(turn.category != "follow_up" for turn in conversation.turns)
        assert max(sample.segments) == max(starts, 1)
        whole = encode(conversation, assets, apart=False)
        assert max(whole.segments) == 1
        assert whole.positions == list(range(len(whole.token_ids)))


def dense(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


@torch.inference_mode()
def test_packed_segments_equal_their_prompts_alone(assets: ModelAssets) -> None:
    torch.manual_seed(0)
    model = Trainer(ModelConfig.from_folder(DEMO), torch.device("cpu"), 1e-3).model.language
    samples = [
        encode(draw(seed, family=family), assets, apart=True) for seed, family in enumerate(["text", "chat", "pair"])
    ]
    batch = join([collate(samples[:1]), collate(samples[1:])], torch.device("cpu"))
    x = model.embed_tokens(batch["token_ids"].long())
    attend = SegmentAttention(batch["lengths"], batch["segments"], batch["positions"])
    hidden = model(x, batch["positions"].long(), attend).split(batch["lengths"])
    for sample, packed in zip(samples, hidden, strict=True):
        places = torch.tensor(sample.segments)
        for number in range(1, max(sample.segments) + 1):
            ids = torch.tensor(segment(sample, number))
            alone = model(model.embed_tokens(ids), torch.arange(len(ids)), dense)
            torch.testing.assert_close(packed[(places == 0) | (places == number)], alone, atol=1e-4, rtol=1e-4)


def test_labels_lie_where_the_marks_are() -> None:
    # 896 x 896: two by two slices of 32 x 32 patches. A mark in the lower right quarter, one slice-patch large.
    plan = plan_slices(896, 896)
    labels = label_patches([Mark((448 + 28, 448 + 42, 448 + 42, 448 + 56), 9)], (896, 896), plan)
    slices = torch.from_numpy(labels).split([rows * columns for rows, columns in plan.tgt_sizes])
    marked = [(number, *divmod(int(patch), 32)) for number, one in enumerate(slices) for patch in one.any(1).nonzero()]
    assert marked == [(0, 17, 17), (4, 3, 2)]


def test_a_step_learns_and_the_export_is_a_checkpoint(tmp_path: Path, assets: ModelAssets) -> None:
    torch.manual_seed(0)
    trainer = Trainer(ModelConfig.from_folder(DEMO), torch.device("cpu"), 3e-3)
    batch = collate([encode(draw(seed, family="text"), assets, apart=True) for seed in range(2)])
    losses = [float(trainer.step([batch], 1.0)[0]["answer"]) for _ in range(3)]
    assert losses[-1] < losses[0]
    export(trainer.model, tmp_path)
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    loaded: MiniCPMV = load_model(tmp_path, torch.device("cpu"), torch.float32)
    assert all(shard.stat().st_size <= 12_100_000 for shard in tmp_path.glob("*.safetensors"))
    for mine, theirs in zip(trainer.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine.to(torch.bfloat16).float(), theirs)


def test_a_mix_names_families() -> None:
    assert parse_mix("text=3,pair=0.5") == {"text": 3.0, "pair": 0.5}
    with pytest.raises(SystemExit, match="lions"):
        parse_mix("lions=1")
