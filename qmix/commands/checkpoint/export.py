"""A quantized checkpoint in another program's format, weight by weight.

A weight that the format holds is moved bit for bit; one that it does not hold is named, and rounded
only if that is asked for. Holds one weight at a time, or one layer's stack of experts. Knows the
formats only by `layouts.targets` and `export_gguf`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qmix
from qmix import strict_json
from qmix.commands.checkpoint import Progress, export_gguf
from qmix.commands.checkpoint.export_plan import (
    Change,
    ExportPlan,
    PlannedWeight,
    Rules,
    plan_export,
)
from qmix.commands.checkpoint.export_weights import RoundedWeight, WeightConversion
from qmix.config import MixtralConfig
from qmix.errors import UnsupportedError, UsageError
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.compatibility import support_of
from qmix.formats.files import manifest, output_dir
from qmix.formats.files.companions import copy_companions
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.files.shard_writer import write_shards
from qmix.formats.layouts import mlx_config
from qmix.formats.layouts.targets import (
    GGUF_FITTING,
    GGUF_KINDS,
    TARGETS,
    Described,
    Format,
    Target,
)
from qmix.formats.readers.programs import SERVED_KINDS, Program
from qmix.formats.readers.storage import storage_summary
from qmix.formats.tensor_spec import TensorSpec
from qmix.gguf.files import SUFFIX
from qmix.hub.local import shown_name
from qmix.planning import budget
from qmix.planning.plan import check_memory
from qmix.weights.dense import Dense
from qmix.weights.scheme import DENSE


class LossError(UnsupportedError):
    """A format does not hold every weight bit for bit."""


_GGUF = Rules(fitting=GGUF_FITTING, kinds=GGUF_KINDS, stacked=True, uniform=False, gguf=True)


@dataclass(frozen=True, kw_only=True)
class Export:
    """The outcome.

    Attributes:
        weights: how many are quantized there.
        notes: what changed although every bit was kept.
        losses: what was not kept, by kind.
        rounded: the weights that the format does not hold, with their errors.
        bytes_out: of the whole directory.
    """

    weights: int
    notes: tuple[Change, ...]
    losses: tuple[Change, ...]
    rounded: tuple[RoundedWeight, ...]
    bytes_out: int
    seconds: float

    @property
    def relative_error(self) -> float:
        """Of all rounded weights together, in the Frobenius norm."""
        return _relative_error(self.rounded)

    def to_dict(self) -> dict[str, object]:
        """As a JSON document; the error of each rounded weight is in qmix_report.json."""
        return {
            "weights": self.weights,
            "notes": [str(note) for note in self.notes],
            "losses": [str(loss) for loss in self.losses],
            "rounded": len(self.rounded),
            "relative_error": self.relative_error,
            "bytes_out": self.bytes_out,
            "seconds": self.seconds,
        }


def export_checkpoint(
    source: Path,
    out: Path,
    layout: Format,
    *,
    requantize: bool = False,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    reader: Program | None = None,
    progress: Progress = lambda *_: None,
) -> Export:
    """Write a checkpoint's weights in another format.

    Args:
        source: directory or GGUF file.
        out: directory; it appears complete or not at all.
        layout: `gptq` is version 1; `awq` is gemm; `compressed-tensors` is pack-quantized; `mlx` is
            the affine mode with stacked experts; `gguf` is one file; `nf4` is bitsandbytes'.
        requantize: round what the format does not hold, and measure the errors.
        shard_bytes: upper limit of an output file; of all but gguf.
        force: replace an existing checkpoint at `out`.
        reader: the program that is to load it. Router and head are then dense, as all of them want
            it, and what it would not load is not written.
        progress: called with the name of the next tensor, the steps done and all steps.

    Raises:
        UsageError: a path is unsuitable.
        CheckpointError: the source is damaged.
        UnsupportedError: the source is not quantized (gguf takes it all the same), or holds weights
            that the format does not hold, each kind of loss with its first weight; or `reader`
            would not load it.
        ResourceError: too little disk space or memory.
    """
    begun = time.perf_counter()
    _refuse_file_name(out)
    output_dir.check_paths(source, out, force=force)
    checkpoint = open_checkpoint(source)
    target = None if layout == "gguf" else TARGETS[layout]
    metadata = export_gguf.model_metadata(checkpoint, source) if target is None else {}
    if target is not None:
        _check_quantized(checkpoint)
    rules = _GGUF if target is None else _rules(target, reader)
    plan = _plan(checkpoint, rules, progress)
    if not requantize:
        _refuse_losses(checkpoint, plan, layout)
    _check_reader(checkpoint, plan, target, layout, reader)
    conversion = WeightConversion(checkpoint, rules.fitting)
    show = partial(_show_written, progress, len(checkpoint.tensors))
    with output_dir.partial(out, force=force) as folder:
        if target is None:
            export_gguf.write(folder, checkpoint, plan, conversion, metadata, show)
        else:
            _write(folder, checkpoint, plan, conversion, target, shard_bytes, show)
            copy_companions(source, folder)
        show("checksums", len(checkpoint.tensors))
        _describe(folder, source, layout, conversion.rounded)
        bytes_out = output_dir.total_bytes(folder)
    return _outcome(plan, conversion, bytes_out, time.perf_counter() - begun)


def _outcome(
    plan: ExportPlan, conversion: WeightConversion, bytes_out: int, seconds: float
) -> Export:
    return Export(
        weights=sum(weight.form.scheme.kind != "dense" for weight in plan.weights),
        notes=plan.notes(),
        losses=plan.losses(),
        rounded=tuple(conversion.rounded),
        bytes_out=bytes_out,
        seconds=seconds,
    )


def _refuse_file_name(out: Path) -> None:
    if out.suffix == SUFFIX:
        raise UsageError(
            "OUT is a folder, in which the GGUF file gets a name of its own",
            where=str(out),
            remedy=f"Give {out.with_suffix('')}.",
        )


def _plan(checkpoint: Checkpoint, rules: Rules, progress: Progress) -> ExportPlan:
    """The plan, if there is the memory to follow it."""
    count = len(checkpoint.tensors)
    plan = plan_export(checkpoint, rules, lambda name, done, _: progress(name, done, 2 * count))
    check_memory(budget.for_rewriting(_largest(checkpoint, plan, stacks=not rules.gguf)))
    return plan


def _show_written(progress: Progress, count: int, name: str, done: int) -> None:
    """Progress of the second half: all weights have been read once."""
    progress(name, count + done, 2 * count)


def _rules(target: Target, reader: Program | None) -> Rules:
    return Rules(
        fitting=target.fitting,
        kinds=target.kinds if reader is None else target.kinds & SERVED_KINDS,
        stacked=target.stacked,
        uniform=target.uniform,
        gguf=False,
    )


def _check_quantized(checkpoint: Checkpoint) -> None:
    """Raise unless there is a packed weight: what is dense has to be quantized, not exported."""
    if any(map(checkpoint.packed, checkpoint.tensors)):
        return
    raise UnsupportedError(
        "the checkpoint is not quantized",
        where=str(checkpoint.shards.directory),
        expected="weights in 4 or 8 bits",
        remedy="Quantize it: qmix quantize SRC OUT. --format gguf takes it as it is.",
    )


def _refuse_losses(checkpoint: Checkpoint, plan: ExportPlan, layout: Format) -> None:
    if losses := plan.losses():
        raise LossError(
            f"{layout} cannot hold every weight bit for bit",
            where=str(checkpoint.shards.directory),
            found="; ".join(map(str, losses)),
            remedy="--requantize rounds these weights and states the error of each.",
        )


def _check_reader(
    checkpoint: Checkpoint,
    plan: ExportPlan,
    target: Target | None,
    layout: Format,
    reader: Program | None,
) -> None:
    """Raise if a program would not load what is planned; llama.cpp loads all that we write."""
    if target is None or reader is None:
        return
    written = replace(
        storage_summary(checkpoint.metadata),
        schemes=plan.linear_schemes(),
        layouts=frozenset((target.layout,)),
        dialect="stacked" if target.stacked else "classic",
        settings=_settings(checkpoint, plan, target)["quantization_config"],
        gguf=None,
    )
    support = support_of(reader, written)
    if support.outcome != "loads":
        raise UnsupportedError(
            f"{support.reader} does not load it in the format {layout}",
            where=str(checkpoint.shards.directory),
            found=support.reason,
        )


def _settings(checkpoint: Checkpoint, plan: ExportPlan, target: Target) -> dict[str, Any]:
    """The fields of config.json that describe the packed weights."""
    return target.settings(Described(plan.schemes(), checkpoint.dtype, plan.act_order))


def _largest(checkpoint: Checkpoint, plan: ExportPlan, *, stacks: bool) -> int:
    """Bytes of the largest weight: in the source, in float32 if its codes are rounded anew, or in
    a stack that is held whole.
    """
    sizes = [
        sum(checkpoint.entry(name).nbytes for name in checkpoint.stored(weight.tensor))
        for weight in plan.weights
    ]
    sizes += [4 * prod(w.tensor.shape) for w in plan.weights if w.step == "codes"]
    if stacks:
        sizes += map(_group_bytes, plan.groups)
    return max(sizes)


def _group_bytes(group: Sequence[PlannedWeight]) -> int:
    """Bytes of a group's weights in codes or 16 bits."""
    return sum(weight.form.scheme.nbytes(weight.tensor.shape) for weight in group)


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    plan: ExportPlan,
    conversion: WeightConversion,
    target: Target,
    shard_bytes: int,
    show: Callable[[str, int], None],
) -> None:
    """The safetensors files and the config."""
    specs = [_specs(group, target) for group in plan.groups]
    output_dir.check_space(folder.parent / folder.stem, sum(s.nbytes for g in specs for s in g))
    tensors = _tensors(checkpoint, plan, conversion, target, show)
    write_shards(folder, specs, tensors, shard_bytes, maker=target.metadata)
    settings = _settings(checkpoint, plan, target)
    if target.file is not None:
        strict_json.write(folder / target.file, settings["quantization_config"])
    document = checkpoint.config.to_dict()
    for field in (mlx_config.FIELD, "quantization_config"):
        document.pop(field, None)
    MixtralConfig.from_dict({**document, **settings}).save_pretrained(folder)


