"""JSON as a safe format: no NaN, no duplicate keys, no endless nesting, limited size.

Files are written whole or not at all. Knows nothing of what a document means.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from qmix import atomic_file
from qmix.errors import CheckpointError

CONFIG_BYTES = 1 << 20
INDEX_BYTES = 64 << 20


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} does not fit a float")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} appears twice")
            seen.add(key)
    return document


def loads(data: bytes | str, *, where: str) -> dict[str, Any]:
    """Parse one JSON object; `where` names it in errors.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object; a duplicate key, NaN or infinity.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        document = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError("not valid JSON", where=where, found=reason[:200]) from None
    if not isinstance(document, dict):
        raise CheckpointError(
            "wrong JSON value", where=where, expected="an object", found=type(document).__name__
        )
    return document


def read(path: Path, *, limit_bytes: int = CONFIG_BYTES) -> dict[str, Any]:
    """Read one JSON object from a file of at most `limit_bytes`; see loads and read_bytes."""
    return loads(read_bytes(path, limit_bytes=limit_bytes), where=str(path))


def read_bytes(path: Path, *, limit_bytes: int) -> bytes:
    """Read a regular file of at most `limit_bytes`.

    Raises:
        CheckpointError: it is missing, is not a regular file, is larger, or cannot be read.
    """
    try:
        if not path.is_file():
            raise CheckpointError("no such file", where=str(path))
        size = path.stat().st_size
        if size > limit_bytes:
            raise CheckpointError(
                "file too large", where=str(path), expected=f"at most {limit_bytes} B", found=size
            )
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError("cannot be read", where=str(path), found=error.strerror) from error


def write(path: Path, document: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Replace `path` by the document in ASCII; until it is on the disk, the old file stays.

    Raises:
        OSError: the file cannot be written; the old one, if there is one, is unchanged.
    """
    text = json.dumps(document, indent=indent) + "\n"
    atomic_file.write(path, text.encode())
