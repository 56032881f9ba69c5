"""The hub over the network, through huggingface_hub: its cache, its token, its retries, its bars.

What goes wrong becomes one error with its remedy. Imports huggingface_hub when it is used.
"""

import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from threading import Event, current_thread, main_thread
from types import FrameType
from typing import Any

from qmix.errors import CheckpointError, QmixError, ResourceError, UnsupportedError
from qmix.files.file_errors import FULL, write_error
from qmix.files.file_names import is_plain_name
from qmix.hub.repo_id import RepoId

_LOGIN = "log in (hf auth login, or HF_TOKEN=...)"


class UnreachableError(CheckpointError):
    """Nothing here has the name, and the hub cannot be asked: no network, or none is allowed."""


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How the hub is used; the names are transformers'.

    Attributes:
        revision: a branch, a tag or a commit, where the name says none.
        token: of the hub; None: the one that was saved, or $HF_TOKEN. False: none.
        cache_dir: another cache; None: $HF_HUB_CACHE, or $HF_HOME/hub.
        local_files_only: ask no network.
        force_download: fetch again what the cache has.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def taken(cls, options: dict[str, Any]) -> "HubOptions":
        """Take the hub's options out of `from_pretrained`'s."""
        if (old := options.pop("use_auth_token", None)) is not None:
            options.setdefault("token", old)
        names = cls.__dataclass_fields__
        given = {name: options.pop(name) for name in names if name in options}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def cache(self) -> Path:
        """The folder of the cache."""
        from huggingface_hub import constants

        return Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser()

    @property
    def offline(self) -> bool:
        """Whether no network may be asked."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit: bytes by path."""

    commit: str
    sizes: Mapping[str, int]


def list_files(repo: RepoId, options: HubOptions) -> Listing:
    """Ask what a repository holds.

    Raises:
        CheckpointError: there is no such repository or revision.
        UnsupportedError: it is gated, or the token is refused.
        UnreachableError: the hub cannot be reached.
        ResourceError: it allows no more requests, or fails.
    """
    from huggingface_hub import HfApi

    with _explained(repo):
        info = HfApi(token=options.token).model_info(
            repo.name, revision=repo.revision, files_metadata=True
        )
    sizes = {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if all(map(is_plain_name, file.rfilename.split("/"))) and "\\" not in file.rfilename
    }
    return Listing(info.sha or "", sizes)


def download(
    repo: RepoId, names: Sequence[str], commit: str, options: HubOptions, *, quiet: bool = False
) -> Path:
    """Fetch files into the hub's cache, where they are not there yet; returns the snapshot.

    Args:
        quiet: draw no bars, as for small files.

    Raises:
        QmixError: as list_files; or WriteError: the disk is full.
    """
    from huggingface_hub import snapshot_download

    with _explained(repo, options.cache), _stopping() as stopped:
        folder = Path(
            snapshot_download(
                repo.name,
                revision=commit,
                allow_patterns=[escape(name) for name in names],
                cache_dir=options.cache_dir,
                token=options.token,
                force_download=options.force_download,
                tqdm_class=_bars(stopped, quiet=quiet),
            )
        )
    if missing := [name for name in names if not (folder / name).exists()]:
        raise UnreachableError(
            "the download is incomplete",
            where=str(repo),
            found=f"no {', '.join(missing[:5])}",
            remedy="Check the network, and run it again: what is complete is kept.",
        )
    return folder


@contextmanager
def _stopping() -> Iterator[Event]:
    """Yield what is set when Ctrl-C comes: the threads that download would go on to their ends."""
    stopped = Event()
    before = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or before is not signal.default_int_handler:
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _bars(stopped: Event, *, quiet: bool) -> type[Any]:
    """huggingface_hub's bars; every step of one ends its download once `stopped` is set."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options |= {"disable": True} if quiet else {}
            super().__init__(*arguments, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> Any:
            if stopped.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    return Bar


def read_start(
    repo: RepoId, name: str, commit: str, nbytes: int, options: HubOptions, start: int = 0
) -> bytes:
    """Bytes [start, nbytes) of a file, or fewer if it ends before, by one range request.

    Raises:
        QmixError: as list_files.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(token=options.token)
    headers["Range"] = f"bytes={start}-{nbytes - 1}"
    url = hf_hub_url(repo.name, name, revision=commit)
    data = bytearray()
    with _explained(repo), get_session().stream("GET", url, headers=headers) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        skipped = start if response.status_code == 200 else 0  # the server knows no ranges
        for chunk in response.iter_bytes(1 << 16):
            data += chunk
            if len(data) >= nbytes - start + skipped:
                break
    return bytes(data[skipped : nbytes - start + skipped])


