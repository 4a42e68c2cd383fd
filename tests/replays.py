"""What stands in for CUDA graphs on a CPU."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Repeater:
    """Records by keeping what was run; a repetition reads the same tensors again, as a graph does."""

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def record(self, run: Callable[[], T], warm_up: Callable[[], object]) -> tuple[Callable[[], None], T]:
        self.recorded += 1
        warm_up()
        results = run()

        def repeat() -> None:
            self.repeated += 1
            for result, again in zip(_listed(results), _listed(run()), strict=True):
                result.copy_(again)

        return repeat, results


def _listed(results: object) -> list[Tensor]:
    found = [results] if isinstance(results, Tensor) else results
    assert isinstance(found, (list, tuple))
    return list(found)