def _specs(group: Sequence[PlannedWeight], target: Target) -> tuple[TensorSpec, ...]:
    """The tensors of a weight, or of a stack of them."""
    specs = _weight_specs(group[0], target)
    if not _is_stack(group[0], target):
        return specs
    shape = (len(group),)
    return tuple(replace(spec, shape=(*shape, *spec.shape)) for spec in specs)


def _is_stack(weight: PlannedWeight, target: Target) -> bool:
    return target.stacked and weight.tensor.kind == "expert"


def _module(weight: PlannedWeight, target: Target) -> str:
    prefix = weight.tensor.prefix
    return mlx_config.mlx_name(prefix) if _is_stack(weight, target) else prefix


def _weight_specs(weight: PlannedWeight, target: Target) -> tuple[TensorSpec, ...]:
    tensor, form, module = weight.tensor, weight.form, _module(weight, target)
    if form.scheme == DENSE:
        return (TensorSpec(f"{module}.weight", form.dtype, tensor.shape),)
    rows, columns = tensor.shape
    return target.packed_specs(module, (rows, columns), form.scheme, form.dtype)


def _tensors(
    checkpoint: Checkpoint,
    plan: ExportPlan,
    conversion: WeightConversion,
    target: Target,
    show: Callable[[str, int], None],
) -> Iterator[Mapping[str, Tensor]]:
    """The new tensors of each group by name."""
    done = 0
    for group in plan.groups:
        stack: dict[str, Tensor] = {}
        for index, planned in enumerate(group):
            show(planned.tensor.name, done)
            done += 1
            tensors = _weight_tensors(checkpoint, planned, conversion, target)
            if not _is_stack(planned, target):
                stack = tensors
                continue
            for name, tensor in tensors.items():
                if index == 0:
                    stack[name] = torch.empty((len(group), *tensor.shape), dtype=tensor.dtype)
                stack[name][index] = tensor
        yield stack


