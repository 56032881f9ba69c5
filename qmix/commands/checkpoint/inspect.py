"""What a checkpoint directory holds: layouts, schemes, bits and bytes.

Reads config.json and the safetensors headers, and no weights. Knows no device and no module.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qmix.config import MixtralConfig
from qmix.formats.compatibility import ReaderSupport, reader_support, support_of
from qmix.formats.files.safetensors_header import DTYPES
from qmix.formats.layouts import gguf_schemes
from qmix.formats.layouts.packed_tensors import PackedTensors
from qmix.formats.makers import made_by
from qmix.formats.metadata import read_metadata
from qmix.formats.names import TensorKind
from qmix.formats.readers.programs import Program
from qmix.formats.readers.storage import StorageSummary, storage_summary
from qmix.planning.footprint import on_host
from qmix.planning.stored_model import StoredModel
from qmix.weights.scheme import Scheme

NVFP4_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class WeightGroup:
    """All weights of one kind that are stored alike.

    Attributes:
        quantized: whether they are stored in fewer than 16 bits.
        layout: of their tensors; the format of the files if they are dense.
        scheme: theirs; a dtype if they are dense.
        weights: how many.
        parameters: elements of all of them.
    """

    kind: TensorKind
    quantized: bool
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
        maker: the tool that made it, in words; "" if nothing is quantized and none is named.
        groups: in the model's order.
        loaded_bytes: of all weights in host memory.
        readers: which programs load it.
        storage: what that is decided from.
    """

    directory: Path
    config: MixtralConfig
    files: dict[str, int]
    maker: str
    groups: tuple[WeightGroup, ...]
    loaded_bytes: int
    readers: tuple[ReaderSupport, ...]
    storage: StorageSummary

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

    def support_of(self, program: Program) -> ReaderSupport:
        """What one program makes of it."""
        return support_of(program, self.storage)

    @property
    def not_quantized(self) -> tuple[str, ...]:
        """What a quantized checkpoint leaves in 16 or 32 bits besides norms, by kind.

        Of a kind that is quantized in part, the number of weights that are not stands before it.
        """
        quantized = {group.kind for group in self.groups if group.quantized}
        if not quantized:
            return ()
        return tuple(
            f"{group.weights} of {group.kind}" if group.kind in quantized else group.kind
            for group in self.groups
            if not group.quantized and group.kind != "norm"
        )

    def to_dict(self) -> dict[str, Any]:
        """The inventory as a JSON document."""
        return {
            "directory": str(self.directory),
            "parameters": self.parameters,
            "stored_bytes": self.stored_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "maker": self.maker,
            "loaded_bytes": self.loaded_bytes,
            "not_quantized": list(self.not_quantized),
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
    # (kind, quantized, layout, scheme) -> parameters and stored bytes of each weight
    sizes: dict[tuple[TensorKind, bool, str, str], list[tuple[int, int]]] = {}
    for tensor in metadata.tensors:
        packing = metadata.packing(tensor)
        names = packing.names if packing else (tensor.name,)
        stored_bytes = sum(metadata.tensor_info(name).nbytes for name in names)
        layout: str = packing.layout if packing else metadata.container
        if packing:
            scheme = _scheme_name(packing, metadata.scheme_of(packing))
        else:
            scheme = DTYPES[metadata.tensor_info(tensor.name).dtype][0]
        size = (math.prod(tensor.shape), stored_bytes)
        group = (tensor.kind, packing is not None, layout, scheme)
        sizes.setdefault(group, []).append(size)
    groups = tuple(
        WeightGroup(
            kind=kind,
            quantized=quantized,
            layout=layout,
            scheme=scheme,
            weights=len(weights),
            parameters=sum(parameters for parameters, _ in weights),
            stored_bytes=sum(stored_bytes for _, stored_bytes in weights),
        )
        for (kind, quantized, layout, scheme), weights in sizes.items()
    )
    storage = storage_summary(metadata)
    paths = sorted({info.file for info in metadata.tensor_infos.values()})
    return Inventory(
        directory=metadata.directory,
        config=metadata.config,
        files={path.name: path.stat().st_size for path in paths},
        maker=made_by(metadata),
        groups=groups,
        loaded_bytes=on_host(StoredModel.of(metadata)).total,
        readers=reader_support(storage),
        storage=storage,
    )


def _scheme_name(packing: PackedTensors, scheme: Scheme) -> str:
    """The scheme by the name that people know it by, if it has one."""
    if packing.dense:
        return _fp8_scheme(packing)
    if packing.layout == "GGUF":
        return f"{gguf_schemes.type_of(packing.infos)}: {scheme}"
    if scheme.kind == "e2m1":
        return f"{'NVFP4' if scheme.block_size == NVFP4_BLOCK else 'MXFP4'} b{scheme.block_size}"
    return str(scheme)


def _fp8_scheme(packing: PackedTensors) -> str:
    """For what an FP8 weight has a scale."""
    scales = math.prod(packing.scale_shape)
    if scales == 1:
        return "fp8 per tensor"
    return "fp8 per output" if scales == packing.matrix[0] else "fp8 in blocks"
