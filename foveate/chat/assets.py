"""What a process without a model has to know of a checkpoint: tokenizer, template, pictures, defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from foveate.chat.pieces import PictureSettings, PositiveInt
from foveate.chat.template import ChatTemplate
from foveate.chat.tokenizer import Tokenizer
from foveate.errors import CheckpointError

__all__ = ["GenerationDefaults", "ModelAssets", "PictureSettings"]

S = TypeVar("S", bound=msgspec.Struct)
TokenId = Annotated[int, msgspec.Meta(ge=0)]
TokenIds = TokenId | list[TokenId] | None


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """How the checkpoint wants its tokens chosen when a request does not say.

    What ``generation_config.json`` leaves out is neutral: sampling from the model's plain distribution.
    ``top_k`` 0 and ``top_p`` 1 are off; ``do_sample`` False means greedy.
    """

    do_sample: bool = True
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a checkpoint's folder says in a few lines, for processes that see tokens but no text.

    Attributes:
        name: the folder's name.
        pictures: how pictures are cut and written into prompts.
        generation: defaults for choosing tokens.
        eos_token_ids: ids that end an answer.
        max_position_embeddings: tokens of the longest sequence the model was trained for.
        vocab_size: entries of the model's output, at least as many as the tokenizer has.
        hidden_size: elements of one embedding.
    """

    name: str
    pictures: PictureSettings
    generation: GenerationDefaults
    eos_token_ids: list[int]
    max_position_embeddings: int
    vocab_size: int
    hidden_size: int

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelFacts:
        """Read a checkpoint in the published layout, without its weights and its tokenizer.

        Raises:
            CheckpointError: a file is missing or malformed, or two of them do not fit together. The message
                names the file and the key.
        """
        return ModelFacts(**_facts(Path(path).resolve()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAssets(ModelFacts):
    """Everything that the API process reads from a checkpoint's folder.

    Attributes:
        tokenizer: text to ids and back.
        template: conversations to pieces of a prompt.
    """

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelAssets:
        """Read a checkpoint in the published layout; its weights are not touched.

        Raises:
            CheckpointError: a file is missing or malformed, or two of them do not fit together. The message
                names the file and the key.
        """
        folder = Path(path).resolve()
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        assets = cls(**_facts(folder), tokenizer=tokenizer, template=_read_template(folder))
        assets._check_tokenizer(folder)
        return assets

    def _check_tokenizer(self, folder: Path) -> None:
        """Refuse files that contradict each other."""
        if self.tokenizer.vocab_size > self.vocab_size:
            size = self.tokenizer.vocab_size
            message = f"{folder / 'config.json'}: vocab_size {self.vocab_size} is below tokenizer.json's {size}"
            raise CheckpointError(message)
        for key in ("im_start", "im_end", "slice_start", "slice_end", "unk", "im_id_start", "im_id_end"):
            token = getattr(self.pictures, key)
            if self.tokenizer.token_id(token) is None:
                path = folder / "preprocessor_config.json"
                raise CheckpointError(f"{path}: {key} {token!r} is not an added token of tokenizer.json")


def _facts(folder: Path) -> dict[str, Any]:
    """Read the fields of :class:`ModelFacts`, and refuse files that contradict each other."""
    config_file, preprocessor_file = folder / "config.json", folder / "preprocessor_config.json"
    config = _read(config_file, _Config)
    pictures = _read(preprocessor_file, PictureSettings)
    generation_file = folder / "generation_config.json"
    has_generation = generation_file.exists()
    eos = _read(generation_file, _Eos).eos_token_id if has_generation else None
    eos_token_ids = _listed(eos) or _listed(config.eos_token_id)
    if not eos_token_ids:
        raise CheckpointError(f"{config_file}: eos_token_id is missing, and generation_config.json has none either")
    for id_ in eos_token_ids:
        if id_ >= config.vocab_size:
            raise CheckpointError(f"{config_file}: eos_token_id {id_} is not below vocab_size {config.vocab_size}")
    if (size := pictures.query_num) != config.query_num:
        raise CheckpointError(
            f"{preprocessor_file}: image_feature_size {size} is not config.json's query_num {config.query_num}"
        )
    return {
        "name": folder.name,
        "pictures": pictures,
        "generation": _read(generation_file, GenerationDefaults) if has_generation else GenerationDefaults(),
        "eos_token_ids": eos_token_ids,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
    }


class _Config(msgspec.Struct):
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    max_position_embeddings: PositiveInt
    query_num: PositiveInt
    eos_token_id: TokenIds = None


class _Eos(msgspec.Struct):
    eos_token_id: TokenIds = None


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _AddedToken(msgspec.Struct):
    content: str


SpecialToken = str | _AddedToken | None


class _TokenizerConfig(msgspec.Struct):
    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: SpecialToken = None
    eos_token: SpecialToken = None
    pad_token: SpecialToken = None
    unk_token: SpecialToken = None


def _read(path: Path, kind: type[S]) -> S:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_template(folder: Path) -> ChatTemplate:
    """Take ``chat_template.jinja`` if there is one, as ``transformers`` does, else the tokenizer's own."""
    config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = _read(config_file, _TokenizerConfig)
    source = config.chat_template
    if isinstance(source, list):
        source = next((entry.template for entry in source if entry.name == "default"), None)
    path = config_file
    if template_file.exists():
        path = template_file
        try:
            source = template_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{template_file}: cannot be read ({error})") from error
    if source is None:
        raise CheckpointError(f"{config_file}: chat_template is missing, and there is no {template_file.name}")
    tokens = {name: getattr(config, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    names = {name: token.content if isinstance(token, _AddedToken) else token for name, token in tokens.items()}
    try:
        return ChatTemplate(source, {name: token for name, token in names.items() if token is not None})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _listed(ids: TokenIds) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
