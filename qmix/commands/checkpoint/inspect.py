"""What a checkpoint directory holds, from its headers alone: layouts, schemes, bits and bytes.

Reads config.json and the safetensors headers, no weights. Knows no device and no module.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qmix.config import MixtralConfig
from qmix.formats.compatibility import Verdict, storage_summary, verdicts
from qmix.formats.files.safetensors_header import DTYPES
from qmix.formats.metadata import read_metadata
from qmix.formats.names import TensorKind


@dataclass(frozen=True, kw_only=True)
class Part:
    """All weights of one kind that are stored alike.

    Attributes:
        layout: whose tensors they are; "safetensors" if they are stored as they are.
        scheme: how; a dtype if they are stored as they are.
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
        files: safetensors file name -> size in bytes.
        parts: in walking order.
        readers: which programs load it.
    """

    directory: Path
    config: MixtralConfig
    files: dict[str, int]
    parts: tuple[Part, ...]
    readers: tuple[Verdict, ...]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def stored_bytes(self) -> int:
        """Of the model's tensors, headers and ignored buffers not counted."""
        return sum(part.stored_bytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Over all weights, those that are stored as they are included."""
        return 8 * self.stored_bytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document."""
        return {
            "directory": str(self.directory),
            "parameters": self.parameters,
            "stored_bytes": self.stored_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "files": dict(self.files),
            "parts": [
                {**asdict(part), "bits_per_weight": round(part.bits_per_weight, 4)}
                for part in self.parts
            ],
            "readers": [asdict(verdict) for verdict in self.readers],
        }


def inspect(directory: str | Path) -> Inventory:
    """Take stock of a checkpoint directory.

    Raises:
        CheckpointError: it is not exactly the tensors of the model. UnsupportedError: its layout.
    """
    metadata = read_metadata(directory)
    grouped: dict[tuple[TensorKind, str, str], list[tuple[int, int]]] = {}
    for tensor in metadata.tensors:
        packed = metadata.packing(tensor)
        members = packed.tensor_names if packed else (tensor.name,)
        stored = sum(metadata.tensor_info(name).nbytes for name in members)
        layout: str = packed.layout if packed else "safetensors"
        if packed:
            scheme = str(metadata.scheme_of(tensor, packed))
        else:
            scheme = DTYPES[metadata.tensor_info(tensor.name).dtype][0]
        row = (math.prod(tensor.shape), stored)
        grouped.setdefault((tensor.kind, layout, scheme), []).append(row)
    parts = tuple(
        Part(
            kind=kind,
            layout=layout,
            scheme=scheme,
            weights=len(rows),
            parameters=sum(parameters for parameters, _ in rows),
            stored_bytes=sum(stored for _, stored in rows),
        )
        for (kind, layout, scheme), rows in grouped.items()
    )
    paths = sorted({header.file for header in metadata.tensor_infos.values()})
    return Inventory(
        directory=metadata.directory,
        config=metadata.config,
        files={path.name: path.stat().st_size for path in paths},
        parts=parts,
        readers=verdicts(storage_summary(metadata)),
    )
