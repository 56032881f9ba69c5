"""What an interrupted run leaves behind, and whether another run may continue it.

Nothing is trusted that the state does not list with its SHA-256, and the state ends with its own.
Knows settings by name and the results of finished layers; knows nothing of the work itself.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError, UsageError
from qmix.files.regular_file import open_regular
from qmix.formats.files import shard_writer
from qmix.formats.files.manifest import STATE
from qmix.quantize.source import Source

START_AGAIN = "Remove the directory and start again."
_SEAL = "sha256"
_SHOWN = 16  # hexadecimal digits of a SHA-256 in messages


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        settings: what decides the bytes of the result, besides the source.
        source: SHA-256 of the source's documents and tensors; see `Source`.
        results: of the layers that are finished.
        files: SHA-256 of each file that a resumed run builds on, by name: the finished layers'
            shards (see `shard_writer.file_digest`) and the tokens.
    """

    settings: Mapping[str, Any]
    source: Mapping[str, Mapping[str, str]]
    results: Sequence[Any] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Replace the folder's state; the old one stays until the new one is on the disk."""
        document = {
            "settings": self.settings,
            "source": self.source,
            "results": self.results,
            "files": self.files,
        }
        strict_json.write(folder / STATE, sealed(document), indent=None)


@dataclass(frozen=True)
class Damage:
    """A file of an interrupted run that is not what the state says: its SHA-256, or what it is."""

    path: Path
    expected: str
    found: str

    def error(self, remedy: str = START_AGAIN) -> CheckpointError:
        """The error that names it."""
        return CheckpointError(
            "a file of the interrupted run is damaged",
            where=str(self.path),
            expected=f"SHA-256 {self.expected[:_SHOWN]}",
            found=self.found,
            remedy=remedy,
        )


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the SHA-256 of all its other entries."""
    content = {name: value for name, value in document.items() if name != _SEAL}
    text = json.dumps(content, sort_keys=True)
    return {**content, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_state(folder: Path, settings: Mapping[str, Any], source: Source) -> RunState:
    """The state of `folder`, or a new one if no layer has been finished there.

    Raises:
        UsageError: the finished layers were made with other settings or from another source; the
            first difference is named.
        CheckpointError: the state is damaged.
    """
    identity = {"documents": source.documents, "tensors": source.digests}
    path = folder / STATE
    if not path.is_file():
        return RunState(settings, identity)
    document = strict_json.read(path, limit_bytes=strict_json.INDEX_BYTES)
    if _SEAL not in document:
        raise CheckpointError(
            "not the state of a run, or that of a qmix which kept no checksums",
            where=str(path),
            expected=_SEAL,
            found=", ".join(sorted(document)[:5]) or "nothing",
            remedy=START_AGAIN,
        )
    if document != (right := sealed(document)):
        raise CheckpointError(
            "the state of the interrupted run is damaged",
            where=str(path),
            expected=f"SHA-256 {right[_SEAL][:_SHOWN]}",
            found=str(document[_SEAL])[:_SHOWN],
            remedy=START_AGAIN,
        )
    for name in sorted(settings.keys() | document["settings"].keys()):
        _check_same(name, path, document["settings"].get(name), settings.get(name))
    for kind, now in identity.items():
        before = document["source"][kind]
        for name in sorted(before.keys() | now.keys()):
            what = f"source: {source.locate(name)}"
            _check_same(what, path, _shown(before.get(name)), _shown(now.get(name)))
    return RunState(settings, identity, document["results"], document["files"])


def _shown(digest: str | None) -> str:
    return "nothing" if digest is None else f"SHA-256 {digest[:_SHOWN]}"


def _check_same(name: str, path: Path, before: object, now: object) -> None:
    if before != now:
        raise UsageError(
            f"the interrupted run had another {name}",
            where=str(path),
            expected=before,
            found=now,
            remedy="Give the same options and source, or remove the directory and start again.",
        )


def damaged_files(folder: Path, files: Mapping[str, str]) -> Iterator[Damage]:
    """Read every file of `files`, name -> SHA-256, and find those that are other ones or gone."""
    for name, expected in files.items():
        path = folder / name
        try:
            digest = _digest(path)
        except CheckpointError as error:
            yield Damage(path, expected, str(error.found or error.what))
            continue
        if digest != expected:
            yield Damage(path, expected, f"SHA-256 {digest[:_SHOWN]}")


def _digest(path: Path) -> str:
    if path.suffix == ".safetensors":
        return shard_writer.file_digest(path)
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
