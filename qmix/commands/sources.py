"""Checkpoints as a command is given them: a folder, a file, or a name of the hub.

Says what would be downloaded and asks. Knows no command.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmix.commands import terminal
from qmix.errors import QmixError, UsageError
from qmix.files import regular_file
from qmix.formats.metadata import read_metadata
from qmix.formats.mistral.detect import refuse_raw
from qmix.gguf.files import checked_source
from qmix.hub import header_folder, other_folders
from qmix.hub import source as door
from qmix.hub.download import Confirm, Download
from qmix.hub.header_folder import HeaderFolder
from qmix.hub.remote import HubOptions
from qmix.hub.repo_id import RepoId
from qmix.hub.selection import Need

_LEAST_CONTEXT = 16


def local(source: Path, *, yes: bool = False, need: Need = "model") -> Path:
    """The folder or file on this machine that a command's argument means; fetched if need be.

    Args:
        yes: download without asking.

    Raises:
        QmixError: as qmix.hub.source.resolve; or the user wants no download.
    """
    path = door.resolve(source, need=need, confirm=confirmation(yes=yes))
    if other_folders.has_unused_adapter(path):
        terminal.notice(
            f"{path}: the adapter beside the model is not used; qmix quantize --adapter merges one"
        )
    return path


@contextmanager
def described(source: Path, *, part: bool = False) -> Iterator[Path]:
    """The same for a command that reads headers only; see qmix.hub.source.described."""
    with door.described(source, part=part) as path:
        yield path


@contextmanager
def shard_by_shard(source: Path, *, yes: bool) -> Iterator[HeaderFolder]:
    """A model of the hub whose files are fetched when they are read, and removed afterwards.

    Raises:
        UsageError: the model lies here already.
        QmixError: as qmix.hub.source.resolve; or the user wants no download.
    """
    repo = None if regular_file.exists(source) else RepoId.parse(source)
    if repo is None:
        raise UsageError(
            "not a model of the hub, and nothing of yours is removed",
            where="--discard-source",
            expected="ORG/NAME",
            found=str(source),
        )
    with header_folder.fetched(repo, HubOptions(), texts=True) as headers:
        if headers.path.suffix == ".gguf":
            raise UsageError("--discard-source does not apply to GGUF files", where=str(repo))
        confirmation(yes=yes)(headers.download())
        yield headers


def checked_context(source: Path, context: int | None, *, default: int | None = None) -> int:
    """The context for a model that is not loaded yet.

    Args:
        context: what the user asked for; None: `default`, or as much of it as the model has.
        default: None: all that the model has.

    Raises:
        CheckpointError: the checkpoint is damaged, or not there.
        UsageError: the context is too small, or larger than the model's.
    """
    refuse_raw(checked_source(source))
    most = read_metadata(source).config.max_position_embeddings
    if context is None:
        return min(default or most, most)
    if not _LEAST_CONTEXT <= context <= most:
        expected = f"{_LEAST_CONTEXT} to {most}"
        raise UsageError("out of range", where="--ctx", expected=expected, found=context)
    return context


def is_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirmation(*, yes: bool) -> Confirm:
    """Says what will be fetched; on a terminal it asks, unless `yes`."""

    def confirm(download: Download) -> None:
        terminal.message(f"download {download}")
        if is_terminal() and not yes and not terminal.asked("Download?"):
            raise QmixError(
                "nothing was downloaded",
                where=str(download.repo),
                remedy="--yes downloads without asking.",
            )

    return confirm
