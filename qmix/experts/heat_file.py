"""Heat files: the heat of a model's experts at the end of its last run, for the next warm start.

JSON: {"format": "qmix-heat", "version": 1, "model": fingerprint, "heat": [Q16, ...]}.
Knows no slots.
"""

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from qmix import strict_json
from qmix.errors import CheckpointError
from qmix.files import user_files
from qmix.quantities import counted

FORMAT, VERSION = "qmix-heat", 1


def fingerprint(routers: Iterable[bytes]) -> str:
    """SHA-256 of the routers' weights, layer by layer, which decide the heat.

    Routers stay in 16 bits, so a model has one heat file whatever its experts are quantized to.
    """
    digest = hashlib.sha256()
    for data in routers:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def save(path: Path, heat: Sequence[int], *, model: str) -> None:
    """Replace the file; the old one stays until the new one is on the disk.

    Args:
        heat: of each expert, Q16.
        model: the model's fingerprint.

    Raises:
        WriteError: the file cannot be written, or others can write to its directory.
    """
    document = {"format": FORMAT, "version": VERSION, "model": model, "heat": list(heat)}
    user_files.prepare(path)
    strict_json.write(path, document, indent=None, private=True)


def read(path: Path, *, experts: int, model: str) -> list[int]:
    """The heat of each expert, Q16.

    Args:
        experts: how many there must be.
        model: the model's fingerprint.

    Raises:
        CheckpointError: there is no such file, it is damaged or another model's, or others can
            have written it.
    """
    user_files.check(path)
    document = strict_json.read(path)
    remedy = "Delete it: a new one is made."
    kind = (document.get("format"), document.get("version"))
    if kind != (FORMAT, VERSION):
        raise CheckpointError(
            "not a heat file",
            where=str(path),
            expected=f"{FORMAT} {VERSION}",
            found=f"{kind[0]} {kind[1]}"[:80],
            remedy=remedy,
        )
    if document.get("model") != model:
        raise CheckpointError(
            "the heat of another model",
            where=str(path),
            expected=model[:12],
            found=str(document.get("model"))[:12],
            remedy=remedy,
        )
    heat = document.get("heat")
    if not isinstance(heat, list) or not all(type(h) is int and h >= 0 for h in heat):
        raise CheckpointError(
            "damaged", where=str(path), expected="a list of whole numbers, 0 or more", remedy=remedy
        )
    if len(heat) != experts:
        raise CheckpointError(
            "damaged",
            where=str(path),
            expected=counted(experts, "expert"),
            found=len(heat),
            remedy=remedy,
        )
    return heat


def read_if_good(path: Path, *, experts: int, model: str) -> list[int] | None:
    """The heat; None if there is no file yet, or, with a warning, if it cannot be used."""
    if not os.path.lexists(path):
        return None
    try:
        return read(path, experts=experts, model=model)
    except CheckpointError as error:
        warnings.warn(f"{error} Starting without it.", stacklevel=2)
        return None
