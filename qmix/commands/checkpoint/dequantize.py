"""From an FP8 checkpoint or a GGUF file to the hub's layout in 16 bits; a value is rounded once.

Holds one tensor at a time. Knows FP8 and GGUF only by formats.checkpoint.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import qmix
from qmix.commands.checkpoint import Progress
from qmix.errors import UnsupportedError
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files import manifest, output_dir
from qmix.formats.files.companions import copy_companions
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.files.shard_writer import write_shards
from qmix.formats.files.shards import check_finite
from qmix.formats.names import ModelTensor
from qmix.formats.tensor_spec import TensorSpec
from qmix.hub.local import shown_name
from qmix.planning import budget
from qmix.planning.plan import check_memory


@dataclass(frozen=True, kw_only=True)
class Dequantization:
    """The outcome.

    Attributes:
        weights: how many were in fewer than 16 bits.
        source: what they were in: FP8 or GGUF.
        bytes_out: of the whole directory.
        dtype: of the new weights; those that were in 16 or 32 bits stay as they are.
    """

    weights: int
    source: str
    bytes_out: int
    seconds: float
    dtype: str


def dequantize_checkpoint(
    source: Path,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Dequantization:
    """Write the weights of FP8 or GGUF in the dtype of the config, with the hub's names.

    Args:
        source: directory or GGUF file.
        out: directory; it appears complete or not at all.
        shard_bytes: upper limit of an output file.
        force: replace an existing checkpoint at `out`.
        progress: called with the name of the next tensor, the bytes done and all bytes.

    Raises:
        UsageError: a path is unsuitable.
        CheckpointError: the source is damaged, or holds NaN.
        UnsupportedError: a checkpoint of the hub's without a weight in FP8, or with one in fewer
            bits.
        ResourceError: too little disk space or memory.
    """
    begun = time.perf_counter()
    output_dir.check_paths(source, out, force=force)
    checkpoint = open_checkpoint(source)
    weights = _check_convertible(checkpoint)
    kind = "GGUF" if checkpoint.metadata.container == "GGUF" else "FP8"
    specs = [
        TensorSpec(tensor.name, checkpoint.dense_dtype(tensor), tensor.shape)
        for tensor in checkpoint.tensors
    ]
    total = sum(spec.nbytes for spec in specs)
    output_dir.check_space(out, total)
    check_memory(budget.for_rewriting(max(map(checkpoint.dense_bytes, checkpoint.tensors))))
    with output_dir.partial(out, force=force) as folder:
        tensors = _dequantized(checkpoint, specs, progress)
        write_shards(folder, [(spec,) for spec in specs], tensors, shard_bytes)
        progress("checksums", total, total)
        checkpoint.config.replace(quantization_config=None).save_pretrained(folder)
        copy_companions(source, folder)
        facts = {"method": f"convert from {kind}", "source": shown_name(source)}
        manifest.write_manifest(folder, {"qmix": qmix.__version__, **facts})
        bytes_out = output_dir.total_bytes(folder)
    return Dequantization(
        weights=weights,
        source=kind,
        bytes_out=bytes_out,
        seconds=time.perf_counter() - begun,
        dtype=checkpoint.metadata.dtype,
    )


def _check_convertible(checkpoint: Checkpoint) -> int:
    """The number of weights that will be dequantized; see dequantize_checkpoint for the errors."""
    weights = sum(checkpoint.packing(tensor) is not None for tensor in checkpoint.tensors)
    if checkpoint.metadata.container == "GGUF":
        return weights
    where = str(checkpoint.shards.directory)
    quantized = [tensor.name for tensor in checkpoint.tensors if checkpoint.packed(tensor)]
    if quantized:
        raise UnsupportedError(
            "a quantized checkpoint is not converted",
            where=where,
            expected="weights in FP8",
            found=f"{quantized[0]} in fewer bits",
            remedy="Use the original checkpoint.",
        )
    if not weights:
        raise UnsupportedError(
            "nothing to convert",
            where=where,
            expected="Mistral's own files, weights in FP8, or GGUF",
            found="16- or 32-bit weights in the hub's layout",
            remedy="Use the checkpoint as it is.",
        )
    return weights


def _dequantized(
    checkpoint: Checkpoint, specs: Sequence[TensorSpec], progress: Progress
) -> Iterator[dict[str, Tensor]]:
    done, total = 0, sum(spec.nbytes for spec in specs)
    for spec, tensor in zip(specs, checkpoint.tensors, strict=True):
        progress(tensor.name, done, total)
        done += spec.nbytes
        yield {tensor.name: _rounded(checkpoint, tensor, spec.dtype)}


def _rounded(checkpoint: Checkpoint, tensor: ModelTensor, dtype: torch.dtype) -> Tensor:
    data = checkpoint.dense(tensor).to(dtype)
    check_finite(tensor.name, checkpoint.file_of(tensor), data)
    return data
