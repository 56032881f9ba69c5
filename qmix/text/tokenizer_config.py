"""What stands beside a vocabulary: `tokenizer_config.json`, and the older files that it replaced.

Those are `special_tokens_map.json` and `added_tokens.json`. Checks every entry that is read. Knows
nothing of encoding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmix import strict_json
from qmix.errors import CheckpointError, UsageError
from qmix.files import regular_file

if TYPE_CHECKING:
    from tokenizers import AddedToken

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"

# transformers' SPECIAL_TOKENS_ATTRIBUTES.
SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
_EXTRA = "extra_special_tokens"
_EXTRA_BEFORE_5 = "additional_special_tokens"
_DECODER = "added_tokens_decoder"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_NO_LIMIT = int(1e30)  # what transformers calls the length of a model that states none

# Entries of tokenizer_config.json that a caller of from_pretrained may override.
OVERRIDES = (
    "add_bos_token",
    "add_eos_token",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
    "chat_template",
    "additional_special_tokens",
    "extra_special_tokens",
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
    "add_prefix_space",
    "proxies",
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

    def side(self, name: str, default: str) -> str:
        """An entry that says left or right.

        Raises:
            CheckpointError: another value.
        """
        value = self.document.get(name)
        if value is None:
            return default
        if value not in ("left", "right"):
            raise self._wrong_entry(name, "'left' or 'right'", value)
        return str(value)

    @property
    def model_max_length(self) -> int:
        """The most tokens that the model takes; 10^30 if the config does not say.

        Raises:
            CheckpointError: not a number, or none above zero.
        """
        value = self.document.get("model_max_length")
        if value is None:
            return _NO_LIMIT
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
            raise self._wrong_entry("model_max_length", "a number of at least 1", value)
        return int(value)

    def special_tokens(self) -> "dict[str, AddedToken]":
        """The special tokens that the config names, by their entry: bos_token and so on.

        Raises:
            CheckpointError: an entry is not a token.
        """
        named = [name for name in SPECIAL_TOKENS if self.document.get(name) is not None]
        return {name: self._token(name, self.document[name], special=True) for name in named}

    def extra_special_tokens(self) -> "list[AddedToken]":
        """The special tokens that have no entry of their own.

        Raises:
            CheckpointError: an entry is not a token.
        """
        extra = self.document.get(_EXTRA) or self.document.get(_EXTRA_BEFORE_5) or []
        if isinstance(extra, Mapping):  # named ones, of models for pictures
            extra = list(extra.values())
        if not isinstance(extra, list):
            raise self._wrong_entry(_EXTRA_BEFORE_5, "a list of tokens", extra)
        more = [
            value
            for name, value in self.document.items()
            if name.endswith("_token") and name not in SPECIAL_TOKENS and isinstance(value, str)
        ]
        return [self._token(_EXTRA_BEFORE_5, value, special=True) for value in (*extra, *more)]

    def added_tokens(self) -> "dict[int, AddedToken]":
        """The entries of added_tokens_decoder, in the order of their ids.

        Raises:
            CheckpointError: an entry is malformed.
        """
        entries = self.document.get(_DECODER, {})
        added: dict[int, AddedToken] = {}
        if not isinstance(entries, Mapping):
            raise self._wrong_entry(_DECODER, "an object", entries)
        for key, entry in entries.items():
            if not (key.isascii() and key.isdigit() and len(key) < 9):
                raise self._wrong_entry(_DECODER, "token ids as keys", key)
            if not isinstance(entry, Mapping):
                raise self._wrong_entry(f"{_DECODER}.{key}", "an object with content", entry)
            added[int(key)] = self._token(f"{_DECODER}.{key}", entry)
        return dict(sorted(added.items()))

    def added_above(self, vocab_size: int) -> "dict[int, AddedToken]":
        """All added tokens of a vocabulary of that size, which go on where it ends.

        Raises:
            CheckpointError: an entry is malformed, or the ids have a gap.
        """
        added = self.added_tokens()
        above = [index for index in added if index >= vocab_size]
        for expected, index in enumerate(above, start=vocab_size):
            if index != expected:
                raise self._wrong_entry(_DECODER, f"{expected}: no gap", index)
        return added

    def unknown_token(self, name: str) -> CheckpointError:
        """The error for an entry that names a token which the vocabulary has not."""
        expected = "a token of the vocabulary or of added_tokens_decoder"
        return self._wrong_entry(name, expected, self.document.get(name))

    def _token(self, name: str, value: object, *, special: bool | None = None) -> "AddedToken":
        """A token as it is written: its text, or an object with content and flags."""
        from tokenizers import AddedToken

        entry: Mapping[str, Any] = value if isinstance(value, Mapping) else {"content": value}
        content = entry.get("content")
        if not isinstance(content, str) or not content or not _is_unicode(content):
            raise self._wrong_entry(name, "a string, or an object with content", value)
        if special is None:
            special = entry.get("special") is True
        flags = {flag: entry[flag] for flag in _FLAGS if isinstance(entry.get(flag), bool)}
        return AddedToken(content, special=special, **flags)

    def _wrong_entry(self, name: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            "wrong value",
            where=f"{self._where}: {name}",
            expected=expected,
            found=repr(found)[:80],
            remedy="Correct the entry or remove it.",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The `tokenizer_config.json` of a folder, with what older files say beside it.

    Where it lists no added tokens, `special_tokens_map.json` and `added_tokens.json` count, as in
    transformers.

    Raises:
        CheckpointError: a file is damaged; the message names it.
    """
    path = folder / CONFIG_FILE
    document = strict_json.read(path) if regular_file.exists(path) else {}
    if _DECODER in document:
        return document
    special = folder / SPECIAL_FILE
    if regular_file.exists(special):
        document |= strict_json.read(special)
    added = folder / ADDED_FILE
    if regular_file.exists(added):
        extra = document.get(_EXTRA_BEFORE_5)
        special_tokens = [document.get(name) for name in SPECIAL_TOKENS]
        special_tokens += extra if isinstance(extra, list) else []
        names = [_content(token) for token in special_tokens]
        document[_DECODER] = _decoder(strict_json.read(added), names, str(added))
    return document


def overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that override tokenizer_config.json; options without effect are dropped.

    Raises:
        UsageError: an unknown option.
    """
    for name in options:
        if name not in (*OVERRIDES, *_WITHOUT_EFFECT):
            raise UsageError(
                f"from_pretrained has no option {name!r}", expected=", ".join(OVERRIDES)
            )
    return {name: value for name, value in options.items() if name in OVERRIDES}


def _is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, Mapping) else token


def _decoder(added: Mapping[str, Any], special: Sequence[object], where: str) -> dict[str, Any]:
    """`added_tokens.json` (text -> id) in the form of `added_tokens_decoder`, which replaced it."""
    for text, index in added.items():
        if type(index) is not int or index < 0:
            raise CheckpointError(
                f"token {text!r}: not an id", where=where, expected="a number", found=index
            )
    return {
        str(index): {"content": text, "special": text in special} for text, index in added.items()
    }
