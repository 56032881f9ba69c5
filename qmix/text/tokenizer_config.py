"""The files beside `tokenizer.model`: `tokenizer_config.json`, and the older `added_tokens.json`.

Checks every entry that is read. Knows nothing of encoding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError, UsageError
from qmix.files import regular_file
from qmix.text.sentencepiece_file import MODEL_FILE

CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"

# Entries of tokenizer_config.json that a caller of from_pretrained may override.
OVERRIDES = (
    "add_bos_token",
    "add_eos_token",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "model_max_length",
)
# Options of transformers that choose the class, the source or the file. Here there is one of each.
_WITHOUT_EFFECT = (
    "cache_dir",
    "force_download",
    "legacy",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_auth_token",
    "use_fast",
)


class TokenizerConfig:
    """The document of a `tokenizer_config.json`, checked entry by entry as it is read.

    Args:
        document: entries that are not read here are kept.
        where: names the file in errors.
    """

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self.document = dict(document)
        self._where = where

    def flag(self, name: str, default: bool) -> bool:
        """A boolean entry; the default where it is missing or null.

        Raises:
            CheckpointError: another type.
        """
        value = self.document.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong_entry(name, "true or false", value)
        return value

    def special_token(self, name: str, ids: Mapping[str, int], default: int) -> int | None:
        """The id of a special token.

        Args:
            ids: id of every token by its text.
            default: the model's own id, where the entry is missing or null; -1 means no token.

        Raises:
            CheckpointError: not a token, or not one of the vocabulary.
        """
        value = self.document.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is None:
            return default if default >= 0 else None
        if not isinstance(value, str):
            raise self._wrong_entry(name, "a string, or an object with content", value)
        if value not in ids:
            raise self._wrong_entry(
                name, f"a token of {MODEL_FILE} or of added_tokens_decoder", value
            )
        return ids[value]

    def added_tokens(self, vocab_size: int) -> list[tuple[str, bool]]:
        """(text, special) of the tokens after the model's own, in the order of their ids.

        Raises:
            CheckpointError: an entry is malformed, or the ids have a gap.
        """
        entries = self.document.get("added_tokens_decoder", {})
        added: dict[int, tuple[str, bool]] = {}
        if not isinstance(entries, Mapping):
            raise self._wrong_entry("added_tokens_decoder", "an object", entries)
        for key, entry in entries.items():
            if not (key.isascii() and key.isdigit() and len(key) < 9):
                raise self._wrong_entry("added_tokens_decoder", "token ids as keys", key)
            if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
                raise self._wrong_entry(
                    f"added_tokens_decoder.{key}", "an object with content", entry
                )
            if int(key) >= vocab_size:
                added[int(key)] = (entry["content"], entry.get("special") is True)
        for expected, index in enumerate(sorted(added), start=vocab_size):
            if index != expected:
                raise self._wrong_entry("added_tokens_decoder", f"{expected}: no gap", index)
        return [added[index] for index in sorted(added)]

    def _wrong_entry(self, name: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            "wrong value",
            where=f"{self._where}: {name}",
            expected=expected,
            found=repr(found)[:80],
            remedy="Correct the entry or remove it.",
        )


def read_config(model_file: Path) -> dict[str, Any]:
    """The `tokenizer_config.json` beside a model file, with the added tokens of old fine-tunes.

    Where it lists no added tokens, those of `added_tokens.json` (before 2024) are used.

    Raises:
        CheckpointError: a file is damaged; the message names it.
    """
    path = model_file.with_name(CONFIG_FILE)
    document = strict_json.read(path) if regular_file.exists(path) else {}
    added = model_file.with_name(ADDED_FILE)
    if "added_tokens_decoder" not in document and regular_file.exists(added):
        document["added_tokens_decoder"] = _decoder(strict_json.read(added), str(added))
    return document


def overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that override tokenizer_config.json; options without effect are dropped.

    Raises:
        UsageError: an unknown option.
    """
    for name in options:
        if name not in (*OVERRIDES, *_WITHOUT_EFFECT):
            raise UsageError(
                f"from_pretrained has no option {name!r}",
                expected=", ".join(("padding_side", *OVERRIDES)),
            )
    return {name: value for name, value in options.items() if name in OVERRIDES}


def _decoder(added: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`added_tokens.json` (text -> id) in the form of `added_tokens_decoder`, which replaced it."""
    for text, index in added.items():
        if type(index) is not int or index < 0:
            raise CheckpointError(
                f"token {text!r}: not an id", where=where, expected="a number", found=index
            )
    return {str(index): {"content": text, "special": True} for text, index in added.items()}