def _weight_tensors(
    checkpoint: Checkpoint, planned: PlannedWeight, conversion: WeightConversion, target: Target
) -> dict[str, Tensor]:
    module = _module(planned, target)
    if planned.tensor.kind == "norm":
        return {planned.tensor.name: checkpoint.read(planned.tensor.name)}
    weight = conversion.weight(planned)
    if isinstance(weight, Dense):
        return {f"{module}.weight": weight.data}
    return target.pack(weight, module)


def _describe(folder: Path, source: Path, layout: Format, rounded: Sequence[RoundedWeight]) -> None:
    """The manifest, and a report of what was rounded, weight by weight and in all."""
    method = f"export to {layout}"
    if rounded:
        report = {
            "method": method,
            "relative_error": _relative_error(rounded),
            "tensors": [weight.to_dict() for weight in rounded],
        }
        strict_json.write(folder / manifest.REPORT, report)
    facts = {"method": method, "source": shown_name(source)}
    manifest.write_manifest(folder, {"qmix": qmix.__version__, **facts})


def _relative_error(rounded: Sequence[RoundedWeight]) -> float:
    error = sum(weight.squared_error for weight in rounded)
    norm = sum(weight.squared_norm for weight in rounded)
    return (error / norm) ** 0.5 if norm else 0.0
