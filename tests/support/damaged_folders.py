"""Seeded damage to one file of a checkpoint's folder, and what other libraries read there.

Knows nothing of how qmix reads.
"""

import io
import json
import pickle
import shutil
import zipfile

import torch
from safetensors import safe_open

from tests.support.mutation import VALUES, generator, mutated_bytes, mutated_document, mutated_text

_LENGTH_BYTES = 8  # of a safetensors file: the header's length, little-endian
_PICKLES = (".bin", ".pth", ".pt")


def damage(folder, rng):
    """Damage one file, drawn from the folder; returns its name and what was done."""
    path = rng.choice(sorted(folder.iterdir()))
    ways = {".safetensors": _OF_TENSORS, ".json": _OF_JSON}.get(path.suffix, _OF_BYTES)
    if path.suffix in _PICKLES:
        ways = _OF_PICKLES
    way = rng.choice(ways)
    way(path, rng)
    return path.name, way.__name__.strip("_")


def copies(folder, place, seed, count):
    """`count` damaged copies under `place`, one after another; each goes when the next comes."""
    for number in range(count):
        copy = shutil.copytree(folder, place / str(number))
        damage(copy, generator(seed, number))
        yield copy
        shutil.rmtree(copy)


def _bytes(path, rng):
    path.write_bytes(mutated_bytes(path.read_bytes(), rng))


def _data(path, rng):
    """One bit of the last nine tenths, which no header's check can see."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data) // 10, len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _cut(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def _longer(path, rng):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice((1, 8, 1000))))


def _gone(path, rng):
    path.unlink()


def _another(path, rng):
    """The content of another file of the folder."""
    other = rng.choice(sorted(path.parent.iterdir()))
    if other != path:
        shutil.copy(other, path)


def _twice(path, rng):
    """A copy beside it, of another name."""
    shutil.copy(path, path.with_name("model-copy" + path.suffix))


def _renamed(path, rng):
    path.rename(path.with_name(rng.choice(("model.safetensors", "other.json", "x" + path.name))))


def _document(path, rng):
    path.write_bytes(mutated_text(json.loads(path.read_bytes()), rng))


def _header(path, rng):
    header, data = _parts(path)
    _write(path, json.dumps(mutated_document(header, rng)).encode(), data)


def _header_bytes(path, rng):
    header, data = _parts(path)
    _write(path, mutated_bytes(json.dumps(header).encode(), rng), data)


def _header_entry(path, rng):
    """One field of one tensor, by a value that is likely or by that of another tensor."""
    header, data = _parts(path)
    entry = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
    other = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
    field = rng.choice(("dtype", "shape", "data_offsets"))
    types = ("BF16", "F16", "I32", "U8", "F32", "I64", "F8_E4M3", "bf16")
    entry[field] = rng.choice((other[field], rng.choice(types), rng.choice(VALUES)))
    _write(path, json.dumps(header).encode(), data)


def _names(path, rng):
    """Two tensors change names."""
    header, data = _parts(path)
    one, other = (rng.choice(sorted(header.keys() - {"__metadata__"})) for _ in range(2))
    header[one], header[other] = header[other], header[one]
    _write(path, json.dumps(header).encode(), data)


def _parts(path):
    data = path.read_bytes()
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    return json.loads(data[_LENGTH_BYTES:start]), data[start:]


def _write(path, header, data):
    path.write_bytes(len(header).to_bytes(_LENGTH_BYTES, "little") + header + data)


def _record(path, rng):
    """Another pickle in an archive that is whole."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(records)) if rng.random() < 0.2 else _pickled(records)
    records[name] = mutated_bytes(records[name], rng)
    _write_archive(path, records)


def _code(path, rng):
    """A pickle that would make a file beside this one."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    mark = path.parent.parent / "ran"
    records[_pickled(records)] = pickle.dumps({"a": _Code(mark)}, protocol=2)
    _write_archive(path, records)


class _Code:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def _pickled(records):
    return next(name for name in records if name.endswith("data.pkl"))


def _write_archive(path, records):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


_OF_BYTES = (_bytes, _bytes, _bytes, _cut, _longer, _gone, _another)
_OF_JSON = (_document,) * 12 + _OF_BYTES
_OF_TENSORS = (
    *(_header, _header, _header_bytes, _header_entry, _header_entry, _header_entry, _names, _names),
    *(_data, _data, _data, _bytes, _cut, _longer, _gone, _another, _twice, _renamed),
)
_OF_PICKLES = (_record, _record, _record, _code, _data, _data, *_OF_BYTES)


def tensors(folder):
    """Every tensor of a folder by its name, as the formats' own libraries read it."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        elif path.suffix in _PICKLES:
            data = io.BytesIO(path.read_bytes())
            found |= torch.load(data, map_location="cpu", weights_only=True)
    return found


def same(one, other):
    """Whether two sets of tensors are equal to the bit."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and torch.equal(_bits(value), _bits(other[name]))
        for name, value in one.items()
    )


def _bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)
