"""What the hub's cache holds of models, and how it is removed, through huggingface_hub.

Knows no network and nothing of what the files hold.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qmix.errors import CheckpointError
from qmix.hub.remote import HubOptions
from qmix.hub.repo_id import RepoId

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy


@dataclass(frozen=True)
class CachedModel:
    """One snapshot of a model in the cache.

    Attributes:
        refs: the branches and tags that stand for it.
        nbytes: of its files on the disk; several snapshots may share some.
    """

    name: str
    commit: str
    refs: frozenset[str]
    folder: Path
    nbytes: int

    def __str__(self) -> str:
        if "main" in self.refs:
            return self.name
        return f"{self.name}@{min(self.refs, default=self.commit)}"


def models(options: HubOptions) -> tuple[CachedModel, ...]:
    """Every snapshot of a model, by name."""
    from huggingface_hub import scan_cache_dir

    if not options.cache.is_dir():
        return ()
    found = [
        CachedModel(
            repository.repo_id,
            revision.commit_hash,
            revision.refs,
            revision.snapshot_path,
            revision.size_on_disk,
        )
        for repository in scan_cache_dir(options.cache).repos
        if repository.repo_type == "model"
        for revision in repository.revisions
    ]
    return tuple(sorted(found, key=lambda model: (model.name, model.commit)))


@dataclass(frozen=True)
class Removal:
    """Snapshots that are about to be removed.

    Attributes:
        freed_bytes: what that frees; blobs that other snapshots use stay.
    """

    models: tuple[CachedModel, ...]
    freed_bytes: int

    def run(self, options: HubOptions) -> None:
        """Remove them."""
        _strategy(self.models, options).execute()


def removal_of(repo: RepoId, options: HubOptions) -> Removal:
    """What removing a model means: all its snapshots, or the one of its revision.

    Raises:
        CheckpointError: the cache holds no such model.
    """
    meant = tuple(model for model in models(options) if _is_meant(model, repo))
    if not meant:
        raise CheckpointError(
            "not in the hub's cache",
            where=str(repo),
            expected="one of those that qmix list shows",
            found=", ".join(map(str, models(options)[:5])) or "an empty cache",
        )
    return Removal(meant, _strategy(meant, options).expected_freed_size)


def remove_file(path: Path, options: HubOptions) -> None:
    """Remove a file of a snapshot, and its blob unless another snapshot uses it."""
    from huggingface_hub import scan_cache_dir

    found = scan_cache_dir(options.cache)
    files = [file for repo in found.repos for revision in repo.revisions for file in revision.files]
    (meant,) = (file for file in files if file.file_path == path)
    if hasattr(found, "delete_files"):  # since 1.24; it knows of blobs that repositories share
        found.delete_files(meant).execute()
        return
    path.unlink()
    if not any(file.blob_path == meant.blob_path and file != meant for file in files):
        meant.blob_path.unlink(missing_ok=True)


def _is_meant(model: CachedModel, repo: RepoId) -> bool:
    if model.name != repo.name:
        return False
    revision = repo.revision
    return revision is None or revision in model.refs or model.commit.startswith(revision)


def _strategy(meant: Iterable[CachedModel], options: HubOptions) -> "DeleteCacheStrategy":
    from huggingface_hub import scan_cache_dir

    commits = [model.commit for model in meant]
    return scan_cache_dir(options.cache).delete_revisions(*commits)
