"""The bound for what waits on a device, and running out of memory there."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from foveate.errors import Overloaded
from foveate.kernels.memory import Room, is_out_of_memory, make_room

CPU = torch.device("cpu")

# What comes last keeps the heap from shrinking from its end.
FREED = """
import psutil
from foveate.kernels.memory import trim_heap
process = psutil.Process()
print(process.memory_info().rss)
pieces = [bytes([1]) * 100_000 for _ in range(3000)]
last = pieces[-1]
del pieces
print(process.memory_info().rss)
trim_heap()
print(process.memory_info().rss)
"""


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_count_as_long_as_a_view_of_them_lives(inference: bool) -> None:
    with torch.inference_mode(inference):
        room = Room(CPU, 1000)
        first = room.count(torch.zeros(2, 50))
        second = room.count(torch.zeros(100))
        assert room.used == 800
        part = first[1:]
        del first
        assert room.used == 800
        del second
        assert room.used == 400
        del part
        assert room.used == 0


def test_what_goes_beyond_the_bound_lives_on_the_host() -> None:
    room = Room(torch.device("meta"), 1000)
    kept = [room.count(torch.zeros(100, device=room.device_for(400))) for _ in range(3)]
    assert [one.device.type for one in kept] == ["meta", "meta", "cpu"]
    assert room.used == 800
    del kept[0]
    assert room.device_for(400).type == "meta"
    assert room.device_for(601).type == "cpu"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed")
def test_freed_memory_goes_back_to_the_system() -> None:
    # A process of its own: this one's heap has room from earlier tests.
    result = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=100, check=True)
    before, kept, after = (int(number) for number in result.stdout.split())
    assert kept - before > 250 * 2**20
    assert after - before < 50 * 2**20


def test_what_is_a_lack_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    graph = torch.AcceleratorError("CUDA error: out of memory")
    vars(graph)["error_code"] = 2
    assert is_out_of_memory(graph)
    assert not is_out_of_memory(torch.AcceleratorError("an illegal memory access was encountered"))
    assert not is_out_of_memory(RuntimeError("no such luck"))
    assert isinstance(make_room(CPU), Overloaded)


@pytest.mark.gpu
def test_a_gpu_goes_on_after_running_out() -> None:
    device = torch.device("cuda")
    used = torch.cuda.memory_reserved(device)
    free, _ = torch.cuda.mem_get_info(device)
    half, too_much = torch.empty(free // 2, dtype=torch.uint8, device=device), False
    try:
        torch.empty(free, dtype=torch.uint8, device=device)
    except Exception as caught:  # noqa: BLE001 (which it is, is the question)
        too_much = is_out_of_memory(caught)
    assert too_much
    del half
    make_room(device)
    assert torch.cuda.memory_reserved(device) <= used
    assert torch.ones(2**20, device=device).sum().item() == 2**20
