"""What a checkpoint directory holds, from its headers alone: layouts, schemes, bits and bytes.

Reads config.json and the safetensors headers, no weights. Knows no device and no module.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qmix.compatibility import Contents, Verdict, verdicts
from qmix.config import MixtralConfig
from qmix.formats import Checkpoint, awq, compressed, gptq, gptq_config, open_checkpoint
from qmix.formats.checkpoint import Packed, settings_of
from qmix.formats.names import Kind, ModelTensor
from qmix.int4 import Int4
from qmix.int8 import Int8
from qmix.integers import GROUP_SIZES
from qmix.scheme import DENSE, Scheme
from qmix.weights import NF4_BLOCK_SIZES


@dataclass(frozen=True, kw_only=True)
class Part:
    """All weights of one kind that are stored alike.

    Attributes:
        layout: whose tensors they are; "safetensors" if they are stored as they are.
        scheme: how; a dtype if they are stored as they are.
    """

    kind: Kind
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
    checkpoint = open_checkpoint(directory)
    grouped: dict[tuple[Kind, str, str], list[tuple[int, int]]] = {}
    for tensor in checkpoint.tensors:
        packed = checkpoint.packing(tensor)
        members = packed.members if packed else (tensor.name,)
        stored = sum(checkpoint.entry(name).nbytes for name in members)
        layout: str = packed.layout if packed else "safetensors"
        if packed:
            scheme = str(scheme_of(checkpoint, tensor, packed))
        else:
            scheme = str(checkpoint.entry(tensor.name).dtype).removeprefix("torch.")
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
    files = {path.name: path.stat().st_size for path in checkpoint.shards.files}
    return Inventory(
        directory=checkpoint.shards.directory,
        config=checkpoint.config,
        files=files,
        parts=parts,
        readers=verdicts(contents_of(checkpoint)),
    )


def contents_of(checkpoint: Checkpoint) -> Contents:
    """What decides which programs load a checkpoint."""
    packings = {tensor: checkpoint.packing(tensor) for tensor in checkpoint.tensors}
    schemes = {
        tensor.prefix: scheme_of(checkpoint, tensor, packed) if packed else DENSE
        for tensor, packed in packings.items()
        if tensor.linear
    }
    classic = all(
        checkpoint.spelled[name] == name
        for tensor, packed in packings.items()
        if tensor.kind == "expert"
        for name in (packed.members if packed else (tensor.name,))
    )
    layouts = frozenset(packed.layout for packed in packings.values() if packed)
    beside = {"GPTQ": gptq_config.FILE, "AWQ": awq.FILE}
    files = [beside[layout] for layout in layouts if layout in beside]
    return Contents(
        schemes=schemes,
        layouts=layouts,
        dialect="classic" if classic else "gptqmodel",
        settings=settings_of(checkpoint, files[0] if len(files) == 1 else None)[0],
    )


def scheme_of(checkpoint: Checkpoint, tensor: ModelTensor, packed: Packed) -> Scheme:
    """The scheme of a packed weight, as far as shapes and settings tell.

    An AWQ weight counts as asymmetric although all its zeros may be 8.
    """
    shapes = {name.rpartition(".")[2]: checkpoint.entry(name).shape for name in packed.members}
    if packed.layout == "bitsandbytes":
        blocks, count = math.prod(shapes.get("absmax", (0,))), math.prod(tensor.shape)
        # Sizes that give the same number of blocks differ in the last block only.
        fitting = [size for size in NF4_BLOCK_SIZES if -(-count // size) == blocks]
        block = 64 if 64 in fitting or not fitting else fitting[0]
        kind: Any = "fp4" if "bitsandbytes__fp4" in shapes else "nf4"
        return Scheme(kind=kind, block_size=block, double_quant="nested_absmax" in shapes)
    columns = tensor.shape[1]
    bits: int | None = Int4.bits
    if packed.layout == "compressed-tensors":
        groups, symmetric = shapes["weight_scale"][-1], "weight_zero_point" not in shapes
        bits = compressed.bits_of(shapes["weight_packed"][-1], columns)
    else:
        groups = shapes["scales"][0]
        symmetric = packed.layout == "GPTQ" and checkpoint.declared(packed).symmetric
        if packed.layout == "GPTQ":
            bits = gptq.bits_of(shapes["qweight"][0], columns)
    size = columns // max(groups, 1)
    return Scheme(
        kind="int8" if bits == Int8.bits else "int4",
        group_size=size if size in GROUP_SIZES else -1,
        symmetric=symmetric,
    )