def check_disk(nbytes: int, cache: Path) -> int:
    """The free bytes where the cache lies.

    Raises:
        ResourceError: they are fewer than will be fetched.
    """
    free = shutil.disk_usage(existing_above(cache)).free
    if free < nbytes:
        raise ResourceError(
            "not enough free disk for the download",
            where=str(cache),
            expected=f"{nbytes / 1e9:.2f} GB",
            found=f"{free / 1e9:.2f} GB free",
            remedy="Set HF_HOME to a larger disk; or quantize shard by shard: "
            "qmix quantize ORG/NAME OUT --discard-source",
        )
    return free


def existing_above(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def not_cached(repo: RepoId, options: HubOptions) -> UnreachableError:
    """The error for a model that is not in the cache, where no network may be asked."""
    why = "local_files_only" if options.local_files_only else "HF_HUB_OFFLINE is set"
    return UnreachableError(
        "neither a folder here nor complete in the hub's cache",
        where=str(repo),
        expected=f"a snapshot in {options.cache / repo.folder_name}",
        found=f"no network may be asked ({why})",
        remedy=f"With a network: qmix pull {repo}",
    )


@contextmanager
def _explained(repo: RepoId, cache: Path | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one error with its remedy."""
    from huggingface_hub import errors

    try:
        yield
    except QmixError:
        raise
    except errors.OfflineModeIsEnabled:
        raise not_cached(repo, HubOptions()) from None
    except errors.GatedRepoError:
        raise UnsupportedError(
            "a gated repository, and you may not read it yet",
            where=str(repo),
            remedy=f"Accept its terms at {_page(repo)}, then {_LOGIN}.",
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            "no such revision",
            where=str(repo),
            remedy=f"{_page(repo)}/tree/main lists its branches and tags.",
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            "neither a folder here nor a repository on the hub",
            where=str(repo),
            remedy=f"Check the spelling (a folder is ./{repo.name}); for a private repository, "
            f"{_LOGIN}.",
        ) from None
    except errors.LocalTokenNotFoundError:
        raise UnsupportedError("there is no token", where=str(repo), remedy=f"{_LOGIN}.") from None
    except errors.LocalEntryNotFoundError as error:  # the hub did not answer, or said no
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refused(repo, cause) from None
        raise _unreachable(repo, error) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(
            "a file is gone from the repository", where=str(repo), found=_first_line(error)
        ) from None
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error) from None
    except OSError as error:
        if error.errno in FULL and cache is not None:
            raise write_error(cache, error) from error
        raise _unreachable(repo, error) from error
    except _transport_errors() as error:
        raise _unreachable(repo, error) from error


def _transport_errors() -> type[Exception]:
    """What the HTTP client below huggingface_hub raises; which client depends on the version."""
    from huggingface_hub import errors

    client: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    return client


def _unreachable(repo: RepoId, error: Exception) -> UnreachableError:
    cause = error.__cause__ or error
    return UnreachableError(
        "no folder here, and the hub cannot be reached",
        where=str(repo),
        found=f"{type(cause).__name__}: {_first_line(cause)}"[:200],
        remedy="Check the network and the proxy (HTTPS_PROXY, HF_ENDPOINT), or give a folder.",
    )


def _refused(repo: RepoId, error: Any) -> QmixError:
    """The error for an answer that is none of the named ones."""
    status = error.response.status_code
    if status == 429:
        after = error.response.headers.get("Retry-After")
        when = f"in {after} s" if after and after.isdecimal() else "in some minutes"
        return ResourceError(
            "the hub allows no more requests for now (429)",
            where=str(repo),
            remedy=f"Try again {when}; {_LOGIN} for a larger quota.",
        )
    if status in (401, 403):
        return UnsupportedError(
            f"the hub refuses access ({status})",
            where=str(repo),
            found=_first_line(error),
            remedy=f"The token may be wrong or lack the right to read: {_LOGIN}.",
        )
    return ResourceError(
        f"the hub answers {status}",
        where=str(repo),
        found=_first_line(error),
        remedy="Try again later: https://status.huggingface.co",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def _page(repo: RepoId) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo.name}"
