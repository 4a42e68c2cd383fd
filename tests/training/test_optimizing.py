"""The optimizer is the published one, and replayed batches are seen as often as asked."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from training.muon import Muon
from training.replay import Replay


def test_matrices_together_move_as_torch_moves_them_alone() -> None:
    torch.manual_seed(0)
    shapes = [(24, 16), (24, 16), (16, 40), (24, 16)]
    mine = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(one.detach().clone()) for one in mine]
    together = Muon(mine, lr=0.1, momentum=0.95, weight_decay=0.01)
    alone = torch.optim.Muon(theirs, lr=0.1, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = [one.detach().clone() for one in mine]
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        together.step()
        alone.step()
        for one, other, start in zip(mine, theirs, before, strict=True):
            moved = (one - start).norm()
            assert moved > 0.1
            # The iteration is in bfloat16, and sums in another order.
            assert (one - other).norm() < 0.05 * moved


def test_every_batch_comes_as_often_as_asked() -> None:
    batches = ({"number": torch.tensor(number)} for number in range(10**6))
    replay = Replay(batches, torch.device("cpu"), 2.0)
    seen: Counter[int] = Counter()
    for _ in range(3000):
        taken = [int(batch["number"]) for batch in replay.take(4)]
        assert len(set(taken)) == 4
        seen.update(taken)
    assert 5990 <= len(seen) <= 6010
    assert 1.9 < sum(seen.values()) / len(seen) < 2.1


def test_without_repeats_everything_is_new() -> None:
    replay = Replay(({"number": torch.tensor(number)} for number in range(100)), torch.device("cpu"), 1.0)
    assert [int(batch["number"]) for _ in range(5) for batch in replay.take(3)] == list(range(15))
