"""Which files of a checkpoint directory hold which tensors: one file, or shards with an index.

Other files may lie beside them: what macOS leaves, Mistral's own files, adapters, the states of a
training. Reads headers only. Knows no torch and nothing of models.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.files.file_names import existing, is_hidden, is_plain_name
from qmix.files.regular_file import checked_folder, reading
from qmix.formats.files.safetensors_header import TensorInfo, read_header
from qmix.formats.files.shard_names import INDEX, SINGLE
from qmix.hub import other_folders
from qmix.hub.selection import is_other

_SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")


def read_headers(directory: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint directory, by their names in the files.

    Raises:
        CheckpointError: there is nothing to read, a file is damaged, or the index leaves the
            directory or does not list exactly the tensors that the files hold.
        UnsupportedError: the weights are in another format only.
    """
    folder = checked_folder(directory)
    with reading(folder):
        shards = _shards(folder)
    infos: dict[str, TensorInfo] = {}
    for name, listed in shards.items():
        path = existing(folder, name)
        of_shard = read_header(path)
        if listed is not None and of_shard.keys() != listed:
            raise _different(path, listed, of_shard.keys())
        infos.update(of_shard)
    return infos


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write the index: tensor name -> name of the file that holds it."""
    document = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    strict_json.write(folder / INDEX, document)


def _shards(folder: Path) -> Mapping[str, set[str] | None]:
    """File name -> the tensors that the index lists for it, None without an index."""
    present = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix == ".safetensors" and not is_hidden(path) and not is_other(path.name)
    )
    if (folder / INDEX).is_file():
        listed = _read_index(folder / INDEX)
        series = {_series(name) for name in listed} - {None}
        # A file of another name is none of the model's, and the index lists every tensor.
        if stray := [n for n in present if n not in listed and _series(n) in series]:
            raise CheckpointError(
                "the index does not list every shard",
                where=str(folder / INDEX),
                found=", ".join(stray[:5]),
                remedy="Remove the extra files or repair the index.",
            )
        return listed
    if SINGLE in present or len(present) == 1:
        return {SINGLE if SINGLE in present else present[0]: None}
    raise _nothing_to_read(folder, present)


def _read_index(path: Path) -> dict[str, set[str]]:
    """File name -> the tensors that the index lists for it."""
    document = strict_json.read(path, limit_bytes=strict_json.INDEX_BYTES)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("no weight_map", where=str(path), expected="tensor name -> file name")
    listed: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise CheckpointError(
                f"tensor {tensor}: not a plain file name",
                where=str(path),
                expected="NAME.safetensors in the same directory",
                found=repr(name)[:80],
            )
        listed.setdefault(name, set()).add(tensor)
    return listed


def _series(name: str) -> tuple[str, str] | None:
    """What the names of a model's shards have in common; None if it is none of theirs."""
    match = _SHARD.fullmatch(name)
    return None if match is None else (match[1], match[2])


def _is_plain(name: str) -> bool:
    """Whether a name is one path component on POSIX and on Windows, and ends in .safetensors."""
    return (
        name.endswith(".safetensors")
        and is_plain_name(name)
        and PureWindowsPath(name).name == name
        and not name.startswith("..")
    )


def _nothing_to_read(folder: Path, present: Sequence[str]) -> QmixError:
    if present:
        return CheckpointError(
            "several safetensors files and no index",
            where=str(folder),
            expected=f"{SINGLE}, or shards with {INDEX}",
            found=", ".join(present[:5]),
        )
    others = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
        and not is_hidden(path)
        and not other_folders.of_training(path.name)
    )
    if not others and (named := other_folders.error(folder)) is not None:
        return named
    if others:
        return UnsupportedError(
            "no safetensors files",
            where=str(folder),
            found=", ".join(others[:5]),
            remedy="qmix never unpickles: save the model again with safe_serialization=True.",
        )
    return CheckpointError(
        "no safetensors files", where=str(folder), expected=f"{SINGLE} or {INDEX}"
    )


def _different(path: Path, listed: Iterable[str], found: Iterable[str]) -> CheckpointError:
    missing, extra = sorted(set(listed) - set(found)), sorted(set(found) - set(listed))
    named = [f"missing {n}" for n in missing[:5]] + [f"unlisted {n}" for n in extra[:5]]
    return CheckpointError(
        "the shard does not hold the tensors that the index lists",
        where=str(path),
        found="; ".join(named[:5]),
    )
