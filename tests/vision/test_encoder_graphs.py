"""The encoder's steps that are replayed: filled up, of any sizes, and the same as those that are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import torch
from golden_data import EMBEDS_ATOL, PICTURE_CASES, TINY, picture_names, pixels, tensors
from replays import Repeater

from foveate.chat.assets import ModelAssets
from foveate.checkpoint.load import load_model
from foveate.models.minicpmv import VisionTower
from foveate.models.packing import Packing, PackingRoom
from foveate.vision.encoder import Slice, VisionEncoder, slices_of
from foveate.vision.graphs import StepGraphs, graph_sizes
from foveate.vision.service import measure

T = TypeVar("T")
CPU = torch.device("cpu")
NAMES = ["syn_wide.png", "image1.jpg", "syn_tall.png", "frame_0.jpg"]
LONGEST = 1122


def encoder_of(tower: VisionTower, batch_size: int = 4, cuda_graphs: bool = True) -> VisionEncoder:
    return VisionEncoder(tower, mean=[0.5] * 3, std=[0.5] * 3, batch_size=batch_size, cuda_graphs=cuda_graphs)


def step(encoder: VisionEncoder, slices: Sequence[Slice]) -> torch.Tensor:
    rows = encoder.empty(len(slices))
    encoder.encode_slices(slices, list(rows))
    return rows


def some_slices(*tgt_sizes: tuple[int, int], seed: int = 0) -> list[Slice]:
    torch.manual_seed(seed)
    return [
        Slice(torch.randint(256, (rows * columns, 588), dtype=torch.uint8).numpy(), (rows, columns))
        for rows, columns in tgt_sizes
    ]


@pytest.mark.parametrize("most", [1, 128, 129, 1122, 2048, 2049, 6732, 8192, 8193, 16896])
def test_sizes_hold_every_step_and_waste_little(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert most <= sizes[-1] < most + 512
    for patches in range(1, most + 1, 7):
        size = next(size for size in sizes if size >= patches)
        assert size - patches < max(128, patches / 8)
    assert len(sizes) <= 60


def test_what_a_step_does_not_have_is_a_sequence_of_its_own() -> None:
    room = PackingRoom(20, 4, 12, CPU)
    sizes = ((2, 3), (4, 1))
    plain = Packing.of(sizes, 70, CPU)
    room.put(room.contents(((4, 3), (2, 4)), 70))
    room.put(room.contents(sizes, 70))
    packing = room.packing
    assert packing.slices.lengths == (6, 4, 10, 0, 0)
    assert packing.slices.offsets.tolist() == [0, 6, 10, 20, 20, 20]
    assert torch.equal(packing.positions[:10], plain.positions)
    assert torch.equal(packing.places[:, :10], plain.places)
    assert not packing.positions[10:].any()
    assert not packing.places[:, 10:].any()
    room.put(room.contents(((5, 2), (5, 2)), 70))
    assert packing.slices.lengths == (10, 10, 0, 0, 0)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("case", PICTURE_CASES)
def test_replayed_steps_are_the_published_model_s(case: str, batch_size: int, tower: VisionTower) -> None:
    encoder, recorder = encoder_of(tower, batch_size), Repeater()
    encoder.use_graphs(recorder, 16 * LONGEST, LONGEST)
    pictures = [pixels(name) for name in picture_names(case)]
    embeddings = torch.cat(encoder.encode(pictures))
    golden = tensors(case)["resampler_out"].flatten(0, 1)
    torch.testing.assert_close(embeddings, golden, atol=EMBEDS_ATOL, rtol=0)
    slices = sum(len(picture.tgt_sizes) for picture in pictures)
    assert recorder.repeated == -(-slices // batch_size)


def test_one_graph_serves_many_sizes(tower: VisionTower) -> None:
    plain, encoder, recorder = encoder_of(tower), encoder_of(tower), Repeater()
    graphs = encoder.use_graphs(recorder, 512, 200)
    steps = [
        some_slices((7, 17)),  # 119 patches
        some_slices((1, 126), seed=1),
        some_slices((8, 16), seed=2),  # all of the graph's, no filling
        some_slices((2, 3), seed=3),
        some_slices((5, 2), (5, 2), seed=4),
        some_slices((30, 4), (10, 10), (12, 11), seed=5),
        some_slices((5, 2), (7, 3), seed=6),
    ]
    for slices in [*steps, *reversed(steps)]:
        torch.testing.assert_close(step(encoder, slices), step(plain, slices), atol=1e-5, rtol=0)
    assert (recorder.recorded, len(graphs)) == (2, 2)
    assert recorder.repeated == 2 * len(steps)


def test_what_another_step_left_changes_nothing(tower: VisionTower) -> None:
    encoder = encoder_of(tower)
    encoder.use_graphs(Repeater(), 512, 200)
    few = some_slices((9, 5))
    first = step(encoder, few)
    step(encoder, some_slices((11, 11), seed=1))
    torch.testing.assert_close(step(encoder, few), first, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "sizes", [[(11, 11)] * 5, [(1, 101)], [(1, 1)] * 4], ids=["too many patches", "too long a slice", "too many slices"]
)
def test_what_has_no_room_is_not_replayed(sizes: list[tuple[int, int]], tower: VisionTower) -> None:
    encoder, recorder = encoder_of(tower), Repeater()
    encoder.use_graphs(recorder, 256, 100)
    slices = some_slices(*sizes)
    assert torch.equal(step(encoder, slices), step(encoder_of(tower), slices))
    assert recorder.recorded == 0


def test_sizes_are_forgotten_but_not_their_graph(tower: VisionTower) -> None:
    encoder, recorder = encoder_of(tower), Repeater()
    graphs = encoder.use_graphs(recorder, 128, 128)
    for columns in [*range(1, 80), 1]:
        slices = some_slices((1, columns))
        torch.testing.assert_close(step(encoder, slices), step(encoder_of(tower), slices), atol=1e-5, rtol=0)
    assert len(graphs._contents) == 64
    assert recorder.recorded == 1


class Failing:
    """Records one thing and no more."""

    def __init__(self, error: RuntimeError) -> None:
        self.asked = 0
        self._error = error
        self._first = Repeater()

    def record(self, run: Callable[[], T], warm_up: Callable[[], object]) -> tuple[Callable[[], None], T]:
        self.asked += 1
        if self.asked > 1:
            raise self._error
        return self._first.record(run, warm_up)


def test_without_memory_for_graphs_steps_go_on(tower: VisionTower, caplog: pytest.LogCaptureFixture) -> None:
    encoder, recorder = encoder_of(tower), Failing(torch.OutOfMemoryError("no more memory"))
    graphs = encoder.use_graphs(recorder, 512, 200)
    steps = [some_slices(size, size) for size in [(4, 10), (8, 10), (12, 12)]]
    for _ in range(2):
        for slices in steps:
            torch.testing.assert_close(step(encoder, slices), step(encoder_of(tower), slices), atol=1e-5, rtol=0)
    assert (recorder.asked, len(graphs)) == (2, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph of 256 patches, and no more of others: no more memory"
    ]


# On a GPU.


def gpu_encoder(cuda_graphs: bool = True, batch_size: int = 4) -> VisionEncoder:
    tower = load_model(TINY, torch.device("cuda"), torch.bfloat16, part="vision").vision
    return encoder_of(tower, batch_size, cuda_graphs)


def graphs_of(encoder: VisionEncoder) -> StepGraphs:
    assert encoder._graphs is not None
    return encoder._graphs


@pytest.mark.gpu
def test_graphs_are_there_once_the_memory_was_measured() -> None:
    pictures = ModelAssets.from_folder(TINY).pictures
    encoder, without = gpu_encoder(), gpu_encoder(cuda_graphs=False)
    measure(without, pictures, 4)  # the first one has the libraries' work space too
    assert measure(encoder, pictures, 4) > measure(without, pictures, 4)
    assert without._graphs is None
    assert len(graphs_of(encoder)) >= 2
    assert encoder.step_patches is not None
    assert encoder.step_patches <= graphs_of(encoder).sizes[-1]


@pytest.mark.gpu
def test_float32_goes_without() -> None:
    encoder = encoder_of(load_model(TINY, torch.device("cuda"), torch.float32, part="vision").vision)
    measure(encoder, ModelAssets.from_folder(TINY).pictures, 4)
    assert encoder._graphs is None


@pytest.mark.gpu
def test_graphs_compute_what_their_kernels_do() -> None:
    encoder, without = gpu_encoder(), gpu_encoder(cuda_graphs=False)
    measure(encoder, ModelAssets.from_folder(TINY).pictures, 4)
    slices = [piece for name in NAMES for piece in slices_of(pixels(name))]
    for start, count in [(0, 1), (1, 1), (0, 2), (1, 3), (2, 4), (0, 4), (0, 1)]:
        some = slices[start : start + count]
        first, expected = step(encoder, some), step(without, some)
        # Both round to bfloat16, and matrix products of another number of rows may add up in another order.
        apart = (first.float() - expected.float()).norm() / expected.float().norm()
        assert apart < 0.02
        step(encoder, slices[:4])
        assert torch.equal(step(encoder, some), first)
    assert not graphs_of(encoder)._failed


@pytest.mark.gpu
def test_the_padding_s_pixels_change_no_bit() -> None:
    encoder = gpu_encoder()
    measure(encoder, ModelAssets.from_folder(TINY).pictures, 4)
    [piece, *_] = slices_of(pixels(NAMES[0]))
    found = []
    for value in (0, 255):
        graphs_of(encoder)._pixels.fill_(value)
        torch.cuda.synchronize()
        found.append(step(encoder, [piece]))
    assert torch.equal(*found)


@pytest.mark.gpu
def test_a_capture_that_fails_is_over() -> None:
    encoder = gpu_encoder()
    measure(encoder, ModelAssets.from_folder(TINY).pictures, 4)
    graphs = graphs_of(encoder)
    forward, slices = graphs._forward, some_slices((16, 16))
    expected = step(gpu_encoder(cuda_graphs=False), slices)

    def waits(patches: torch.Tensor, packing: Packing) -> torch.Tensor:
        embeddings = forward(patches, packing)
        embeddings.sum().item()  # not while it is captured
        return embeddings

    graphs._forward = waits
    before = len(graphs)
    assert torch.equal(step(encoder, slices), expected)
    assert graphs._failed
    assert len(graphs) == before
    # Those that were made go on.
    some = slices_of(pixels(NAMES[0]))[:1]
    assert torch.equal(step(encoder, some), step(encoder, some))
