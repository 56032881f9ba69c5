"""The one door to a checkpoint: whatever names it becomes a path on this machine.

Knows no torch and nothing of what the files hold.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qmix.errors import ResourceError
from qmix.files import regular_file
from qmix.hub import header_folder, other_folders
from qmix.hub.download import Confirm, cached, fetch, ignore
from qmix.hub.local import snapshot_of
from qmix.hub.remote import HubOptions, UnreachableError
from qmix.hub.repo_id import RepoId
from qmix.hub.selection import Need, gguf_path, is_complete


def resolve(
    source: str | Path,
    *,
    need: Need = "model",
    options: HubOptions | None = None,
    confirm: Confirm = ignore,
) -> Path:
    """The folder or file on this machine that a checkpoint's name means; fetched if need be.

    Args:
        source: a folder, a GGUF file, the folder of a model in a hub's cache, or a name of the hub:
            ORG/NAME, ORG/NAME@REVISION, hf://ORG/NAME. What lies here comes first.
        need: what will be read of it. Without "model" no weights are fetched.
        options: how the hub is used.
        confirm: is told what will be fetched before any weight is, and raises to refuse it.

    Raises:
        CheckpointError: it is something else than a checkpoint, or is found nowhere.
        UnsupportedError: the hub's repository is gated, or in no layout that is read.
        ResourceError: the disk is too small, or the hub answers no more requests.
    """
    if (here := _here(source, need)) is not None:
        return here
    repo = RepoId.parse(source)
    return Path(source) if repo is None else fetch(repo, need, options or HubOptions(), confirm)


@contextmanager
def described(source: str | Path, *, part: bool = False) -> Iterator[Path]:
    """A checkpoint whose headers alone will be read: of one on the hub no weights are fetched.

    Args:
        part: a file of a checkpoint is meant too, such as its config.json.

    Raises:
        QmixError: as resolve.
    """
    of_file = part and not regular_file.is_folder(Path(source))
    here = _here(source, "config" if of_file else "model")
    repo = None if here is not None else RepoId.parse(source)
    if repo is None:
        yield here or Path(source)
        return
    options = HubOptions()
    found = cached(repo, options)
    if found is not None and is_complete(found, "weights", repo):
        yield gguf_path(found, repo) or found
        return
    with ExitStack() as stack:
        try:
            path = stack.enter_context(header_folder.fetched(repo, options)).path
        except (UnreachableError, ResourceError):
            if not (part and found is not None and is_complete(found, "config", repo)):
                raise
            path = found  # its config.json tells the shapes
        yield path


def _here(source: str | Path, need: Need) -> Path | None:
    """What a name means on this machine; None if there is nothing by that name."""
    path = Path(source)
    if regular_file.is_folder(path):
        folder = snapshot_of(path)
        if need in ("model", "raw") and not regular_file.exists(folder / other_folders.CONFIG):
            other_folders.check(folder)
        return folder
    if not regular_file.exists(path):
        return None
    if need in ("model", "raw"):
        other_folders.check_file(path)
    return path
