"""Written files are what the safetensors library reads, and the headers say where everything is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_data import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from foveate.checkpoint.stored import ITEM_BYTES, read_header, stored_tensors
from foveate.checkpoint.write import Entry, Pieces, Shard, plan_shards, write_index, write_shards
from foveate.errors import CheckpointError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(5, dtype=torch.int8),
    "c": torch.full((2, 2), 0.5, dtype=torch.bfloat16),
    "d": torch.tensor(7, dtype=torch.int64),
    "e": torch.arange(6, dtype=torch.float32).to(torch.float8_e4m3fn),
    "f": torch.empty(0, 3),
}
NAMES = {
    torch.float32: "F32", torch.int8: "I8", torch.bfloat16: "BF16", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
ENTRIES = [Entry(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def plain(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return bytes(tensor.flatten().view(torch.uint8).numpy()) if tensor.numel() else b""


def data(tensors: dict[str, torch.Tensor] = TENSORS) -> Iterator[tuple[str, Pieces]]:
    """Their bytes, three at a time."""
    for name, tensor in tensors.items():
        flat = plain(tensor)
        yield name, [flat[start : start + 3] for start in range(0, len(flat), 3)]


def test_what_is_written_is_read_by_the_library_and_its_hash_is_that_of_the_file(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    shards = plan_shards(ENTRIES, stem="model", shard_bytes=1000)
    records = write_shards(tmp_path, shards, data(), lambda *count: done.append(count))
    found = {}
    for name, record in records.items():
        content = (tmp_path / name).read_bytes()
        assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        found |= load_file(tmp_path / name)
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert plain(found[name]) == plain(tensor)
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    assert done[-1] == (total, total)


def test_every_tensor_can_be_mapped(tmp_path: Path) -> None:
    shards = plan_shards(ENTRIES, stem="model", shard_bytes=1000)
    write_shards(tmp_path, shards, data())
    # Five bytes of integers end where no bfloat16 could begin.
    assert [[entry.name for entry in shard.entries] for shard in shards] == [["a", "b"], ["c", "d", "e"], ["f"]]
    for shard in shards:
        for tensor in read_header(tmp_path / shard.file).values():
            assert tensor.start % ITEM_BYTES[tensor.dtype] == 0


def test_files_end_at_their_limit_and_between_groups() -> None:
    entries = [Entry(f"{group}.{number}", "F32", (25,)) for group in "xy" for number in range(5)]
    shards = plan_shards(entries, stem="s", shard_bytes=200, group=lambda name: name.split(".")[0])
    assert [len(shard.entries) for shard in shards] == [2, 2, 1, 2, 2, 1]
    assert [shard.file for shard in shards] == [f"s-0000{number}-of-00006.safetensors" for number in range(1, 7)]
    assert all(len({entry.name[0] for entry in shard.entries}) == 1 for shard in shards)
    # A tensor larger than the limit gets a file of its own.
    assert [len(shard.entries) for shard in plan_shards(entries, stem="s", shard_bytes=99)] == [1] * 10


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "tensor c: was planned next, and nothing came"),
        (["a", "c", "b"], "tensor b: was planned next, and c came"),
        (["a", "b", "c", "d", "e", "f", "x"], "tensor x: was not planned"),
    ],
)
def test_other_tensors_than_planned(tmp_path: Path, names: list[str], message: str) -> None:
    shards = plan_shards(ENTRIES, stem="model", shard_bytes=1000)
    with pytest.raises(CheckpointError, match=message):
        write_shards(tmp_path, shards, data({name: TENSORS.get(name, TENSORS["a"]) for name in names}))


def test_more_or_less_bytes_than_planned(tmp_path: Path) -> None:
    shards = plan_shards(ENTRIES, stem="model", shard_bytes=1000)
    with pytest.raises(CheckpointError, match=r"tensor a: has -4 bytes beside those planned"):
        write_shards(tmp_path, shards, data({**TENSORS, "a": torch.zeros(11)}))


def test_headers_of_the_library_s_files_are_understood(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", {"some": "metadata"})
    content = (tmp_path / "model.safetensors").read_bytes()
    header = read_header(tmp_path / "model.safetensors")
    assert header.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        stored = header[name]
        assert stored.shape == tuple(tensor.shape)
        assert (
            content[stored.start : stored.start + stored.nbytes]
            == plain(tensor)
            == b"".join(map(bytes, stored.chunks()))
        )


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_file_that_was_cut_short(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}, "tensor x has the unknown type F33"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "tensor x is not where"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "tensor x is not where"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, "tensor x is not where"),
        ({"dtype": "F32", "shape": "1"}, "its header: "),
        ([], "its header: "),
    ],
)
def test_a_header_that_lies(tmp_path: Path, entry: object, message: str) -> None:
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_index_and_file_disagree(tmp_path: Path) -> None:
    shards = plan_shards(ENTRIES, stem="model", shard_bytes=1000)
    write_shards(tmp_path, shards, data())
    write_index(tmp_path / "model.safetensors.index.json", [*shards[:-1], Shard(shards[-1].file, ())])
    assert "f" not in stored_tensors(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["c"] = shards[0].file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the index and the file disagree about c"):
        stored_tensors(tmp_path)


def test_a_real_checkpoint_s_tensors_are_all_found() -> None:
    index = json.loads((TINY / "model.safetensors.index.json").read_text())
    assert stored_tensors(TINY).keys() == index["weight_map"].keys()
