"""The file `tokenizer.model`: read whole, and checked before sentencepiece parses it.

The layout is sentencepiece's sentencepiece_model.proto. Knows nothing of tokens.
"""

import struct
from pathlib import Path

from qmix.errors import CheckpointError
from qmix.files import regular_file

MODEL_FILE = "tokenizer.model"
MODEL_BYTES = 64 << 20


def read_model(file: Path) -> bytes:
    """The bytes of a `tokenizer.model`.

    Raises:
        CheckpointError: missing, not a regular file, too large, or unreadable.
    """
    missing = f"Give a local checkpoint directory that holds {MODEL_FILE}."
    return regular_file.read(file, limit_bytes=MODEL_BYTES, missing=missing)


def damaged(where: str, found: str) -> CheckpointError:
    """The error for bytes that are not a sentencepiece model."""
    return CheckpointError(
        "not a sentencepiece model, or a damaged one",
        where=where,
        found=found,
        remedy="Download it again; Mixtral's tokenizer.model has 493443 B.",
    )


def check_model(data: bytes, where: str) -> None:
    """Walk the outer protobuf message, which must have pieces (1), trainer (2) and normaliser (3).

    sentencepiece accepts a file that was cut between two fields and silently fills in defaults,
    which mean another algorithm and another treatment of spaces.

    Raises:
        CheckpointError: empty, cut short, another format, or a git-lfs pointer.
    """
    if not data:
        raise damaged(where, "an empty file")
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "this is a git-lfs pointer, not the file itself",
            where=where,
            remedy="Run `git lfs pull` in the checkpoint's directory.",
        )
    fields = set()
    at = 0
    while at < len(data):
        tag, at = _varint(data, at, where)
        kind = tag & 7
        fields.add(tag >> 3)
        if kind == 2:
            size, at = _varint(data, at, where)
            at += size
        elif kind == 0:
            _, at = _varint(data, at, where)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise damaged(where, f"{len(data)} B of another format")
    if at > len(data) or not fields >= {1, 2, 3}:
        raise damaged(where, f"a file cut short after {len(data)} B")


def pieces(data: bytes) -> list[tuple[str, float, int]]:
    """The name, the score and the type of each piece of a model that was checked."""
    found, at = [], 0
    while at < len(data):
        field, value, at = _field(data, at)
        if field == 1 and isinstance(value, bytes):
            found.append(_piece(value))
    return found


def _piece(data: bytes) -> tuple[str, float, int]:
    name, score, kind = "", 0.0, 1
    at = 0
    while at < len(data):
        field, value, at = _field(data, at)
        if field == 1 and isinstance(value, bytes):
            name = value.decode()
        elif field == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == 3 and isinstance(value, int):
            kind = value
    return name, score, kind


def _field(data: bytes, at: int) -> tuple[int, bytes | int, int]:
    """(field, value, where the next one begins); numbers of fixed width are bytes."""
    tag, at = _varint(data, at, MODEL_FILE)
    if tag & 7 == 0:
        value, at = _varint(data, at, MODEL_FILE)
        return tag >> 3, value, at
    if tag & 7 == 2:
        size, at = _varint(data, at, MODEL_FILE)
    else:
        size = 8 if tag & 7 == 1 else 4
    return tag >> 3, data[at : at + size], at + size


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise damaged(where, f"a file cut short after {len(data)} B")
