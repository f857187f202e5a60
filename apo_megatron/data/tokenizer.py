"""Loads tokenizers, checks that they fit the model, and encodes texts in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from apo_megatron.errors import ConfigError, DataError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_MAX_BYTES_OF_CHARACTER = 4  # in UTF-8


def load_tokenizer(hf_path: str | Path, field: str = "model.hf_path") -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory (or hub id).

    Raises ConfigError, naming ``field``, where there is none.
    """
    folder = Path(hf_path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        # transformers would build an empty tokenizer of the model's type.
        raise ConfigError(
            f"{field}={hf_path}: no tokenizer found, expected one of {', '.join(TOKENIZER_FILES)}: "
            "copy the tokenizer files of the model into the directory"
        )
    try:
        return AutoTokenizer.from_pretrained(str(hf_path))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{field}={hf_path}: no tokenizer could be loaded ({error}); expected a directory with "
            "tokenizer.json and tokenizer_config.json, or a hub id"
        ) from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str | Path) -> None:
    """Refuse, with ConfigError, a tokenizer without EOS or with ids that the model has no embedding for.

    ``vocab_size`` is the model's number of real tokens (fewer in the tokenizer are fine: models pad their
    embedding); ``source`` says where the tokenizer came from.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            f"{source}: the tokenizer has token ids up to {largest}, the model's vocab_size is {vocab_size}: "
            "take the tokenizer that belongs to the model, or resize the model's embedding"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{source}: the tokenizer has no EOS token, so no response could end: set eos_token in "
            "tokenizer_config.json"
        )


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], places: Sequence[str]
) -> list[list[int]]:
    """Token ids of every text, without special tokens, truncation or padding.

    ``places[i]`` is where ``texts[i]`` came from (``Row.place``): named by the DataError that is raised when
    it cannot be encoded (a word that a closed vocabulary lacks, a lone surrogate).
    """
    try:
        return _encode(tokenizer, texts)
    except Exception as batch_error:  # the tokenizers library raises nothing narrower
        for text, place in zip(texts, places, strict=True):
            try:
                _encode(tokenizer, [text])
            except Exception as error:
                raise DataError(
                    f"{place}: the tokenizer cannot encode {text[:80]!r} ({error}): "
                    "mend the text, or take a tokenizer that knows its words"
                ) from error
        raise batch_error


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # __call__ rather than the faster backend: it switches off a truncation saved in tokenizer.json.
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoding["input_ids"]


def decode_each(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; joined, they are the decoded text, special tokens included.

    A character that takes several tokens belongs to the last of them; the others add "".
    """

    def decode(start: int, end: int) -> str:
        return str(
            tokenizer.decode(
                token_ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    texts = []
    start = shown = 0  # tokens [start, shown) are the context in which the next ones are decoded
    for end in range(1, len(token_ids) + 1):
        before, after = decode(start, shown), decode(start, end)
        # Not even a broken sequence of bytes is longer than a character of UTF-8.
        is_open = after.endswith("\ufffd") and end - shown < _MAX_BYTES_OF_CHARACTER
        if is_open and end < len(token_ids):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        start, shown = shown, end
    return texts
