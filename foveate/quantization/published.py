"""What a checkpoint's ``quantization_config`` says: AWQ and GPTQ, as they are published. Nothing here needs torch.

Sources: what AutoAWQ and AutoGPTQ (GPTQModel) write as ``quantization_config`` into config.json, and what Transformers
reads of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from foveate.errors import CheckpointError
from foveate.quantization.scheme import GROUP_SIZE

_BITS = 4
_GROUP_UNIT = 32
_LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class PublishedQuantization:
    """How the linear layers of a published checkpoint are packed.

    Attributes:
        method: whose layout.
        columns: columns that share a scale; None if a whole row does.
        zero_offset: added to the zero points that are stored.
        not_converted: a layer whose published name contains one of these is not packed.
        only: of a decoder layer, these alone are packed (``self_attn.q_proj``); None if all are.
        lm_head: whether the output head is packed.
    """

    method: Literal["awq", "gptq"]
    columns: int | None
    zero_offset: int
    not_converted: tuple[str, ...] = ()
    only: frozenset[str] | None = None
    lm_head: bool = False

    @property
    def group_size(self) -> int:
        """Columns of a group as we store it: a row that shares one scale becomes groups that repeat it."""
        return self.columns or GROUP_SIZE

    def converts(self, layer: str) -> bool:
        """Whether a linear layer of the language model is packed, by its published name."""
        if any(part in layer for part in self.not_converted):
            return False
        if layer.endswith(_LM_HEAD):
            return self.lm_head
        return self.only is None or any(layer.endswith(f".{name}") for name in self.only)


def read_quantization(raw: object, source: str) -> PublishedQuantization:
    """Check a parsed ``quantization_config``.

    Keys that only concern how it was made, or how another program runs it, are ignored.

    Args:
        raw: its value in config.json.
        source: names it in errors.

    Raises:
        CheckpointError: it asks for what is not supported; the message names the key, its value and what is.
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"{source} is {raw!r}, expected an object")
    fields = _Fields(raw, source)
    method = fields.choose("quant_method", ("awq", "gptq"))
    fields.choose("bits", (_BITS,))
    return _awq(fields) if method == "awq" else _gptq(fields)


def _awq(fields: _Fields) -> PublishedQuantization:
    fields.choose("version", ("gemm",), default="gemm")
    fields.choose("zero_point", (True,), default=True)
    return PublishedQuantization(
        "awq", fields.columns(), zero_offset=0, not_converted=fields.names("modules_to_not_convert")
    )


def _gptq(fields: _Fields) -> PublishedQuantization:
    layout = fields.choose("checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    fields.choose("is_marlin_format", (False,), default=False)
    fields.choose("pack_dtype", ("int32",), default="int32")
    fields.choose("dynamic", ({},), default={})
    inside = fields.raw.get("modules_in_block_to_quantize")
    try:
        only = None if inside is None else frozenset(name for group in inside for name in group)
    except TypeError:
        only = frozenset()
    if only is not None and not all(isinstance(name, str) and len(name) > 1 for name in only or (None,)):
        raise fields.refused("modules_in_block_to_quantize", "lists of names")
    return PublishedQuantization(
        "gptq",
        fields.columns(),
        # The first version of the layout stores every zero point less one.
        zero_offset=1 if layout == "gptq" else 0,
        not_converted=fields.names("modules_to_not_convert"),
        only=only,
        lm_head=bool(fields.choose("lm_head", (False, True), default=False)),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    raw: dict[str, Any]
    source: str

    def refused(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key} is {self.raw.get(key)!r}, and only {expected} is supported")

    def choose(self, key: str, supported: tuple[Any, ...], default: Any = None) -> Any:
        value = self.raw.get(key)
        value = default if value is None else value
        value = value.lower() if isinstance(value, str) else value
        # 1 equals True in Python, and is not what a checkpoint means by it.
        if not any(value == one and type(value) is type(one) for one in supported):
            raise self.refused(key, " or ".join(repr(one) for one in supported))
        return value

    def columns(self) -> int | None:
        value = self.raw.get("group_size")
        if type(value) is not int or (value != -1 and (value < _GROUP_UNIT or value % _GROUP_UNIT)):
            raise self.refused("group_size", f"-1 or a multiple of {_GROUP_UNIT}")
        return None if value == -1 else value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.refused(key, "a list of names")
        return tuple(value)
