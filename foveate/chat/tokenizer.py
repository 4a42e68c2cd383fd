"""Text to token ids and back: prompts in one go, answers piece by piece.

Only byte-level BPE is served (GPT-2's scheme, which Qwen2 uses): every token is a known run of bytes, so that
answers can be turned into text exactly, however the tokens cut characters apart.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from foveate.chat.pieces import Piece, Prompt, SliceSlot, TemplateText, UserText
from foveate.errors import CheckpointError, InvalidRequest


class Tokenizer:
    """A checkpoint's tokenizer, which knows special tokens from text that looks like them.

    Args:
        source: the content of ``tokenizer.json``.
        name: names the file in errors.

    Raises:
        CheckpointError: it is malformed, or not a byte-level BPE tokenizer.
    """

    def __init__(self, source: str | bytes, name: str = "tokenizer.json") -> None:
        try:
            raw = msgspec.json.decode(source)
            added, vocab = raw["added_tokens"], raw["model"]["vocab"]
            _check_kind(raw, name)
            self._added: dict[str, int] = {token["content"]: token["id"] for token in added}
            self.special_ids = frozenset(token["id"] for token in added if token["special"])
            self._token_bytes = _token_bytes({**vocab, **self._added})
            text_only = msgspec.json.encode(_without_added_tokens(raw)).decode()
        except (msgspec.DecodeError, ValueError, TypeError, LookupError, AttributeError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{name}: is malformed ({detail})") from error
        try:
            self._text = tokenizers.Tokenizer.from_str(text_only)
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"{name}: is not a tokenizer ({error})") from error
        # Longest first, as one special token may begin with another one.
        contents = sorted(self._added, key=len, reverse=True)
        self._live = re.compile(f"({'|'.join(map(re.escape, contents))})" if contents else "((?!))")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            CheckpointError: the file cannot be read, or see :class:`Tokenizer`.
        """
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._token_bytes)

    def token_id(self, token: str) -> int | None:
        """Return the id of a special (or other added) token, or None if there is no such token."""
        return self._added.get(token)

    def encode_text(self, text: str) -> list[int]:
        """Turn text into ids. Nothing in it is special.

        Raises:
            InvalidRequest: it has a lone surrogate, so it is not text.
        """
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise InvalidRequest(f"the text has a lone surrogate (U+{code:04X}), which is no character") from error
        # Unlike encode, a batch releases the GIL: a long prompt does not stall the other answers.
        ids: list[int] = self._text.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def encode_prompt(self, pieces: Iterable[Piece]) -> Prompt:
        """Turn a rendered conversation into a prompt.

        Text between two live special tokens is encoded as one string, whoever wrote its parts, as the
        published code does: ids are the same as there wherever nobody typed a special token.

        Raises:
            InvalidRequest: a text has a lone surrogate.
            CheckpointError: a slot's token is not in the vocabulary.
        """
        token_ids: list[int] = []
        image_ranges: list[list[tuple[int, int]]] = []
        text: list[str] = []

        def put(ids: list[int]) -> None:
            token_ids.extend(self.encode_text("".join(text)))
            text.clear()
            token_ids.extend(ids)

        for piece in pieces:
            match piece:
                case UserText():
                    text.append(piece.text)
                case TemplateText():
                    for position, part in enumerate(self._live.split(piece.text)):
                        if position % 2:
                            put([self._added[part]])
                        else:
                            text.append(part)
                case SliceSlot():
                    put([])
                    image_ranges += [[] for _ in range(piece.picture + 1 - len(image_ranges))]
                    image_ranges[piece.picture].append((len(token_ids), piece.num_tokens))
                    token_ids += [self._required_id(piece.token)] * piece.num_tokens
        put([])
        return Prompt(token_ids, image_ranges)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(id_) for id_ in ids if id_ not in skipped).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; none for an id outside the vocabulary."""
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def token_text(self, token_id: int) -> str:
        """Return one token as text; a part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _required_id(self, token: str) -> int:
        id_ = self.token_id(token)
        if id_ is None:
            raise CheckpointError(f"the tokenizer has no special token {token!r}")
        return id_


