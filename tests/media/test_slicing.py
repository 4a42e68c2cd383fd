"""Slice plans against those of the published reference."""

import json
from pathlib import Path

import pytest

from foveate.media.slicing import plan_slices

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "slicing.json").read_text())


def cases() -> list[tuple[tuple[int, int], int, dict[str, object]]]:
    """Every size of the golden file with every limit; the default is 9."""
    return [
        (tuple(entry["size_wh"]), 9 if limit == "default" else int(limit), result)
        for entry in GOLDEN["entries"]
        for limit, result in entry["results"].items()
    ]


@pytest.mark.parametrize(("size", "limit", "expected"), cases())
def test_plan_is_the_reference_s(size: tuple[int, int], limit: int, expected: dict[str, object]) -> None:
    plan = plan_slices(*size, max_slice_nums=limit)

    def listed(pair: tuple[int, int] | None) -> list[int] | None:
        return None if pair is None else list(pair)

    assert listed(plan.grid) == expected["best_grid_cols_rows"]
    assert listed(plan.source_size) == expected["source_size_wh"]
    assert listed(plan.refine_size) == expected["refine_size_wh"]
    assert listed(plan.slice_size) == expected["slice_size_wh"]
    assert plan.num_slices == expected["num_images_total"]
    assert plan.num_slices * 64 == expected["placeholder_num_unk"]
    if expected["tgt_sizes_hw"] is not None:  # The reference itself fails on heights 1 and 3.
        assert [list(pair) for pair in plan.tgt_sizes] == expected["tgt_sizes_hw"]


def test_golden_covers_what_it_should() -> None:
    assert len(GOLDEN["entries"]) == 72
    assert {limit for entry in GOLDEN["entries"] for limit in entry["results"]} >= {"1", "2", "4", "9", "16"}


@pytest.mark.parametrize(("arguments", "name"), [((0, 5), "width"), ((5, 0), "height")])
def test_impossible_sizes_are_named(arguments: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        plan_slices(*arguments)


def test_no_slices_allowed_is_an_error_not_a_guess() -> None:
    with pytest.raises(ValueError, match="max_slice_nums"):
        plan_slices(10, 10, max_slice_nums=0)
