"""Linear layers in the layouts of AWQ and GPTQ, packed number by number, after the formats and not after our code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int32]

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Layer:
    """A quantized layer.

    Attributes:
        integers: [out, in], 0 to 15.
        zeros: [out, groups].
        scales: float16 [out, groups].
        columns: of a group.
    """

    integers: Integers
    zeros: Integers
    scales: npt.NDArray[np.float16]
    columns: int

    @property
    def weight(self) -> npt.NDArray[np.float32]:
        """What it stands for, [out, in]: exact in float32."""
        group = np.arange(self.integers.shape[1]) // self.columns
        steps = (self.integers - self.zeros[:, group]).astype(np.float32)
        weight: npt.NDArray[np.float32] = steps * self.scales[:, group].astype(np.float32)
        return weight


def random_layer(
    out: int, columns: int, group: int, seed: int, *, lowest_zero: int = 0, highest_zero: int = 15
) -> Layer:
    """Make up a layer whose weights have a standard deviation of about 0.02."""
    generator = np.random.default_rng(seed)
    groups = -(-columns // group)
    return Layer(
        generator.integers(0, 16, (out, columns), dtype=np.int32),
        generator.integers(lowest_zero, highest_zero + 1, (out, groups), dtype=np.int32),
        generator.uniform(0.001, 0.005, (out, groups)).astype(np.float16),
        group,
    )


def awq_tensors(layer: Layer) -> dict[str, npt.NDArray[np.generic]]:
    """Pack as AutoAWQ's GEMM version: eight outputs in an int32, interleaved."""
    return {
        "qweight": _packed_rows(layer.integers.T, _AWQ_ORDER),
        "qzeros": _packed_rows(layer.zeros.T, _AWQ_ORDER),
        "scales": np.ascontiguousarray(layer.scales.T),
    }


def gptq_tensors(layer: Layer, *, offset: int = 1) -> dict[str, npt.NDArray[np.generic]]:
    """Pack as AutoGPTQ: eight inputs in an int32; zero points less ``offset``, eight outputs in an int32."""
    plain = list(range(8))
    return {
        "qweight": np.ascontiguousarray(_packed_rows(layer.integers, plain).T),
        "qzeros": _packed_rows(layer.zeros.T - offset, plain),
        "scales": np.ascontiguousarray(layer.scales.T),
        "g_idx": (np.arange(layer.integers.shape[1]) // layer.columns).astype(np.int32),
    }


def _packed_rows(integers: Integers, order: list[int]) -> Integers:
    """[rows, columns] → int32 [rows, columns / 8]: the i-th lowest four bits are column ``order[i]`` of eight."""
    rows, columns = integers.shape
    packed = np.zeros((rows, columns // 8), dtype=np.uint32)
    for row in range(rows):
        for word in range(columns // 8):
            value = 0
            for place, column in enumerate(order):
                number = int(integers[row, word * 8 + column])
                assert 0 <= number <= 15
                value |= number << (4 * place)
            packed[row, word] = value
    return packed.view(np.int32)
