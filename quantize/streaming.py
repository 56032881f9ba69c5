"""Quantizing by the weights alone: tensor after tensor from the source's shards into 4-bit shards.

Holds one tensor at a time. Methods that need calibration text are in `calibrated`. Knows the
algorithms and formats by their functions only.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files import output_dir, shard_writer
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.planning import budget
from qmix.planning.plan import check_memory
from qmix.quantize.adapter import bytes_in_memory, check_adapter, with_adapter
from qmix.quantize.output_checkpoint import (
    OutputTensor,
    complete,
    file_tensors,
    plan_outputs,
    read_finite,
    squared_sums,
)
from qmix.quantize.report import QuantizeReport, TensorResult
from qmix.quantize.rounding import rtn
from qmix.quantize.shard_supply import ShardSupply, Visit, in_few_files, most_files
from qmix.quantize.source import Source, open_source
from qmix.weights import nf4
from qmix.weights.dense import Dense, Weight
from qmix.weights.scheme import Recipe
from qmix.work_meter import Progress


def quantize_streaming(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    method: str,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
    supply: ShardSupply | None = None,
    adapter: Path | None = None,
    requantize: bool = False,
    documents: bool = False,
) -> QuantizeReport:
    """Quantize a 16- or 32-bit checkpoint directory into a new one by rounding each weight.

    Args:
        source, out: directories; `out` appears complete or not at all.
        recipe: which tensor gets which scheme.
        method: the name that report and manifest state.
        shard_bytes: upper limit of an output file.
        force: replace an existing checkpoint at `out`.
        progress: called before every tensor.
        supply: brings each file of `source`, which holds their headers only, before it is read.
        adapter: the folder of a LoRA that is merged into each weight before it is rounded.
        requantize: take a quantized source too, and round what it decodes to.
        documents: write a model card and a page with pictures too.

    Raises:
        UsageError: a path is unsuitable.
        CheckpointError: the source is damaged, holds NaN, or changes meanwhile.
        UnsupportedError: the source is quantized already, or a scheme does not fit a weight.
        ResourceError: too little disk space or memory.
    """
    begun = time.perf_counter()
    output_dir.check_paths(source, out, force=force)
    checkpoint = open_source(source) if supply is None else open_checkpoint(source)
    if adapter is not None:
        checkpoint = with_adapter(checkpoint, adapter)
    outputs = plan_outputs(checkpoint, recipe, requantize=requantize)
    visits = [*map(Visit, outputs)] if supply is None else in_few_files(checkpoint, outputs)
    outputs = [visit.output for visit in visits]
    bytes_in = sum(checkpoint.stored_bytes(output.tensor) for output in outputs)
    _check_room(checkpoint, visits, supply, out)
    results: list[TensorResult] = []
    quantized = _quantized(checkpoint, visits, supply, results, progress)
    with output_dir.partial(out, force=force) as folder:
        shard_writer.write_shards(folder, [o.planned for o in outputs], quantized, shard_bytes)
        progress("checksums", bytes_in, bytes_in)
        report = QuantizeReport(
            method=method,
            tensors=tuple(results),
            bytes_in=bytes_in,
            seconds=time.perf_counter() - begun,
        )
        complete(folder, checkpoint, outputs, report, {}, documents=documents)
        if isinstance(checkpoint, Source):
            checkpoint.check_unchanged()
        check_adapter(checkpoint)
    return report


def _check_room(
    checkpoint: Checkpoint, visits: Sequence[Visit], supply: ShardSupply | None, out: Path
) -> None:
    """Raise ResourceError unless the disk and the memory hold what a run takes of them."""
    bytes_out = sum(visit.output.nbytes for visit in visits)
    output_dir.check_space(out, bytes_out)
    if supply is not None:
        supply.check_space(most_files(visits), out, bytes_out)
    largest = max(bytes_in_memory(checkpoint, visit.output.tensor) for visit in visits)
    check_memory(budget.for_rewriting(largest))


def _quantized(
    checkpoint: Checkpoint,
    visits: Sequence[Visit],
    supply: ShardSupply | None,
    results: list[TensorResult],
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:
    """The tensors of the files, weight by weight; what each cost goes into `results`."""
    sizes = [checkpoint.stored_bytes(visit.output.tensor) for visit in visits]
    done = 0
    for visit, nbytes in zip(visits, sizes, strict=True):
        for name in visit.opened:
            assert supply is not None
            progress(f"downloading {name}", done, sum(sizes))
            supply.put(name)
        progress(visit.output.tensor.name, done, sum(sizes))
        tensors, result = _quantize_tensor(checkpoint, visit.output)
        results.append(result)
        for name in visit.closed:
            assert supply is not None
            supply.take_out(name)
        done += nbytes
        yield tensors


def _quantize_tensor(
    checkpoint: Checkpoint, output: OutputTensor
) -> tuple[dict[str, Tensor], TensorResult]:
    begun = time.perf_counter()
    name, scheme = output.tensor.name, output.scheme
    where = f"{checkpoint.file_of(output.tensor)}: {name}"
    weight: Weight
    if scheme.kind == "dense":
        data = read_finite(checkpoint, output.tensor)
        weight = Dense(data)
    else:  # the encoders find NaN themselves
        data = checkpoint.dense(output.tensor)
        encode = rtn.quantize if scheme.integer else nf4.quantize
        weight = encode(data, scheme, where=where)
    tensors = file_tensors(weight, output)
    squared_error, squared_norm = squared_sums(data, weight)
    return tensors, TensorResult(
        name=name,
        kind=output.tensor.kind,
        scheme=scheme,
        parameters=data.numel(),
        bytes_out=sum(tensor.nbytes for tensor in tensors.values()),
        squared_error=squared_error,
        squared_norm=squared_norm,
        seconds=time.perf_counter() - begun,
    )
