"""What ``foveate bench kernels`` and ``foveate tune`` do before there is a GPU."""

from __future__ import annotations

import pytest
import torch

from foveate.bench import gpu, kernels
from foveate.bench.kernels import Timing
from foveate.bench.sizes import language_config, products
from foveate.errors import ConfigError


def test_products_of_the_published_size() -> None:
    found = products(language_config("minicpm-v-2_6"), "int8")
    assert {name: (what.out_features, what.in_features) for name, what in found.items()} == {
        "qkv": (4608, 3584),
        "o": (3584, 3584),
        "gate_up_silu": (37888, 3584),
        "down": (3584, 18944),
        "lm_head": (151666, 3584),
    }
    # 7.07 GB a token: what a decode step of one sequence reads.
    layers = sum(what.weight_bytes for name, what in found.items() if name != "lm_head")
    assert 28 * layers + found["lm_head"].weight_bytes == pytest.approx(7.07e9, rel=0.01)


@pytest.mark.parametrize("text", ["", "0", "1,,2", "-1", "1.5", "²"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--rows: got "):
        gpu.kernels(rows=text)
    with pytest.raises(ConfigError, match=r"^--rows: got "):
        gpu.tune(rows=text or "0")


def test_unknown_names_are_refused() -> None:
    for command in (gpu.kernels, gpu.tune):
        with pytest.raises(ConfigError, match="--quantization: got int3"):
            command(quantization="int3")
    with pytest.raises(ConfigError, match="expected one of int8"):
        gpu.kernels(quantization="int8,fp8")
    with pytest.raises(ConfigError, match="--config"):
        language_config("no-such-preset")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [gpu.kernels, gpu.tune])
def test_without_a_gpu_it_says_so(command: object) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        command()  # type: ignore[operator]


def test_the_table_shows_bandwidth_for_decodes_and_rates_for_prefills(capsys: pytest.CaptureFixture[str]) -> None:
    timings = [
        Timing("down", "int8 8x8", 1, 2e-6, 4_000_000, 10**9, 1e-6),
        Timing("qkv", "int8 8x8", 512, 1e-6, 1_000_000, 3 * 10**8, 1e-6),
    ]
    kernels.print_table("a title", timings)
    decode, prefill = (line.split() for line in capsys.readouterr().out.splitlines() if "int8" in line)
    cells = [cell for cell in decode if cell.strip("│|")]
    assert cells[-4:] == ["1", "2.0", "2000", "50%"]
    cells = [cell for cell in prefill if cell.strip("│|")]
    assert cells[-5:] == ["512", "1.0", "1000", "300", "100%"]
