"""The folder that a model is saved into: new, or one that holds other files, which stay.

A folder that is new appears whole. In one that exists, everything is written into `.qmix-saving`
and moved up at the end, config.json last; what an interrupted save moved up is removed by the next.
Knows nothing of models.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qmix import strict_json
from qmix.errors import CheckpointError, UsageError
from qmix.files.file_errors import sync_directory, write_error, writing
from qmix.formats.files import output_dir
from qmix.formats.files.manifest import MARKER
from qmix.formats.files.shard_names import INDEX

_STAGE = ".qmix-saving"
# File name -> inode of what is moved up; complete before the first file is.
_JOURNAL = "moved.json"
_CONFIG = "config.json"


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into; what the block writes then stands in `folder`.

    Raises:
        UsageError: `folder` holds a checkpoint, or a file that would be replaced.
        WriteError: something cannot be written; `folder` is as it was.
    """
    folder = Path(os.path.abspath(folder))
    with writing(folder):
        if folder.is_symlink() and not folder.exists():
            raise UsageError("a link that leads nowhere", where=str(folder))
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
        elif not folder.is_dir():
            raise UsageError("not a directory", where=str(folder))
    if not folder.exists():
        with output_dir.partial(folder) as partial:
            yield partial
        return
    stage = folder / _STAGE
    try:
        _clear(folder)
        _check_free(folder, [_CONFIG, INDEX, *(path.name for path in folder.glob("*.safetensors"))])
        stage.mkdir()
        yield stage
        _move_up(stage, folder)
    except BaseException as error:
        with suppress(OSError, CheckpointError):
            _clear(folder)
        if isinstance(error, OSError):
            raise write_error(stage, error, "Nothing of this model was kept.") from error
        raise
    try:
        sync_directory(folder)
        shutil.rmtree(stage)
    except OSError as error:
        raise write_error(folder, error, "The model is saved and stands.") from error


def _check_free(folder: Path, names: list[str]) -> None:
    present = [name for name in names if os.path.lexists(folder / name)]
    if present:
        raise UsageError(
            "the directory already holds a checkpoint, or a file of the same name",
            where=str(folder),
            found=", ".join(present[:3]),
            remedy="Choose another directory, or remove it yourself.",
        )


def _move_up(stage: Path, folder: Path) -> None:
    names = sorted((path.name for path in stage.iterdir()), key=lambda name: name == _CONFIG)
    _check_free(folder, names)
    sync_directory(stage)
    inodes = {name: (stage / name).stat().st_ino for name in names}
    strict_json.write(stage / _JOURNAL, inodes)
    for name in names:
        (stage / name).rename(folder / name)


def _clear(folder: Path) -> None:
    """Remove what an interrupted save left: the files that it moved up, then its own folder.

    If all were moved up, the save was complete and they stay. So was one whose new folder has its
    name: only the marker goes.
    """
    if (folder / _CONFIG).is_file():
        (folder / MARKER).unlink(missing_ok=True)
    stage = folder / _STAGE
    if stage.is_symlink() or not stage.is_dir():
        return
    if (stage / _JOURNAL).is_file():
        inodes = strict_json.read(stage / _JOURNAL)
        moved = [name for name in inodes if not os.path.lexists(stage / name)]
        for name in moved if len(moved) < len(inodes) else ():
            path = folder / name
            if name == path.name and os.path.lexists(path) and path.lstat().st_ino == inodes[name]:
                path.unlink()
    shutil.rmtree(stage)
