"""Which GGUF files make up a model: one, or shards `NAME-00001-of-0000N.gguf`, or a folder of them.

Knows nothing of tensors' meaning.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmix.errors import CheckpointError
from qmix.files import regular_file
from qmix.files.file_names import existing, is_hidden, visible
from qmix.gguf.container import GGUFFile, GGUFTensor, read_gguf
from qmix.gguf.header_fields import Value
from qmix.quantities import counted

SUFFIX = ".gguf"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_INDEX, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class GGUFModel:
    """The headers of all files of a model.

    Attributes:
        path: of the file that carries the metadata, for errors.
        metadata: of the first file; see GGUFFile.
        tensors: (file, tensor) by name.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, tuple[Path, GGUFTensor]]


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a GGUF file, or a folder that holds such files and no safetensors."""
    path = Path(path)
    if not regular_file.is_folder(path):
        return path.suffix == SUFFIX and regular_file.exists(path)
    return bool(visible(path, f"*{SUFFIX}")) and not visible(path, "*.safetensors")


def checked_source(path: str | Path) -> Path:
    """The path of a checkpoint: its directory, or a GGUF file.

    Raises:
        CheckpointError: there is neither.
    """
    return Path(path) if is_gguf(path) else regular_file.checked_folder(path)


def gguf_files(path: str | Path) -> tuple[Path, ...]:
    """The files of the model at a path for which `is_gguf` is true, the first shard first.

    Raises:
        CheckpointError: a folder with several models, or a shard that is missing.
    """
    path = Path(path)
    if not regular_file.is_folder(path):
        return _shards(path)
    with regular_file.reading(path):
        found = sorted(f for f in path.iterdir() if f.suffix == SUFFIX and not is_hidden(f))
    files = _shards(found[0])
    if others := [file.name for file in found if file not in files]:
        raise CheckpointError(
            "several GGUF models in one folder",
            where=str(path),
            expected="one file, or the shards of one model",
            found=", ".join([found[0].name, *others][:5]),
            remedy="Give the file instead of the folder.",
        )
    return files


def _shards(file: Path) -> tuple[Path, ...]:
    """All shards of the model of which `file` is one."""
    match = _SHARD.fullmatch(file.name)
    if match is None:
        return (file,)
    stem, index, count = match[1], int(match[2]), int(match[3])
    present = {other.name for other in file.parent.glob(f"*{SUFFIX}")}
    if not 1 <= index <= count:
        raise CheckpointError(
            "no shard has this number", where=str(file), expected=f"1 to {count}", found=index
        )
    files = []
    for number in range(1, count + 1):
        name = f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}"
        if name not in present:
            raise CheckpointError(
                "a shard is missing",
                where=str(file.parent / name),
                expected=counted(count, "shard"),
                found=f"{len(present)} GGUF files in the folder",
                remedy="Download the missing shards.",
            )
        files.append(existing(file.parent, name))
    return tuple(files)


def read_model(path: str | Path) -> GGUFModel:
    """Read the headers of all files of a model.

    Raises:
        CheckpointError: as gguf_files and read_gguf; or the shards are not those of one model.
        UnsupportedError: as read_gguf.
    """
    files = gguf_files(path)
    headers = [read_gguf(file) for file in files]
    tensors: dict[str, tuple[Path, GGUFTensor]] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                found = f"{tensors[name][0].name} and {header.path.name}"
                raise CheckpointError(
                    f"tensor {name} is in two files", where=str(header.path), found=found
                )
            tensors[name] = (header.path, tensor)
    _check_split(headers, len(tensors))
    return GGUFModel(files[0], headers[0].metadata, tensors)


def _check_split(headers: Sequence[GGUFFile], tensor_count: int) -> None:
    """Raise unless what each file says of its place among the shards is true."""
    for index, header in enumerate(headers):
        split = len(headers) > 1
        for key, expected in ((_INDEX, index), (_COUNT, len(headers)), (_TENSORS, tensor_count)):
            found = header.metadata.get(key)
            if found == expected or (not split and (found is None or found == 0)):
                continue
            if found is None and key == _TENSORS:
                continue
            raise CheckpointError(
                "the file is another model's shard, or has lost its name",
                where=f"{header.path}: {key}",
                expected=expected,
                found=repr(found)[:80],
                remedy="Give every shard the name under which it was published.",
            )
