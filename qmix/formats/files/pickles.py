"""Files of `torch.save`: where the bytes of each tensor lie. No other file unpickles.

PyTorch's weights-only unpickler rebuilds tensors without storage, so nothing is run, mapped or
allocated, whatever the file says. The data are then read like those of a safetensors file. Mapping
the whole file would fail: Linux refuses a private map larger than memory and swap, and
consolidated.00.pth has 93 GB. Knows nothing of models.
"""

import errno
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.files.regular_file import open_regular
from qmix.formats.files.safetensors_header import HEADER_BYTES, KNOWN_STARTS
from qmix.formats.files.shards import DTYPES, Entry
from qmix.quantities import counted

# Before 2.10 a file could make the weights-only unpickler write outside memory (CVE-2026-24747).
_OLDEST_PYTORCH = (2, 10)
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
# A zip record begins with them; the last four are the lengths of its name and its extra field.
_LOCAL_HEADER_BYTES = 30
_DOWNLOAD_AGAIN = "Download it again, from its publisher. Nothing in it was run."


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of one file, each checked to lie inside a record of the archive.

    Raises:
        CheckpointError: the file is damaged, or not a dictionary of plain tensors; none of its code
            was run.
        UnsupportedError: PyTorch before 1.6 wrote the file, or the installed PyTorch is too old.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_PYTORCH:
        raise UnsupportedError(
            "pickles are read with PyTorch 2.10 or newer only",
            where=str(path),
            found=f"PyTorch {torch.__version__}, whose reader is vulnerable (CVE-2026-24747)",
            remedy="Update PyTorch, or get the weights as safetensors.",
        )
    with open_regular(path) as file:
        start = file.read(64)
        try:
            records = _records(file, path)
            file.seek(0)
            with FakeTensorMode(), warnings.catch_warnings():
                # torch 2.15 warns of a sparse tensor's price; it is refused below.
                warnings.filterwarnings("ignore", "Validating sparse tensor", UserWarning)
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        except QmixError:
            raise
        except Exception as error:  # a damaged archive or pickle may raise anything
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise  # the disk; EINVAL comes of an offset that the archive states
            raise _unreadable(path, start, error) from None
    if not isinstance(loaded, dict):
        raise CheckpointError(
            "not a dictionary of tensors", where=str(path), found=type(loaded).__name__
        )
    return {name: _entry(path, name, value, records) for name, value in loaded.items()}


def _records(file: BinaryIO, path: Path) -> dict[int, int]:
    """Offset of each storage's record -> its bytes; what torch.save never writes is refused."""

    def refuse(what: str, found: object = None) -> CheckpointError:
        return CheckpointError(what, where=str(path), found=found, remedy=_DOWNLOAD_AGAIN)

    archive = zipfile.ZipFile(file)
    infos = {info.filename: info for info in archive.infolist()}
    if len(infos) != len(archive.infolist()):
        raise refuse("a record of the archive appears twice")
    pickled = [name for name in infos if name.rpartition("/")[2] == "data.pkl"]
    if len(pickled) != 1:
        raise refuse("not a file of torch.save", f"{counted(len(pickled), 'record')} data.pkl")
    prefix = pickled[0].removesuffix("data.pkl")
    if prefix + "constants.pkl" in infos:
        raise refuse("a TorchScript program, not weights")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
        raise refuse("the archive is compressed, which torch.save never does")
    if infos[pickled[0]].file_size > HEADER_BYTES:
        raise refuse("the pickle is too large", f"{infos[pickled[0]].file_size} B")
    order = infos.get(prefix + "byteorder")
    if order is not None and (order.file_size > 64 or archive.read(order) != b"little"):
        raise refuse("the byte order is not little-endian")
    records = {}
    for name, info in infos.items():
        if name.startswith(prefix + "data/"):
            file.seek(info.header_offset)
            lengths = struct.unpack("<HH", file.read(_LOCAL_HEADER_BYTES)[-4:])
            records[info.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)] = info.file_size
    return records


def _entry(path: Path, name: Any, value: Any, records: Mapping[int, int]) -> Entry:
    def refuse(what: str, expected: object = None, found: object = None) -> CheckpointError:
        shown = repr(name)[1:-1] if isinstance(name, str) else repr(name)
        return CheckpointError(
            f"tensor {shown[:200]}: {what}", where=str(path), expected=expected, found=found
        )

    if not isinstance(name, str):
        raise refuse("not a name", "a string", type(name).__name__)
    plain = isinstance(value, Tensor) and value.layout is torch.strided
    offset = getattr(value.untyped_storage(), "_checkpoint_offset", None) if plain else None
    if not isinstance(offset, int):
        raise refuse("not a plain tensor", found=type(value).__name__)
    if value.dtype not in DTYPES.values():
        raise refuse("unknown dtype", found=str(value.dtype).removeprefix("torch."))
    if not value.is_contiguous():
        raise refuse("not stored row by row", found=f"strides {list(value.stride())}")
    start = value.storage_offset() * value.dtype.itemsize
    stop = start + value.numel() * value.dtype.itemsize
    if offset not in records or stop > records[offset]:
        raise refuse("larger than its record", f"{stop} B", f"{records.get(offset, 0)} B")
    return Entry(path, value.dtype, tuple(value.shape), offset + start, offset + stop)


def _unreadable(path: Path, start: bytes, error: Exception) -> QmixError:
    for magic, kind, remedy in KNOWN_STARTS:
        if start.startswith(magic) and not magic.startswith((_ZIP, _PICKLE)):
            return CheckpointError(
                "not a file of torch.save", where=str(path), found=kind, remedy=remedy
            )
    if start.startswith(_PICKLE):
        return UnsupportedError(
            "a bare pickle, as PyTorch wrote before 1.6",
            where=str(path),
            expected="a zip archive of torch.save",
            remedy="If you trust its source, load it and torch.save it again.",
        )
    if not start.startswith(_ZIP):
        found = ascii(start[:8]) if start else "an empty file"
        return CheckpointError(
            "not a file of torch.save", where=str(path), found=found, remedy=_DOWNLOAD_AGAIN
        )
    if isinstance(error, zipfile.BadZipFile):
        what, found = "the archive ends early or is damaged", str(error)
    else:
        what = "a damaged pickle, or one that holds more than tensors"
        # PyTorch's own message goes on to offer unsafe loading.
        call = re.search(r"GLOBAL (\S+)", str(error))
        found = f"a call of {call[1]}" if call else type(error).__name__
    return CheckpointError(what, where=str(path), found=found[:120], remedy=_DOWNLOAD_AGAIN)
