"""A quantized checkpoint in the layout of another program, weight by weight and without rounding.

Holds one weight at a time. Knows the layouts by `formats.gptq` and `formats.compressed` only.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

import qmix
from qmix import strict_json
from qmix.errors import UnsupportedError
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files import output_dir, shards
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.files.shards import Planned
from qmix.formats.layouts import compressed_tensors, gptq, gptq_config, tensor_names
from qmix.formats.names import ModelTensor
from qmix.planning import budget
from qmix.planning.plan import check_memory
from qmix.quantize.output_checkpoint import COMPANIONS
from qmix.weights.integers import Integers
from qmix.weights.scheme import DENSE, Scheme

Format = Literal["compressed-tensors", "gptq"]

_LAYOUTS = {"compressed-tensors": compressed_tensors, "gptq": gptq}
_SCALES = (tensor_names.SCALES, tensor_names.SCALE)


@dataclass(frozen=True, kw_only=True)
class Export:
    """The outcome: weights that were packed anew, bytes of the whole directory, time."""

    weights: int
    bytes_out: int
    seconds: float


def run(
    source: Path,
    out: Path,
    layout: Format,
    *,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Export:
    """Write the Int4 and Int8 weights of a checkpoint in another layout, with the hub's classic names.

    Codes, scales and the scales' dtype do not change; dense weights are copied.

    Args:
        source, out: directories; `out` appears complete or not at all.
        layout: `gptq` is version 1; `compressed-tensors` is pack-quantized.
        shard_bytes: upper bound of an output file.
        force: replace an existing checkpoint at `out`.
        progress: called with the tensor's name, the weights done and all of them.

    Raises:
        UsageError: the paths are unfit. CheckpointError: the source is damaged.
        UnsupportedError: the source holds no integers, or what the layout cannot say: zeros or
            act-order in compressed-tensors, a zero of 0 in GPTQ. ResourceError: the disk is too small.
    """
    begun = time.perf_counter()
    output_dir.check_paths(source, out, force=force)
    checkpoint = open_checkpoint(source)
    _refuse_others(checkpoint)
    plan = [_planned(checkpoint, tensor, layout) for tensor in checkpoint.tensors]
    output_dir.check_space(out, sum(one.nbytes for group in plan for one in group))
    largest = max(header.nbytes for header in checkpoint.metadata.tensor_infos.values())
    check_memory(budget.for_rewriting(largest))
    schemes: dict[str, Scheme] = {}  # of the linear layers
    scattered = 0

    def converted() -> Iterator[Mapping[str, Tensor]]:
        nonlocal scattered
        for done, tensor in enumerate(checkpoint.tensors):
            progress(tensor.name, done, len(plan))
            if not checkpoint.packed(tensor):
                if tensor.linear:
                    schemes[tensor.prefix] = DENSE
                yield {tensor.name: checkpoint.read(tensor.name)}
                continue
            weight = checkpoint.weight(tensor)
            assert isinstance(weight, Integers), tensor.name
            schemes[tensor.prefix] = weight.scheme
            scattered += weight.perm is not None
            yield _LAYOUTS[layout].pack(weight, tensor.prefix)

    with output_dir.partial(out, force=force) as folder:
        shards.write_shards(folder, plan, converted(), shard_bytes)
        progress("checksums", len(plan), len(plan))
        if layout == "gptq":
            settings = gptq_config.config(schemes, act_order=scattered > 0)
            strict_json.write(folder / gptq_config.FILE, settings)
        else:
            settings = compressed_tensors.config(schemes)
        config = checkpoint.config.replace(quantization_config=settings)
        config.save_pretrained(folder)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        facts = {"method": f"export to {layout}", "source": source.resolve().name}
        output_dir.write_manifest(folder, {"qmix": qmix.__version__, **facts})
        bytes_out = sum(path.stat().st_size for path in folder.iterdir())
    return Export(
        weights=sum(scheme.integer for scheme in schemes.values()),
        bytes_out=bytes_out,
        seconds=time.perf_counter() - begun,
    )


def _refuse_others(checkpoint: Checkpoint) -> None:
    """Only integers have another layout."""
    where = str(checkpoint.shards.directory)
    layouts: dict[str, str] = {}
    for tensor in checkpoint.tensors:
        if packed := checkpoint.packing(tensor):
            layouts.setdefault(packed.layout, tensor.prefix)
    if not layouts:
        raise UnsupportedError(
            "nothing is quantized here",
            where=where,
            expected="Int4 or Int8 weights",
            remedy="Quantize it: qmix quantize SRC OUT --method gptq.",
        )
    if "bitsandbytes" in layouts:
        raise UnsupportedError(
            "NF4 and FP4 are no integers: no other layout holds them",
            where=where,
            expected="Int4 or Int8 weights",
            found=f"{layouts['bitsandbytes']} in bitsandbytes' layout",
            remedy="Quantize the original checkpoint: qmix quantize SRC OUT --method gptq.",
        )


def _planned(checkpoint: Checkpoint, tensor: ModelTensor, layout: Format) -> list[Planned]:
    packed = checkpoint.packing(tensor)
    if packed is None:
        return [Planned(tensor.name, checkpoint.entry(tensor.name).dtype, tensor.shape)]
    (scales,) = (name for name in packed.tensor_names if name.endswith(_SCALES))
    dtype, (rows, columns) = checkpoint.entry(scales).dtype, tensor.shape
    scheme = checkpoint.metadata.scheme_of(tensor, packed)
    specs = _LAYOUTS[layout].packed_specs(tensor.prefix, (rows, columns), scheme, dtype)
    return [Planned(name, *spec) for name, spec in specs.items()]
