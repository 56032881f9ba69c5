"""The quantizer's road: source shards in, tensor by tensor, 4-bit shards out.

For the methods that look at weights alone; holds one tensor at a time. What needs calibration is in
`calibrated`. Knows the algorithms and formats by their functions only.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qmix
from qmix import strict_json
from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files import output_dir, shards
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.files.shards import Planned
from qmix.formats.layouts import gptq_config, writer
from qmix.formats.names import ModelTensor
from qmix.planning import budget
from qmix.planning.plan import check_memory
from qmix.quantize.report import Report, TensorResult
from qmix.quantize.rounding import nf4, rtn
from qmix.weights.dense import Dense, Weight
from qmix.weights.nf4 import NF4
from qmix.weights.scheme import Recipe, Scheme

# Carried along unchanged where the source has them.
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
SCALES = (
    torch.float16
)  # of integer weights: what GPTQ files hold, and three bits finer than bfloat16
_COMPANION_BYTES = 64 << 20
_ERROR_ROWS = 1024  # rows compared at a time: bounds the float32 copies at 117 MB for w2


@dataclass(frozen=True)
class Progress:
    """How far a run is: bytes of the source, and the tensor it is at."""

    done_bytes: int
    total_bytes: int
    tensor: str


@dataclass(frozen=True)
class Item:
    """One tensor of the plan and what it will become.

    Attributes:
        dtype: of the 16-bit weight that it is, or was.
    """

    tensor: ModelTensor
    scheme: Scheme
    dtype: torch.dtype
    planned: tuple[Planned, ...]


def run(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    method: str,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Quantize a 16- or 32-bit checkpoint directory into a new one, each weight to its nearest codes.

    Args:
        source, out: directories; `out` appears complete or not at all.
        recipe: which tensor gets which scheme.
        shard_bytes: upper bound of an output file.
        force: replace an existing checkpoint at `out`.

    Raises:
        UsageError: the paths are unfit. CheckpointError: the source is damaged or holds NaN.
        UnsupportedError: the source is quantized already, or a scheme does not fit a weight.
        ResourceError: the disk or the memory is too small.
    """
    begun = time.perf_counter()
    output_dir.check_paths(source, out, force=force)
    checkpoint = open_checkpoint(source)
    items = plan(checkpoint, recipe)
    bytes_in = sum(checkpoint.entry(item.tensor.name).nbytes for item in items)
    groups = [item.planned for item in items]
    output_dir.check_space(out, sum(one.nbytes for group in groups for one in group))
    largest = max(checkpoint.entry(item.tensor.name).nbytes for item in items)
    check_memory(budget.for_rewriting(largest))
    results: list[TensorResult] = []

    def converted() -> Iterator[dict[str, Tensor]]:
        done = 0
        for item in items:
            progress(Progress(done, bytes_in, item.tensor.name))
            tensors, result = _convert(checkpoint, item)
            results.append(result)
            done += checkpoint.entry(item.tensor.name).nbytes
            yield tensors

    with output_dir.partial(out, force=force) as folder:
        shards.write_shards(folder, groups, converted(), shard_bytes)
        progress(Progress(bytes_in, bytes_in, "checksums"))
        report = Report(
            method=method,
            tensors=tuple(results),
            bytes_in=bytes_in,
            seconds=time.perf_counter() - begun,
        )
        finish(folder, checkpoint, items, report, {})
    return report


def plan(checkpoint: Checkpoint, recipe: Recipe) -> list[Item]:
    """What becomes of every tensor, in the model's order.

    Raises:
        UnsupportedError: the source is quantized already, or a scheme does not fit a weight's shape.
    """
    items = []
    for tensor in checkpoint.tensors:
        if tensor.linear and checkpoint.packed(tensor):
            raise UnsupportedError(
                "the source is quantized already",
                where=str(checkpoint.shards.directory),
                expected="16- or 32-bit weights",
                found=f"{tensor.name} in 4 bits",
                remedy="Quantize the original checkpoint.",
            )
        scheme = recipe.scheme_of(tensor.name)
        dtype = checkpoint.entry(tensor.name).dtype
        if dtype == torch.float32:
            dtype = torch.bfloat16  # 16-bit is what a 4-bit model computes in
        items.append(Item(tensor, scheme, dtype, planned(tensor, scheme, dtype)))
    writer.layout_of({item.tensor.prefix: item.scheme for item in items})
    return items


