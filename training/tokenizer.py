"""Trains the demo model's tokenizer: ``python -m training.tokenizer --output FOLDER``.

Byte-level BPE with the special tokens, normalizer and chat template of MiniCPM-V-2_6, but another cut before
merging: capitals, digits and lower-case letters that do not form a running word are tokens of their own. So a
printed string is read character by character, whatever it says, and words of the answers stay short.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from training.world.conversation import FAMILIES, draw

PRESET = Path(__file__).resolve().parent.parent / "foveate/models/presets/minicpm-v-2_6"

_PIECES = (
    r"'(?:s|t|re|ve|m|ll|d)",
    # The first word of a sentence: not one in quotation marks, which is printed in a picture.
    r"(?<!\S)\p{Lu}?\p{Ll}+(?=[\s,.:;?!']|$)",
    r"\p{Lu}",
    r"\p{N}",
    # Words inside a sentence, with their space; other lower-case letters stand alone.
    r" \p{Ll}+",
    r"\p{Ll}",
    # Chinese has no spaces: its commonest short words keep the others apart.
    r"[的有是在和个吗呢比最从到]",
    r"(?:(?![的有是在和个吗呢比最从到])[\p{Lo}\p{Lm}\p{Lt}\p{M}])+",
    r" ?[^\s\p{L}\p{N}\p{M}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)


def texts(conversations: int) -> Iterator[str]:
    """Questions, answers and the frame of the chat template, from seeds below ``conversations``."""
    for seed in range(conversations):
        yield "system\nYou are a helpful assistant."
        for turn in draw(seed, family=FAMILIES[seed % len(FAMILIES)]).turns:
            yield f"user\n{turn.question}"
            yield f"assistant\n{turn.answer}"


def train(vocab_size: int, conversations: int) -> Tokenizer:
    """Train on the generator's text; ids of special tokens follow the merges, in the preset's order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    split = pre_tokenizers.Split(Regex("|".join(_PIECES)), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=3,
        # Whole phrases would be learnt one by one: a Chinese character has three bytes, " rectangle" ten.
        max_token_length=10,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(conversations), trainer)
    tokenizer.add_special_tokens(special_tokens())
    return tokenizer


def special_tokens() -> list[str]:
    """The preset's special tokens, by id."""
    with (PRESET / "tokenizer_config.json").open(encoding="utf-8") as file:
        added = json.load(file)["added_tokens_decoder"]
    return [added[key]["content"] for key in sorted(added, key=int)]


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((PRESET / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {value["content"]: value for value in config["added_tokens_decoder"].values()}
    config["added_tokens_decoder"] = {str(tokenizer.token_to_id(name)): added[name] for name in added}
    # There is no Python code beside this checkpoint: any reader of tokenizer.json will do.
    config.pop("auto_map")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--vocab-size", type=int, default=3000, help="entries without the special tokens")
    parser.add_argument("--conversations", type=int, default=7000, help="conversations to learn the merges from")
    args = parser.parse_args()
    tokenizer = train(args.vocab_size, args.conversations)
    save(tokenizer, args.output)
    print(f"{args.output}: {tokenizer.get_vocab_size(with_added_tokens=True)} entries")


if __name__ == "__main__":
    main()
