"""The tokenizer inside a GGUF file: its vocabulary and templates, and what it adds to a text.

Knows the keys of llama.cpp's converter (`tokenizer.ggml.*`) and no file. Only the byte-fallback BPE
that llama.cpp calls "llama" is read: every Mixtral has it.
"""

from array import array
from collections.abc import Mapping
from typing import Any

from qmix.errors import CheckpointError, UnsupportedError
from qmix.text.chat_templates import DEFAULT, TEMPLATE_ENTRY
from qmix.text.vocabulary import ADDED_SCORE, UNUSED, Vocabulary

TEMPLATE = "tokenizer.chat_template"
_PREFIX = "tokenizer.ggml."
_MODEL = "llama"
# What llama.cpp takes where the file does not say (llama-vocab.cpp, LLAMA_VOCAB_TYPE_SPM).
_DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}
_MAX_TOKENS = 1 << 18  # more than any published vocabulary


def vocabulary(metadata: Mapping[str, Any], where: str) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Args:
        metadata: of its header; strings are tuples, numbers arrays.
        where: the file, for errors.

    Raises:
        UnsupportedError: another kind of tokenizer.
        CheckpointError: a key is missing or has another type.
    """
    model = metadata.get(f"{_PREFIX}model")
    if model != _MODEL:
        raise UnsupportedError(
            "the tokenizer in this file is not read",
            where=f"{where}: {_PREFIX}model",
            expected=repr(_MODEL),
            found=repr(model)[:80],
            remedy="Give a GGUF file of a Mixtral.",
        )
    tokens = _value(metadata, "tokens", tuple, where)
    if not 0 < len(tokens) <= _MAX_TOKENS:
        raise _wrong("tokens", where, f"1 to {_MAX_TOKENS} strings", len(tokens))
    for name in ("scores", "token_type"):
        _value(metadata, name, array, where)
    types = metadata[f"{_PREFIX}token_type"]
    if types.typecode == "f":
        raise _wrong("token_type", where, "integers", "floats")
    return Vocabulary(
        pieces=tokens,
        scores=metadata[f"{_PREFIX}scores"],
        types=types,
        bos=_id(metadata, "bos", where),
        eos=_id(metadata, "eos", where),
        unk=_id(metadata, "unknown", where),
        space_prefix=_flag(metadata, "add_space_prefix", True, where),
        where=where,
    )


def settings(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the file says beside the vocabulary, in the words of tokenizer_config.json.

    Raises:
        CheckpointError: a flag or an id of another type.
    """
    said: dict[str, Any] = {
        "add_bos_token": _flag(metadata, "add_bos_token", True, where),
        "add_eos_token": _flag(metadata, "add_eos_token", False, where),
    }
    tokens = metadata[f"{_PREFIX}tokens"]
    padding = metadata.get(f"{_PREFIX}padding_token_id")
    if padding is not None:
        if type(padding) is not int or not 0 <= padding < len(tokens):
            raise _wrong("padding_token_id", where, f"0 to {len(tokens) - 1}", padding)
        said["pad_token"] = tokens[padding]
    if templates := _templates(metadata):
        said[TEMPLATE_ENTRY] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    return said


def _templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The chat templates by name; what they are is checked where they are used."""
    found = {DEFAULT: metadata[TEMPLATE]} if TEMPLATE in metadata else {}
    names = metadata.get(f"{TEMPLATE}s")
    for name in names if isinstance(names, tuple) else ():
        if f"{TEMPLATE}.{name}" in metadata:
            found[str(name)] = metadata[f"{TEMPLATE}.{name}"]
    return found


def described(vocabulary: Vocabulary, size: int) -> dict[str, Any]:
    """The metadata that `vocabulary` and `settings` read, of a vocabulary filled up to `size`.

    Raises:
        CheckpointError: it has more tokens than that.
    """
    missing = size - len(vocabulary.pieces)
    if missing < 0:
        raise CheckpointError(
            "the tokenizer has more tokens than the model",
            where=vocabulary.where,
            expected=f"at most {size}",
            found=len(vocabulary.pieces),
            remedy="Put the model's own tokenizer there.",
        )
    padding = tuple(f"[PAD{index}]" for index in range(size - missing, size))
    said: dict[str, Any] = {
        "model": _MODEL,
        "pre": "default",
        "tokens": (*vocabulary.pieces, *padding),
        "scores": array("f", [*vocabulary.scores, *[ADDED_SCORE] * missing]),
        "token_type": array("i", [*vocabulary.types, *[UNUSED] * missing]),
        "add_space_prefix": vocabulary.space_prefix,
    }
    ids = {"bos": vocabulary.bos, "eos": vocabulary.eos, "unknown": vocabulary.unk}
    said.update({f"{name}_token_id": index for name, index in ids.items() if index is not None})
    return {_PREFIX + name: value for name, value in said.items()}


def described_templates(templates: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of chat templates, as llama.cpp's converter writes them."""
    others = {name: text for name, text in templates.items() if name != DEFAULT}
    said: dict[str, Any] = {f"{TEMPLATE}.{name}": text for name, text in others.items()}
    if others:
        said[f"{TEMPLATE}s"] = tuple(others)
    if DEFAULT in templates:
        said[TEMPLATE] = templates[DEFAULT]
    return said


def _value(metadata: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, kind):
        found = "nothing" if value is None else type(value).__name__
        raise _wrong(name, where, "a list", found)
    return value


def _id(metadata: Mapping[str, Any], name: str, where: str) -> int:
    field = f"{name}_token_id"
    value = metadata.get(_PREFIX + field, _DEFAULT_IDS[name])
    if type(value) is not int:
        raise _wrong(field, where, "an id", value)
    return value


def _flag(metadata: Mapping[str, Any], name: str, default: bool, where: str) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if type(value) is not bool:
        raise _wrong(name, where, "true or false", value)
    return value


def _wrong(name: str, where: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        "the tokenizer is damaged",
        where=f"{where}: {_PREFIX}{name}",
        expected=expected,
        found=repr(found)[:80],
        remedy="Download the file again.",
    )