def planned(tensor: ModelTensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Planned, ...]:
    """What will be written of one weight; `dtype` is that of the 16-bit weight."""
    stored = SCALES if scheme.integer else dtype
    specs = writer.packed_specs(tensor.prefix, tensor.shape, scheme, stored)
    return tuple(Planned(name, *spec) for name, spec in specs.items())


def finish(
    folder: Path,
    checkpoint: Checkpoint,
    items: Sequence[Item],
    report: Report,
    facts: Mapping[str, Any],
) -> None:
    """Write all of a checkpoint but its shards: companions, settings, report and manifest.

    Args:
        facts: for the manifest, besides what every quantization has.
    """
    _write_companions(checkpoint, folder)
    dtype = items[0].dtype
    schemes = {item.tensor.prefix: item.scheme for item in items if item.tensor.linear}
    settings = writer.quantization_config(schemes, dtype)
    config = checkpoint.config.replace(
        dtype=str(dtype).removeprefix("torch."), quantization_config=settings
    )
    config.save_pretrained(folder)
    if settings is not None and writer.layout_of(schemes) == "GPTQ":
        strict_json.write(folder / gptq_config.FILE, settings)  # where older readers look
    strict_json.write(folder / output_dir.REPORT, report.to_dict())
    output_dir.write_manifest(
        folder,
        {
            "qmix": qmix.__version__,
            "method": report.method,
            "source": checkpoint.shards.directory.resolve().name,
            "schemes": sorted({str(item.scheme) for item in items}),
            **facts,
        },
    )


def packed(weight: Weight, item: Item) -> dict[str, Tensor]:
    """What the file holds of a weight, by tensor name, in the plan's dtypes."""
    if isinstance(weight, Dense):
        weight = replace(weight, data=weight.data.to(item.dtype))
    elif isinstance(weight, NF4):
        weight = replace(weight, out_dtype=item.dtype)
    return writer.pack(weight, item.tensor.prefix)


def errors(data: Tensor, weight: Weight) -> tuple[float, float]:
    """Sums of (W - Q(W))^2 and of W^2; both 0 if nothing was rounded."""
    if isinstance(weight, Dense):
        return 0.0, 0.0
    error = norm = 0.0
    for start in range(0, data.shape[0], _ERROR_ROWS):
        stop = min(start + _ERROR_ROWS, data.shape[0])
        exact = data[start:stop].float()
        norm += float(torch.linalg.vector_norm(exact)) ** 2
        exact -= weight.rows(start, stop, torch.float32)
        error += float(torch.linalg.vector_norm(exact)) ** 2
    return error, norm


def read(checkpoint: Checkpoint, tensor: ModelTensor) -> Tensor:
    """A weight of the source.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    data = checkpoint.read(tensor.name)
    if not bool(torch.isfinite(data).all()):
        raise CheckpointError(
            f"tensor {tensor.name} holds NaN or infinity",
            where=str(checkpoint.entry(tensor.name).file),
            remedy="The checkpoint is damaged; download it again.",
        )
    return data


def _convert(checkpoint: Checkpoint, item: Item) -> tuple[dict[str, Tensor], TensorResult]:
    begun = time.perf_counter()
    where = f"{checkpoint.entry(item.tensor.name).file}: {item.tensor.name}"
    weight: Weight
    if item.scheme.kind == "nf4":  # the encoder finds NaN by itself, faster
        data = checkpoint.read(item.tensor.name)
        weight = nf4.quantize(data, item.scheme, where=where)
    else:
        data = read(checkpoint, item.tensor)
        weight = (
            rtn.quantize(data, item.scheme, where=where) if item.scheme.integer else Dense(data)
        )
    tensors = packed(weight, item)
    squared_error, squared_norm = errors(data, weight)
    return tensors, TensorResult(
        name=item.tensor.name,
        kind=item.tensor.kind,
        scheme=item.scheme,
        parameters=data.numel(),
        bytes_out=sum(tensor.nbytes for tensor in tensors.values()),
        squared_error=squared_error,
        squared_norm=squared_norm,
        seconds=time.perf_counter() - begun,
    )


def _write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    for name in COMPANIONS:
        path = checkpoint.shards.directory / name
        if not path.is_file():
            continue
        if path.stat().st_size > _COMPANION_BYTES:
            raise CheckpointError(
                "file too large",
                where=str(path),
                expected=f"at most {_COMPANION_BYTES} B",
                found=path.stat().st_size,
            )
        (folder / name).write_bytes(path.read_bytes())
