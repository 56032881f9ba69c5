"""A vocabulary of pieces and scores -> the bytes of a `tokenizer.model`, as sentencepiece reads it.

Files that carry a tokenizer inside (GGUF) hold its pieces, their scores and types, and nothing of
sentencepiece's own file. The layout is sentencepiece's sentencepiece_model.proto. Knows no files.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qmix.errors import CheckpointError

# The numbers of SentencePiece.Type, which GGUF's `tokenizer.ggml.token_type` repeats.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE = 2  # TrainerSpec.ModelType
ADDED_SCORE = -1000.0  # of tokens without one, as llama.cpp's converter writes it
_WireType = Literal[0, 2, 5]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The pieces of a byte-fallback BPE tokenizer, by id.

    Attributes:
        pieces: as they are named: `▁the`, `<0x0A>`, `</s>`.
        scores: a piece of a higher score is merged first.
        types: of SentencePiece.Type.
        bos, eos, unk: ids; None if the vocabulary has no such token.
        space_prefix: a text is encoded as if a space stood before it.
        where: the file, for errors.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    bos: int | None
    eos: int | None
    unk: int | None
    space_prefix: bool
    where: str


def model_bytes(vocabulary: Vocabulary) -> bytes:
    """The `tokenizer.model` of a vocabulary.

    Raises:
        CheckpointError: lists of different lengths, a type that does not exist, a special id beyond
            the vocabulary, or not exactly one unknown piece.
    """
    _check(vocabulary)
    pieces = b"".join(
        _message(1, _text(1, piece) + _float(2, score) + _number(3, kind))
        for piece, score, kind in zip(
            vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True
        )
    )
    trainer = _number(3, _BPE) + _number(4, len(vocabulary.pieces))
    trainer += _number(35, int(BYTE in vocabulary.types))  # byte fallback
    named = ((40, 45, vocabulary.unk), (41, 46, vocabulary.bos), (42, 47, vocabulary.eos))
    for id_field, piece_field, index in named:
        trainer += _number(id_field, -1 if index is None else index)
        if index is not None:
            trainer += _text(piece_field, vocabulary.pieces[index])
    trainer += _number(43, -1)  # no padding token
    normalizer = _text(1, "identity") + _number(3, int(vocabulary.space_prefix))
    normalizer += _number(4, 0) + _number(5, 1)  # spaces are kept, and written as ▁
    return pieces + _message(2, trainer) + _message(3, normalizer)


def without_space_prefix(model: bytes) -> bytes:
    """The same `tokenizer.model`, which puts no space in front of a text.

    A message that is given again is merged into the first: only that one field changes.
    """
    return model + _message(3, _number(3, 0))


def _check(vocabulary: Vocabulary) -> None:
    count = len(vocabulary.pieces)
    for name, values in (("scores", vocabulary.scores), ("types", vocabulary.types)):
        if len(values) != count:
            raise _wrong(vocabulary, f"one of the {name} for each token", f"{count}", len(values))
    for index, kind in enumerate(vocabulary.types):
        if not NORMAL <= kind <= BYTE:
            raise _wrong(vocabulary, f"the type of token {index}", f"1 to {BYTE}", kind)
    for name in ("bos", "eos", "unk"):
        index = getattr(vocabulary, name)
        if index is not None and not 0 <= index < count:
            raise _wrong(vocabulary, f"the {name} token", f"0 to {count - 1}", index)
    unknown = sum(kind == UNKNOWN for kind in vocabulary.types)
    if unknown != 1:
        raise _wrong(vocabulary, "unknown tokens", "one", unknown)


def _wrong(vocabulary: Vocabulary, what: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer is damaged: {what}",
        where=vocabulary.where,
        expected=expected,
        found=found,
        remedy="Download the file again.",
    )


def _tag(field: int, wire_type: _WireType) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value & (1 << 64) - 1)


def _float(field: int, value: float) -> bytes:
    return _tag(field, 5) + struct.pack("<f", value)


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _message(field: int, value: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
