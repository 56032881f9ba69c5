"""A folder with what a repository says of itself: texts, and of its weights the headers alone.

Behind a header the file is a hole of the data's size, which takes no disk: every reader of headers
reads such a folder as it does the model's. A shard can be put in its place and taken out again.
Knows the headers' sizes and nothing of what they say.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.files.file_errors import writing
from qmix.gguf.container import read_gguf
from qmix.hub import cache, remote
from qmix.hub.download import Download
from qmix.hub.remote import HubOptions, Listing
from qmix.hub.repo_id import RepoId
from qmix.hub.selection import choose, listed_shards

_FIRST_BYTES = 1 << 16  # holds the header of a 16-bit shard
_HEADER_BYTES = 25_000_000  # the hub's own limit; a longer header is refused by its reader
_GGUF_BYTES = (2 << 20, 8 << 20, 32 << 20)
_AT_ONCE = 8


@dataclass(frozen=True)
class HeaderFolder:
    """The folder, and the repository that it describes.

    Attributes:
        path: of the folder, or of its first GGUF file.
        headers: bytes that were fetched of each file with weights, by name.
        fetched: the files that `put` downloaded.
    """

    path: Path
    repo: RepoId
    listing: Listing
    options: HubOptions
    headers: Mapping[str, bytes]
    fetched: set[str] = field(default_factory=set)

    @property
    def snapshot(self) -> Path:
        """The folder in the cache."""
        return self.options.cache / self.repo.folder_name / "snapshots" / self.listing.commit

    def download(self) -> Download:
        """What will be fetched if every file is put in its place."""
        missing = [name for name in self.headers if not (self.snapshot / name).exists()]
        sizes = self.listing.sizes
        return Download(
            repo=self.repo,
            commit=self.listing.commit,
            layout="safetensors, a few at a time",
            files=len(missing),
            of_files=len(self.headers),
            nbytes=sum(sizes[name] for name in missing),
            whole_bytes=sum(sizes.values()),
            cache=self.options.cache,
            free_bytes=remote.check_disk(0, self.options.cache),
        )

    def check_space(self, names: Iterable[str], out: Path, out_bytes: int) -> None:
        """Raise unless the disk of the cache holds these files at once, and `out` where it is same.

        Raises:
            ResourceError: it does not.
        """
        nbytes = sum(self.listing.sizes[name] for name in names)
        above = remote.existing_above(self.options.cache)
        same = above.stat().st_dev == remote.existing_above(out).stat().st_dev
        remote.check_disk(nbytes + (out_bytes if same else 0), self.options.cache)

    def put(self, name: str) -> None:
        """Download a file with weights into the cache, and put it where its header was.

        Raises:
            CheckpointError: it is another file than the one whose header was read.
        """
        if not (self.snapshot / name).exists():
            self.fetched.add(name)
        folder = remote.download(self.repo, [name], self.listing.commit, self.options, quiet=True)
        header = self.headers[name]
        with (folder / name).open("rb") as file:
            if file.read(len(header)) != header:
                raise CheckpointError(
                    "the file is not the one whose header was read",
                    where=f"{self.repo}: {name}",
                    remedy="Run it again.",
                )
        with writing(self.path):
            (self.path / name).unlink()
            (self.path / name).symlink_to((folder / name).absolute())

    def take_out(self, name: str) -> None:
        """Let go of a file that was put in; what was downloaded for that leaves the cache."""
        if name in self.fetched:
            cache.remove_file(self.snapshot / name, self.options)
        with writing(self.path):
            (self.path / name).unlink()
            _write_hole(self.path / name, self.headers[name], self.listing.sizes[name])


@contextmanager
def fetched(repo: RepoId, options: HubOptions, *, texts: bool = False) -> Iterator[HeaderFolder]:
    """A header folder of a repository, which is removed at the end.

    Args:
        texts: fetch the tokenizer and the like too.

    Raises:
        QmixError: see remote and selection; or the temporary directory is full.
    """
    if options.offline:
        raise remote.not_cached(repo, options)
    listing = remote.list_files(repo, options)
    selection = choose(repo, listing.sizes, "model" if texts else "headers")
    with tempfile.TemporaryDirectory(prefix="qmix-headers-") as temporary:
        # as in the cache, so that it is called by the repository's name
        folder = Path(temporary) / repo.folder_name / "snapshots" / listing.commit
        folder.mkdir(parents=True)
        if selection.texts:
            snapshot = remote.download(repo, selection.texts, listing.commit, options, quiet=True)
            for name in selection.texts:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(snapshot / name, folder / name)
        names = listed_shards(folder, selection)

        def write(name: str) -> tuple[str, bytes]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if selection.layout == "GGUF":
                return name, _gguf_header(folder / name, repo, name, listing, options)
            header = _safetensors_header(repo, name, listing, options)
            _write_hole(folder / name, header, listing.sizes[name])
            return name, header

        with writing(folder), ThreadPoolExecutor(_AT_ONCE) as pool:
            headers = dict(pool.map(write, names))
        path = folder / names[0] if selection.layout == "GGUF" else folder
        yield HeaderFolder(path, repo, listing, options, headers)


def _safetensors_header(repo: RepoId, name: str, listing: Listing, options: HubOptions) -> bytes:
    """The length and the header of a safetensors file."""
    start = remote.read_start(repo, name, listing.commit, _FIRST_BYTES, options)
    length = 8 + int.from_bytes(start[:8], "little")
    if len(start) < length <= _HEADER_BYTES:
        start += remote.read_start(repo, name, listing.commit, length, options, start=len(start))
    return start[:length]


def _gguf_header(
    path: Path, repo: RepoId, name: str, listing: Listing, options: HubOptions
) -> bytes:
    """Write as much of a GGUF file as its header takes, and return that."""
    start = b""
    for nbytes in _GGUF_BYTES:
        start += remote.read_start(repo, name, listing.commit, nbytes, options, start=len(start))
        _write_hole(path, start, listing.sizes[name])
        try:
            read_gguf(path)
        except UnsupportedError:
            return start
        except QmixError:
            if len(start) < nbytes or nbytes == _GGUF_BYTES[-1]:
                return start  # its reader says what is wrong
            continue
        return start
    return start


def _write_hole(path: Path, header: bytes, nbytes: int) -> None:
    """A file that begins with a header and is empty behind it, without taking disk for that."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(nbytes)
