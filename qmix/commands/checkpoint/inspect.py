"""What a checkpoint directory holds: layouts, schemes, bits and bytes.

Reads config.json and the safetensors headers, and no weights. Knows no device and no module.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qmix.config import MixtralConfig
from qmix.formats.compatibility import ReaderSupport, reader_support, storage_summary
from qmix.formats.files.safetensors_header import DTYPES
from qmix.formats.layouts.headers import PackedTensors
from qmix.formats.metadata import read_metadata
from qmix.formats.names import TensorKind


@dataclass(frozen=True, kw_only=True)
class WeightGroup:
    """All weights of one kind that are stored alike.

    Attributes:
        layout: of their tensors; the format of the files if they are dense.
        scheme: theirs; a dtype if they are dense.
        weights: how many.
        parameters: elements of all of them.
    """

    kind: TensorKind
    layout: str
    scheme: str
    weights: int
    parameters: int
    stored_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / self.parameters


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """A checkpoint at a glance.

    Attributes:
        files: file name -> size in bytes.
        groups: in the model's order.
        readers: which programs load it.
    """

    directory: Path
    config: MixtralConfig
    files: dict[str, int]
    groups: tuple[WeightGroup, ...]
    readers: tuple[ReaderSupport, ...]

    @property
    def parameters(self) -> int:
        return sum(group.parameters for group in self.groups)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the model's tensors, without headers and ignored buffers."""
        return sum(group.stored_bytes for group in self.groups)

    @property
    def bits_per_weight(self) -> float:
        """Over all weights, dense ones included."""
        return 8 * self.stored_bytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """The inventory as a JSON document."""
        return {
            "directory": str(self.directory),
            "parameters": self.parameters,
            "stored_bytes": self.stored_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "files": dict(self.files),
            "parts": [
                {**asdict(group), "bits_per_weight": round(group.bits_per_weight, 4)}
                for group in self.groups
            ],
            "readers": [asdict(reader) for reader in self.readers],
        }


def inspect(directory: str | Path) -> Inventory:
    """Take stock of a checkpoint directory.

    Raises:
        CheckpointError: its tensors are not exactly those of the model.
        UnsupportedError: its layout is not read.
    """
    metadata = read_metadata(directory)
    # (kind, layout, scheme) -> parameters and stored bytes of each weight
    sizes: dict[tuple[TensorKind, str, str], list[tuple[int, int]]] = {}
    for tensor in metadata.tensors:
        packing = metadata.packing(tensor)
        names = packing.names if packing else (tensor.name,)
        stored_bytes = sum(metadata.tensor_info(name).nbytes for name in names)
        layout: str = packing.layout if packing else metadata.container
        if packing and packing.dense:
            scheme = _fp8_scheme(packing)
        elif packing:
            scheme = str(metadata.scheme_of(packing))
        else:
            scheme = DTYPES[metadata.tensor_info(tensor.name).dtype][0]
        size = (math.prod(tensor.shape), stored_bytes)
        sizes.setdefault((tensor.kind, layout, scheme), []).append(size)
    groups = tuple(
        WeightGroup(
            kind=kind,
            layout=layout,
            scheme=scheme,
            weights=len(weights),
            parameters=sum(parameters for parameters, _ in weights),
            stored_bytes=sum(stored_bytes for _, stored_bytes in weights),
        )
        for (kind, layout, scheme), weights in sizes.items()
    )
    paths = sorted({info.file for info in metadata.tensor_infos.values()})
    return Inventory(
        directory=metadata.directory,
        config=metadata.config,
        files={path.name: path.stat().st_size for path in paths},
        groups=groups,
        readers=reader_support(storage_summary(metadata)),
    )


def _fp8_scheme(packing: PackedTensors) -> str:
    """For what an FP8 weight has a scale."""
    scales = math.prod(packing.scale_shape)
    if scales == 1:
        return "fp8 per tensor"
    return "fp8 per output" if scales == packing.matrix[0] else "fp8 in blocks"
