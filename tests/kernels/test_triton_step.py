"""The ends of a decode step, fused, against the reference."""

from __future__ import annotations

import pytest
import torch
from kernels.interpreted import DEVICE, MARKS

from foveate.kernels import reference
from foveate.kernels.triton.step import greedy, start_decode

pytestmark = MARKS


@pytest.mark.parametrize(("hidden", "longest"), [(64, 5), (3584, 2048), (48, 1500), (1025, 1)])
@pytest.mark.parametrize("batch", [0, 1, 3, 6])
def test_start_decode(batch: int, hidden: int, longest: int) -> None:
    tokens = torch.randint(100, (7,), device=DEVICE)
    tables = torch.randint(1000, (7, longest), device=DEVICE, dtype=torch.int32)
    weight = torch.randn(100, hidden, device=DEVICE)
    rows = torch.randperm(7, device=DEVICE)[:batch]
    places = rows * longest + torch.randint(longest, (batch,), device=DEVICE)
    blocks = torch.randint(1000, 2000, (batch,), device=DEVICE, dtype=torch.int32)
    expected_tables = tables.clone()
    expected = reference.start_decode(tokens, expected_tables, weight, rows, places, blocks)
    x, gathered = start_decode(tokens, tables, weight, rows, places, blocks)
    assert torch.equal(x, expected[0])
    assert torch.equal(gathered, expected[1])
    assert torch.equal(tables, expected_tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 723, 4096, 4097, 20000])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_greedy(batch: int, vocab_size: int, dtype: torch.dtype) -> None:
    # In bfloat16 and so few values there are many of the same: the first of them wins.
    scores = torch.randn(batch, vocab_size, device=DEVICE).to(dtype)
    rows = torch.tensor([4, 0, 2], device=DEVICE)[:batch]
    tokens, expected_tokens = (torch.full((5,), -7, device=DEVICE) for _ in range(2))
    logits, expected_logits = (torch.zeros(batch, vocab_size, device=DEVICE) for _ in range(2))
    expected = reference.greedy(scores, rows, expected_tokens, expected_logits)
    assert torch.equal(greedy(scores, rows, tokens, logits), expected)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected_logits)


def test_the_last_of_all_can_win() -> None:
    scores = torch.zeros(1, 9000, device=DEVICE)
    scores[0, 8999] = 1.0
    rows, tokens = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert greedy(scores, rows, tokens, torch.empty_like(scores)).tolist() == [8999]
    scores.fill_(-torch.inf)
    assert greedy(scores, rows, tokens, torch.empty_like(scores)).tolist() == [0]


def test_scores_that_are_no_numbers_make_some_token() -> None:
    scores = torch.full((1, 4100), torch.nan, device=DEVICE)
    rows, tokens = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    [token] = greedy(scores, rows, tokens, torch.empty_like(scores)).tolist()
    assert 0 <= token < 4100
