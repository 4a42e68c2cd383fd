"""Rows as bytes and back."""

import msgspec
import pytest
import torch

from foveate.errors import EngineError
from foveate.transport.handle import InlineEmbeddings
from foveate.transport.inline import from_inline, to_inline

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def all_bits(dtype: torch.dtype) -> torch.Tensor:
    """Numbers with every pattern of 16 bits, NaNs, infinities and negative zeros among them."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    rows = bits.view(dtype) if dtype.itemsize == 2 else (bits.to(torch.int32) << 16).view(dtype)
    return rows.reshape(256, -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(dtype: torch.dtype) -> None:
    rows = all_bits(dtype)
    embeddings = to_inline(rows, b"digest")
    over_the_wire = msgspec.msgpack.decode(msgspec.msgpack.encode(embeddings), type=InlineEmbeddings)
    back = from_inline(over_the_wire)
    assert back.dtype == dtype
    assert back.shape == rows.shape
    assert torch.equal(back.view(torch.uint8), rows.view(torch.uint8))
    assert over_the_wire.digest == b"digest"


def test_rows_come_in_order_and_little_endian() -> None:
    assert to_inline(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), b"").rows.hex() == "0000803f000000400000404000008040"


def test_rows_that_do_not_lie_in_one_piece_are_read_in_order() -> None:
    rows = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(from_inline(to_inline(rows, b"")), rows)


def test_no_rows_are_rows_too() -> None:
    assert from_inline(to_inline(torch.zeros(0, 4), b"")).shape == (0, 4)


@pytest.mark.parametrize("change", [{"num_tokens": 4}, {"hidden_size": 3}, {"dtype": "bfloat16"}, {"rows": b"1"}])
def test_a_wrong_size_is_named(change: dict[str, object]) -> None:
    embeddings = msgspec.structs.replace(to_inline(torch.zeros(3, 4), b""), **change)
    with pytest.raises(EngineError, match=f"{len(embeddings.rows)} bytes"):
        from_inline(embeddings)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"dtype": "complex64"}, "complex64"), ({"num_tokens": -3, "hidden_size": -4}, "sizes"), ({"dtype": ""}, "type")],
)
def test_nonsense_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        from_inline(msgspec.structs.replace(to_inline(torch.zeros(3, 4), b""), **change))


@pytest.mark.parametrize("rows", [torch.zeros(3), torch.zeros(1, 2, 3), torch.zeros(2, 2, dtype=torch.float64)])
def test_only_rows_of_known_types_are_sent(rows: torch.Tensor) -> None:
    with pytest.raises(EngineError, match="num_tokens, hidden_size"):
        to_inline(rows, b"")
