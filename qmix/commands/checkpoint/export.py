"""A quantized checkpoint in another program's layout, weight by weight and without rounding.

Holds one weight at a time. Knows the layouts only by `formats.layouts`.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

import qmix
from qmix import strict_json
from qmix.commands.checkpoint import Progress
from qmix.errors import UnsupportedError
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files import manifest, output_dir
from qmix.formats.files.companions import copy_companions
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.files.shard_writer import write_shards
from qmix.formats.layouts import compressed_tensors, gptq, gptq_config, tensor_names
from qmix.formats.names import ModelTensor
from qmix.formats.tensor_spec import TensorSpec
from qmix.planning import budget
from qmix.planning.plan import check_memory
from qmix.weights.affine import Affine
from qmix.weights.scheme import DENSE, Scheme

Format = Literal["compressed-tensors", "gptq"]

_LAYOUTS = {"compressed-tensors": compressed_tensors, "gptq": gptq}
_SCALES = (tensor_names.SCALES, tensor_names.SCALE)


@dataclass(frozen=True, kw_only=True)
class Export:
    """The outcome: weights in the new layout, bytes of the whole directory, time."""

    weights: int
    bytes_out: int
    seconds: float


def export_checkpoint(
    source: Path,
    out: Path,
    layout: Format,
    *,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Export:
    """Write a checkpoint's Int4 and Int8 weights in another layout, with the hub's classic names.

    Codes, scales and the scales' dtype do not change; dense weights are copied.

    Args:
        source, out: directories; `out` appears complete or not at all.
        layout: `gptq` is version 1; `compressed-tensors` is pack-quantized.
        shard_bytes: upper limit of an output file.
        force: replace an existing checkpoint at `out`.
        progress: called with the name of the next tensor, the weights done and all weights.

    Raises:
        UsageError: a path is unsuitable.
        CheckpointError: the source is damaged.
        UnsupportedError: the source has no Int4 or Int8 weights, or some that the layout cannot
            hold: zeros or act-order in compressed-tensors, a zero of 0 in GPTQ.
        ResourceError: too little disk space or memory.
    """
    begun = time.perf_counter()
    output_dir.check_paths(source, out, force=force)
    checkpoint = open_checkpoint(source)
    _check_exportable(checkpoint)
    specs = [_specs(checkpoint, tensor, layout) for tensor in checkpoint.tensors]
    output_dir.check_space(out, sum(spec.nbytes for group in specs for spec in group))
    largest = max(info.nbytes for info in checkpoint.metadata.tensor_infos.values())
    check_memory(budget.for_rewriting(largest))
    conversion = _LayoutConversion(checkpoint, layout)
    with output_dir.partial(out, force=force) as folder:
        write_shards(folder, specs, conversion.tensors(progress), shard_bytes)
        progress("checksums", len(specs), len(specs))
        settings = conversion.quantization_config()
        if layout == "gptq":
            strict_json.write(folder / gptq_config.FILE, settings)
        checkpoint.config.replace(quantization_config=settings).save_pretrained(folder)
        copy_companions(source, folder)
        facts = {"method": f"export to {layout}", "source": source.resolve().name}
        manifest.write_manifest(folder, {"qmix": qmix.__version__, **facts})
        bytes_out = output_dir.total_bytes(folder)
    return Export(
        weights=sum(scheme.integer for scheme in conversion.schemes.values()),
        bytes_out=bytes_out,
        seconds=time.perf_counter() - begun,
    )


class _LayoutConversion:
    """Converts the weights of a checkpoint one by one, and collects what the settings must say.

    Attributes:
        schemes: of the linear layers converted so far, by module name.
        act_order: whether the inputs of any of them are scattered over its groups.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Format) -> None:
        self._checkpoint, self._layout = checkpoint, layout
        self.schemes: dict[str, Scheme] = {}
        self.act_order = False

    def tensors(self, progress: Progress) -> Iterator[Mapping[str, Tensor]]:
        """The new tensors of each weight by name, in the model's order."""
        checkpoint = self._checkpoint
        for done, tensor in enumerate(checkpoint.tensors):
            progress(tensor.name, done, len(checkpoint.tensors))
            if not checkpoint.packed(tensor):
                if tensor.linear:
                    self.schemes[tensor.prefix] = DENSE
                dtype = checkpoint.dense_dtype(tensor)
                yield {tensor.name: checkpoint.dense(tensor).to(dtype)}
                continue
            weight = checkpoint.weight(tensor)
            assert isinstance(weight, Affine), tensor.name
            self.schemes[tensor.prefix] = weight.scheme
            self.act_order |= weight.perm is not None
            yield _LAYOUTS[self._layout].pack(weight, tensor.prefix)

    def quantization_config(self) -> dict[str, object]:
        """The settings of the converted weights."""
        if self._layout == "gptq":
            return gptq_config.quantization_config(self.schemes, act_order=self.act_order)
        return compressed_tensors.quantization_config(self.schemes)


def _check_exportable(checkpoint: Checkpoint) -> None:
    """Raise unless all packed weights are integers, the only ones that have another layout."""
    where = str(checkpoint.shards.directory)
    modules: dict[str, str] = {}  # layout -> a module that has it
    for tensor in checkpoint.tensors:
        if (packing := checkpoint.packing(tensor)) and checkpoint.packed(tensor):
            modules.setdefault(packing.layout, tensor.prefix)
    if not modules:
        raise UnsupportedError(
            "the checkpoint is not quantized",
            where=where,
            expected="Int4 or Int8 weights",
            remedy="Quantize it: qmix quantize SRC OUT --method gptq.",
        )
    for tensor in checkpoint.tensors:
        packing = checkpoint.packing(tensor)
        if packing is None or packing.dense:
            continue
        scheme = checkpoint.metadata.scheme_of(packing)
        if scheme.integer and scheme.group_bits is None:
            continue
        what = "integers with float zeros or biases" if scheme.integer else "NF4 or FP4 weights"
        raise UnsupportedError(
            f"no other layout holds {what}",
            where=where,
            expected="Int4 or Int8 weights",
            found=f"{tensor.prefix} in {packing.layout}'s layout",
            remedy="Quantize the original checkpoint: qmix quantize SRC OUT --method gptq.",
        )


def _specs(checkpoint: Checkpoint, tensor: ModelTensor, layout: Format) -> tuple[TensorSpec, ...]:
    packing = checkpoint.packing(tensor)
    if packing is None or packing.dense:
        return (TensorSpec(tensor.name, checkpoint.dense_dtype(tensor), tensor.shape),)
    (scales,) = (name for name in packing.names if name.endswith(_SCALES))
    dtype, (rows, columns) = checkpoint.entry(scales).dtype, tensor.shape
    scheme = checkpoint.metadata.scheme_of(packing)
    packed_specs = _LAYOUTS[layout].packed_specs
    specs: tuple[TensorSpec, ...] = packed_specs(tensor.prefix, (rows, columns), scheme, dtype)
    return specs
