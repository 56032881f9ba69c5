"""The quantizer's road: source shards in, tensor by tensor, 4-bit shards out.

Holds one tensor at a time. Knows the algorithms and formats by their functions only.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import qmix
from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats import Checkpoint, bnb, open_checkpoint, shards
from qmix.formats.names import ModelTensor
from qmix.formats.shards import Planned
from qmix.quantize import nf4, output
from qmix.quantize.report import Report, TensorResult
from qmix.scheme import DENSE, Recipe, Scheme
from qmix.weights import Weight

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
_COMPANION_BYTES = 64 << 20
_ERROR_ROWS = 1024  # rows compared at a time: bounds the float32 copies at 117 MB for w2


@dataclass(frozen=True)
class Progress:
    """How far a run is: bytes of the source, and the tensor it is at."""

    done_bytes: int
    total_bytes: int
    tensor: str


@dataclass(frozen=True)
class _Item:
    """One tensor of the plan and what it will become."""

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
    shard_bytes: int = 4_900_000_000,
    force: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Quantize a 16- or 32-bit checkpoint directory into a new one.

    Args:
        source, out: directories; `out` appears complete or not at all.
        recipe: which tensor gets which scheme.
        shard_bytes: upper bound of an output file.
        force: replace an existing checkpoint at `out`.

    Raises:
        UsageError: the paths are unfit. CheckpointError: the source is damaged or holds NaN.
        UnsupportedError: the source is quantized already. ResourceError: the disk is too small.
    """
    begun = time.perf_counter()
    output.check_paths(source, out, force=force)
    checkpoint = open_checkpoint(source)
    items = _plan(checkpoint, recipe)
    bytes_in = sum(checkpoint.entry(item.tensor.name).nbytes for item in items)
    groups = [item.planned for item in items]
    output.check_space(out, sum(one.nbytes for group in groups for one in group))
    results: list[TensorResult] = []

    def converted() -> Iterator[dict[str, Tensor]]:
        done = 0
        for item in items:
            progress(Progress(done, bytes_in, item.tensor.name))
            tensors, result = _convert(checkpoint, item)
            results.append(result)
            done += checkpoint.entry(item.tensor.name).nbytes
            yield tensors

    with output.partial(out, force=force) as folder:
        shards.write_shards(folder, groups, converted(), shard_bytes)
        progress(Progress(bytes_in, bytes_in, "checksums"))
        _write_companions(checkpoint, folder)
        config = checkpoint.config.replace(
            dtype=str(items[0].dtype).removeprefix("torch."),
            quantization_config=_quantization_config(recipe, items),
        )
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        facts = {
            "qmix": qmix.__version__,
            "method": method,
            "source": source.resolve().name,
            "schemes": sorted({str(item.scheme) for item in items}),
        }
        output.write_manifest(folder, facts)
        bytes_out = sum(path.stat().st_size for path in folder.iterdir())
    return Report(
        method=method,
        tensors=tuple(results),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        seconds=time.perf_counter() - begun,
    )


def _plan(checkpoint: Checkpoint, recipe: Recipe) -> list[_Item]:
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
        items.append(_Item(tensor, scheme, dtype, planned(tensor, scheme, dtype)))
    return items


def planned(tensor: ModelTensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Planned, ...]:
    """What will be written of one weight; `dtype` is that of the 16-bit weight."""
    if scheme.kind == "dense":
        return (Planned(tensor.name, dtype, tensor.shape),)
    rows, columns = tensor.shape
    specs = bnb.packed_specs(tensor.prefix, (rows, columns), scheme, dtype)
    return tuple(Planned(name, *spec) for name, spec in specs.items())


def _convert(checkpoint: Checkpoint, item: _Item) -> tuple[dict[str, Tensor], TensorResult]:
    data = checkpoint.read(item.tensor.name)
    where = str(checkpoint.entry(item.tensor.name).file)
    tensors: dict[str, Tensor]
    error = norm = 0.0
    if item.scheme.kind == "dense":
        if not bool(torch.isfinite(data).all()):
            raise _not_finite(item.tensor.name, where)
        tensors = {item.tensor.name: data.to(item.dtype)}
    else:
        weight = replace(
            nf4.quantize(data, item.scheme, where=f"{where}: {item.tensor.name}"),
            out_dtype=item.dtype,
        )
        tensors = bnb.pack(weight, item.tensor.prefix)
        error, norm = _errors(data, weight)
    return tensors, TensorResult(
        name=item.tensor.name,
        kind=item.tensor.kind,
        scheme=item.scheme if item.scheme.kind != "dense" else DENSE,
        parameters=data.numel(),
        bytes_out=sum(tensor.nbytes for tensor in tensors.values()),
        squared_error=error,
        squared_norm=norm,
    )


def _errors(data: Tensor, weight: Weight) -> tuple[float, float]:
    """Sums of (W - Q(W))^2 and of W^2."""
    error = norm = 0.0
    for start in range(0, data.shape[0], _ERROR_ROWS):
        stop = min(start + _ERROR_ROWS, data.shape[0])
        exact = data[start:stop].float()
        norm += float(torch.linalg.vector_norm(exact)) ** 2
        exact -= weight.rows(start, stop, torch.float32)
        error += float(torch.linalg.vector_norm(exact)) ** 2
    return error, norm


def _quantization_config(recipe: Recipe, items: list[_Item]) -> dict[str, object]:
    schemes = {item.scheme for item in items if item.scheme.kind != "dense"}
    attention = any(i.scheme.kind != "dense" for i in items if i.tensor.kind == "attention")
    (scheme,) = schemes
    return bnb.config(scheme, items[0].dtype, attention=attention)


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


def _not_finite(name: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name} holds NaN or infinity",
        where=where,
        remedy="The checkpoint is damaged; download it again.",
    )
