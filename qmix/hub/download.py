"""A model of the hub as a folder on this machine: from the cache, or fetched once it was said what.

The cache is looked at first, and what it holds whole needs no network. Knows no torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qmix.errors import ResourceError
from qmix.files import atomic_file, regular_file
from qmix.hub import remote
from qmix.hub.remote import HubOptions, Listing, UnreachableError
from qmix.hub.repo_id import RepoId
from qmix.hub.selection import Need, choose, gguf_path, is_complete, listed_shards
from qmix.quantities import counted

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Download:
    """What is about to be fetched.

    Attributes:
        files: how many of the weights' files are missing, of `of_files`.
        nbytes: of those.
        whole_bytes: of everything in the repository, most of which may be other layouts.
        free_bytes: on the disk of the cache.
    """

    repo: RepoId
    commit: str
    layout: str
    files: int
    of_files: int
    nbytes: int
    whole_bytes: int
    cache: Path
    free_bytes: int

    def __str__(self) -> str:
        files = counted(self.of_files, "file")
        if self.files != self.of_files:
            files = f"{self.files} of {files}"
        left_out = self.whole_bytes - self.nbytes
        rest = f" (not the {left_out / 1e9:.2f} GB of other files)" if left_out > 1e8 else ""
        return (
            f"{self.repo.name}@{self.commit[:7]}: {files} of {self.layout}, "
            f"{self.nbytes / 1e9:.2f} GB{rest}, to {self.cache}, which has "
            f"{self.free_bytes / 1e9:.1f} GB free"
        )


Confirm = Callable[[Download], None]


def ignore(_: Download) -> None:
    """Ask nobody, as a Python program expects."""


def cached(repo: RepoId, options: HubOptions) -> Path | None:
    """The snapshot in the cache, whole or not; None if there is none of this revision."""
    folder = options.cache / repo.folder_name
    revision = repo.revision or "main"
    if not _COMMIT.fullmatch(revision):
        ref = folder / "refs" / revision
        if not regular_file.exists(ref):
            return None
        revision = regular_file.read(ref, limit_bytes=200).decode("ascii", "replace").strip()
    snapshot = folder / "snapshots" / revision
    return snapshot if _COMMIT.fullmatch(revision) and snapshot.is_dir() else None


def fetch(
    repo: RepoId,
    need: Need,
    options: HubOptions,
    confirm: Confirm = ignore,
    *,
    newest: bool = False,
) -> Path:
    """The folder, or the GGUF file, of a model of the hub.

    Args:
        confirm: is told what will be fetched before any weight is, and raises to refuse it.
        newest: ask the hub even if the cache holds the model.

    Raises:
        QmixError: see remote and selection; or `confirm` raised it.
    """
    if options.revision is not None and repo.revision is None:
        repo = replace(repo, revision=options.revision)
    found = cached(repo, options)
    whole = found is not None and is_complete(found, need, repo)
    if found is not None and whole and not (newest or options.force_download):
        return gguf_path(found, repo) or found
    try:
        if options.offline:
            raise remote.not_cached(repo, options)
        listing = remote.list_files(repo, options)
    except (UnreachableError, ResourceError):
        if found is None or newest or not is_complete(found, _least(need), repo):
            raise
        return gguf_path(found, repo) or found
    return _fetch(repo, listing, need, options, confirm)


def _fetch(
    repo: RepoId, listing: Listing, need: Need, options: HubOptions, confirm: Confirm
) -> Path:
    selection = choose(repo, listing.sizes, need)
    folder = options.cache / repo.folder_name / "snapshots" / listing.commit
    if selection.texts:
        folder = remote.download(repo, selection.texts, listing.commit, options, quiet=True)
    _remember(repo, listing.commit, options)
    weights = listed_shards(folder, selection)
    missing = [
        name for name in weights if options.force_download or not regular_file.exists(folder / name)
    ]
    if missing:
        nbytes = sum(listing.sizes[name] for name in missing)
        cache = options.cache
        confirm(
            Download(
                repo=repo,
                commit=listing.commit,
                layout=selection.layout or "",
                files=len(missing),
                of_files=len(weights),
                nbytes=nbytes,
                whole_bytes=sum(listing.sizes.values()),
                cache=cache,
                free_bytes=remote.check_disk(nbytes, cache),
            )
        )
        folder = remote.download(repo, missing, listing.commit, options)
    return folder / weights[0] if selection.layout == "GGUF" else folder


def _remember(repo: RepoId, commit: str, options: HubOptions) -> None:
    """Keep which commit a branch or tag stands for, as huggingface_hub does."""
    revision = repo.revision or "main"
    if not _COMMIT.fullmatch(revision):
        ref = options.cache / repo.folder_name / "refs" / revision
        atomic_file.made_folder(ref.parent)
        atomic_file.write(ref, commit.encode())


def _least(need: Need) -> Need:
    """What must be there if nothing more can be had: a model may have no tokenizer."""
    return "config" if need in ("tokenizer", "config") else "weights"