class Detokenizer:
    """Turns the ids of one answer into text while they come.

    Everything pushed and flushed, joined, is what :meth:`Tokenizer.decode` makes of all ids at once. A push
    costs time in its own tokens only.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Take more ids, return the text that they complete; the beginning of a character is kept back."""
        token_bytes = self._tokenizer.token_bytes
        return self._decoder.decode(b"".join(token_bytes(id_) for id_ in ids if id_ not in self._skipped))

    def flush(self) -> str:
        """End the answer: return U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Looks for stop strings in one answer while it comes, and keeps back what may become one.

    The stop string that is complete first wins, and the longest of those; so the answer does not depend on
    how it was cut. Each character costs constant time on average for each stop string (Knuth, Morris and
    Pratt's matcher), however the stop strings repeat themselves.

    Args:
        stops: the stop strings; none of them may be empty.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = list(stops)
        self._failures = [_failure_table(stop) for stop in stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self._found: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text.

        Returns:
            The text that is certainly before any stop string, and the stop string that was found, or None.
            After one was found, all further text is dropped.
        """
        if self._found is not None:
            return "", self._found
        if not self._stops:
            return text, None
        start = len(self._held)
        self._held += text
        for end in range(start, len(self._held)):
            self._advance(self._held[end])
            found = [stop for stop, count in zip(self._stops, self._matched, strict=True) if count == len(stop)]
            if found:
                self._found = max(found, key=len)
                emit, self._held = self._held[: end + 1 - len(self._found)], ""
                return emit, self._found
        cut = len(self._held) - max(self._matched)
        emit, self._held = self._held[:cut], self._held[cut:]
        return emit, None

    def flush(self) -> str:
        """End the answer: return the text that was kept back for nothing."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> None:
        for index, stop in enumerate(self._stops):
            count = self._matched[index]
            while count and stop[count] != character:
                count = self._failures[index][count - 1]
            self._matched[index] = count + (stop[count] == character)


def _failure_table(pattern: str) -> list[int]:
    """For each prefix of the pattern: the length of its longest proper prefix that also ends it."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        length += pattern[index] == pattern[length]
        table[index] = length
    return table


def _byte_alphabet() -> dict[str, int]:
    """The characters by which GPT-2's scheme writes bytes: printable Latin-1 as is, the rest from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


def _token_bytes(vocab: Mapping[str, int]) -> list[bytes]:
    """The bytes of every token by id; ids without a token have none."""
    table = [b""] * (1 + max(vocab.values()))
    for token, id_ in vocab.items():
        try:
            table[id_] = bytes([_BYTES[character] for character in token])
        except KeyError:  # an added token is written as it is
            table[id_] = token.encode()
    return table


def _check_kind(raw: dict[str, Any], name: str) -> None:
    model, decoder = raw["model"]["type"], (raw["decoder"] or {}).get("type")
    if (model, decoder) != ("BPE", "ByteLevel"):
        raise CheckpointError(f"{name}: model {model} with decoder {decoder} is not served, only byte-level BPE")
    missing = _BYTES.keys() - raw["model"]["vocab"].keys()
    if missing:
        raise CheckpointError(f"{name}: model.vocab has no token for byte {_BYTES[min(missing)]:#04x}")
    for token in raw["added_tokens"]:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token[flag]:
                raise CheckpointError(f"{name}: added token {token['content']!r} has {flag}, which is not served")


def _without_added_tokens(raw: dict[str, Any]) -> dict[str, Any]:
    """Make a tokenizer that never gives an added token's id, whatever the text.

    An added token may be an entry of the BPE vocabulary as well (the published ``<unk>`` is), to which merges
    lead: so the entry and its merges must go too.
    """
    added = {token["content"] for token in raw["added_tokens"]}
    model = raw["model"]
    vocab = {token: id_ for token, id_ in model["vocab"].items() if token not in added}
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    merges = [list(pair) for pair in pairs if added.isdisjoint((*pair, "".join(pair)))]
    model = {**model, "vocab": vocab, "merges": merges}
    return {**raw, "added_tokens": [], "model": model, "truncation": None, "padding": None}
