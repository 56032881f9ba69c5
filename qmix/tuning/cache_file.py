"""tuning.json in the user's cache: which tuning was found, on which card, for which shapes.

An entry is found only if all of its key is the same: another driver, compiler or source of the
kernels means another search. Knows no torch, and of a tuning only that it is JSON.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError
from qmix.files import user_files

FILE = "tuning.json"
_VERSION = 1
_MOST_ENTRIES = 200  # the newest stay
_PACKAGE = Path(__file__).resolve().parents[1]
_HASHED = ("kernels/gpu", "weights/packed")


@dataclass(frozen=True, kw_only=True)
class TuningKey:
    """What a tuning was found for.

    Attributes:
        capability: of the GPU, such as "9.0".
        kernels: `kernel_hash` of the sources.
        shapes: of the model and its step.
    """

    gpu: str
    capability: str
    driver: str
    triton: str
    kernels: str
    shapes: str

    def is_of_same_card(self, other: "TuningKey") -> bool:
        """Whether only the shapes may differ."""
        mine, theirs = asdict(self), asdict(other)
        return all(mine[name] == theirs[name] for name in mine if name != "shapes")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a search found.

    Attributes:
        tuning: as JSON.
        microseconds, untuned: of what was timed, with the tuning and with the defaults.
        complete: False if the search was ended from outside.
        date: ISO 8601.
    """

    key: TuningKey
    tuning: Mapping[str, Any]
    microseconds: float
    untuned: float
    complete: bool
    date: str


@dataclass(frozen=True)
class SavedTunings:
    """The entries of the file; `trouble` says why an existing file was ignored."""

    entries: tuple[Entry, ...] = ()
    trouble: str | None = None

    def of(self, key: TuningKey) -> Entry | None:
        """The entry of a key."""
        return next((entry for entry in self.entries if entry.key == key), None)


@cache
def kernel_hash() -> str:
    """A hash of the sources that decide what a launch does."""
    digest = hashlib.sha256()
    for folder in _HASHED:
        for path in sorted((_PACKAGE / folder).glob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def default_path() -> Path:
    """The file in qmix's cache directory."""
    return user_files.cache_directory() / FILE


def load(path: Path | None = None) -> SavedTunings:
    """What was saved; a damaged file is reported and ignored."""
    path = path or default_path()
    if not os.path.lexists(path):
        return SavedTunings()
    try:
        return SavedTunings(_entries(path))
    except QmixError as error:
        return SavedTunings(trouble=f"{error} (ignored)")


def save(entry: Entry, path: Path | None = None) -> Path:
    """Save an entry beside those of other keys, in place of an earlier one of its key.

    Returns:
        the file.

    Raises:
        WriteError: it cannot be written; the old file is unchanged.
    """
    path = path or default_path()
    entries = user_files.with_entry(lambda: _entries(path), entry)[-_MOST_ENTRIES:]
    user_files.prepare(path)
    strict_json.write(
        path, {"version": _VERSION, "tunings": [asdict(each) for each in entries]}, private=True
    )
    return path


def _entries(path: Path) -> tuple[Entry, ...]:
    """All entries of the file.

    Raises:
        CheckpointError: it is not such a file, or others can have written it.
    """
    user_files.check(path)
    document = strict_json.read(path)
    entries = document.get("tunings")
    if document.get("version") != _VERSION or not isinstance(entries, list):
        raise _refusal(path, document)
    return tuple(_entry(path, each) for each in entries)


def _entry(path: Path, document: object) -> Entry:
    types = {"tuning": dict, "complete": bool, "date": str, "key": dict}
    names = {field.name for field in fields(Entry)}
    if not isinstance(document, dict) or document.keys() != names:
        raise _refusal(path, document)
    times = [document["microseconds"], document["untuned"]]
    key = document["key"]
    if (
        not all(isinstance(document[name], kind) for name, kind in types.items())
        or not all(type(each) in (int, float) and each > 0 for each in times)
        or key.keys() != {field.name for field in fields(TuningKey)}
        or not all(isinstance(value, str) for value in key.values())
    ):
        raise _refusal(path, document)
    return Entry(**{**document, "key": TuningKey(**key)})


def _refusal(path: Path, found: object) -> CheckpointError:
    return CheckpointError(
        "not a file of tunings",
        where=str(path),
        found=repr(found)[:80],
        remedy="qmix tune MODEL writes it again.",
    )
