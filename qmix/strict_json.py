"""JSON as a safe format: no NaN, no duplicate keys, no endless nesting, limited size.

Numbers fit a float, and text is Unicode. Files are written whole or not at all. Knows nothing of
what a document means.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from qmix.errors import CheckpointError
from qmix.files import atomic_file, regular_file

CONFIG_BYTES = 1 << 20
INDEX_BYTES = 64 << 20

_HIDDEN = re.compile(r"[^\n -~]")
_DEPTH = 64  # what is read can be written again, however deep the caller's stack is
_DIGITS = 308  # more do not fit a float


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} does not fit a float")
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits does not fit a float")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} appears twice")
            seen.add(key)
    return document


def _check_depth(document: object) -> None:
    level = [document]
    for _ in range(_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, (dict, list)):
                values = value.values() if isinstance(value, dict) else value
                inner += [each for each in values if isinstance(each, (dict, list))]
        if not inner:
            return
        level = inner
    raise ValueError(f"nested more than {_DEPTH} levels deep")


def loads(data: bytes | str, *, where: str) -> dict[str, Any]:
    """Parse one JSON object; `where` names it in errors.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object; a duplicate key, NaN or infinity, a
            number that does not fit a float, a lone surrogate, or 64 levels of nesting.
    """
    try:
        # a byte-order mark is what an editor on Windows leaves
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        document = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
        _check_depth(document)
        if "\\u" in text:  # only an escape can give half of a pair
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError("not valid JSON", where=where, found=reason[:200]) from None
    if not isinstance(document, dict):
        raise CheckpointError(
            "wrong JSON value", where=where, expected="an object", found=type(document).__name__
        )
    return document


def read(path: Path, *, limit_bytes: int = CONFIG_BYTES) -> dict[str, Any]:
    """Read one JSON object from a regular file of at most `limit_bytes`; see loads.

    Raises:
        CheckpointError: as loads and qmix.files.regular_file.read.
    """
    return loads(regular_file.read(path, limit_bytes=limit_bytes), where=str(path))


def write(
    path: Path,
    document: Mapping[str, Any],
    *,
    indent: int | None = 2,
    private: bool = False,
    readable: bool = False,
) -> None:
    """Replace `path` by the document in ASCII; until it is on the disk, the old file stays.

    Args:
        private: only the owner may read the file.
        readable: characters that can be printed stand as they are.

    Raises:
        WriteError: the file cannot be written; the old one, if there is one, is unchanged.
    """
    text = json.dumps(document, indent=indent, ensure_ascii=not readable) + "\n"
    text = _HIDDEN.sub(lambda match: _shown_or_escaped(match[0]), text)
    atomic_file.write(path, text.encode(), private=private)


def _shown_or_escaped(character: str) -> str:
    """A character of a string: what could drive a terminal is escaped."""
    return character if character.isprintable() else json.dumps(character)[1:-1]
