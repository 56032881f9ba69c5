"""The tables of layouts in README.md and docs/formats.md: who makes each, what qmix does with it.

Every cell is what the code does with a small Mixtral of that layout (every_layout), or with its
schemes at the 8x7B's widths.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from qmix.commands.checkpoint.export import export_checkpoint
from qmix.errors import QmixError, UnsupportedError
from qmix.evals import markdown
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.layouts import gguf_schemes
from qmix.formats.layouts.targets import Format
from qmix.formats.makers import MAKERS
from qmix.formats.unread_layouts import UNREAD_LAYOUTS
from qmix.gguf.tensor_types import QUANTIZED
from qmix.kernels.cpu.pointers import takes
from qmix.planning.stored_model import StoredModel, StoredWeight
from qmix.quantize.calibrated import bit_allocation
from qmix.weights.packed.packed_shapes import MatrixSpec, matrix_format
from qmix.weights.scheme import GROUP_SIZES, NF4, NF4_BLOCK_SIZES, Scheme
from tests.support.every_layout import EVERY, GOLDENS

WIDE = (14336, 4096)  # w1 of the 8x7B
_EXPORTS: Mapping[str, Format] = {
    "GPTQ": "gptq",
    "AWQ": "awq",
    "compressed-tensors": "compressed-tensors",
    "MLX": "mlx",
    "GGUF": "gguf",
    "bitsandbytes": "nf4",
}
_KEPT_IN_4 = ("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS")


@dataclass(frozen=True)
class Row:
    """A layout as people call it, and the names of its models in EVERY."""

    label: str
    sources: tuple[str, ...]


def _goldens(start: str) -> tuple[str, ...]:
    return tuple(name for name in GOLDENS if name.startswith(start))


ROWS = (
    Row("bitsandbytes NF4", ("nf4", "nf4 plain", "nf4 b128")),
    Row("bitsandbytes FP4", ("fp4",)),
    Row(
        "GPTQ, 4 bits",
        (
            *("gptq", "gptq v2", "gptq per output", "gptq asymmetric", "gptq act-order"),
            *("gptqmodel-7.7.0", "auto-round-0.16.0"),
        ),
    ),
    Row("GPTQ, 8 bits", ("gptq 8 bits",)),
    Row("GPTQ, 2 bits", ("gptq 2 bits",)),
    Row("AWQ, gemm", ("awq", "awq symmetric")),
    Row("compressed-tensors, 4 bits", ("compressed", "compressed-tensors-0.20.0/int4-kv")),
    Row("NVFP4 of compressed-tensors", ("compressed-tensors-0.20.0/nvfp4",)),
    Row("NVFP4 of ModelOpt", _goldens("modelopt-0.47.0/nvfp4")),
    Row("MXFP4", ("compressed-tensors-0.20.0/mxfp4",)),
    Row("MLX, 2 to 8 bits", (*_goldens("mlx-0.32.4/affine"), "mlx-0.32.4/mixed")),
    Row("MLX, mxfp4 and nvfp4", (*_goldens("mlx-0.32.4/mxfp4"), *_goldens("mlx-0.32.4/nvfp4"))),
    Row("HQQ, axis 1", ("hqq-0.2.8",)),
    Row(f"GGUF {', '.join(_KEPT_IN_4)}", tuple(f"gguf {kind}" for kind in _KEPT_IN_4)),
    Row(
        "GGUF Q5, Q6 and Q8",
        tuple(f"gguf {kind}" for kind in QUANTIZED if kind[:2] in ("Q5", "Q6", "Q8")),
    ),
    Row("GGUF Q2_K and Q3_K", ("gguf Q2_K", "gguf Q3_K")),
    Row("GGUF IQ1, IQ2, IQ3", ("gguf IQ2_XS", "gguf IQ3_S")),  # IQ1 has the bytes of IQ2
    Row("GGUF MXFP4", ("gguf MXFP4",)),
    Row(
        "FP8",
        (*_goldens("compressed-tensors-0.20.0/fp8"), *_goldens("transformers-fp8"), "modelopt-0.47.0/fp8"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What the code does with one model.

    Attributes:
        layouts: of its experts.
        bits: of its experts' weights in memory, at the 8x7B's widths.
        dense: whether they are loaded in 16 bits.
        exported: whether `qmix export` writes the same layout and schemes again.
        quantized: whether `qmix quantize` writes such weights.
        on_cpu: whether the compiled kernels multiply the experts as they are.
        on_gpu: the groups, of those that the layout may have, that the packed layout takes.
        off_gpu: those that it does not take.
    """

    layouts: frozenset[str]
    bits: frozenset[float]
    dense: bool
    exported: bool
    quantized: bool
    on_cpu: bool
    on_gpu: tuple[str, ...]
    off_gpu: tuple[str, ...]


@cache
def facts(name: str) -> Facts:
    """Load the model of that name, and export it if there is a format for it."""
    with TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(EVERY[name](Path(scratch) / "m"))
        model = StoredModel.of(checkpoint.metadata)
        experts = [weight for weight in model.weights if weight.tensor.kind == "expert"]
        packings = [checkpoint.packing(weight.tensor) for weight in experts]
        layouts = {packing.layout for packing in packings if packing}
        (layout,) = layouts
        dense = all(packing.dense for packing in packings if packing)
        taken, refused = _groups(experts)
        return Facts(
            layouts=frozenset(layouts),
            bits=frozenset(map(_wide_bits, experts)),
            dense=dense,
            exported=_exported(checkpoint, _EXPORTS.get(layout), Path(scratch) / "out"),
            quantized=all((layout, one.scheme.kind) in _quantized() for one in experts),
            on_cpu=not dense and all(takes(checkpoint.weight(one.tensor)) for one in experts[:3]),
            on_gpu=taken,
            off_gpu=refused,
        )


def _wide_bits(weight: StoredWeight) -> float:
    nbytes = weight.scheme.nbytes(WIDE, scale_bytes=weight.item)
    return round(8 * nbytes / (WIDE[0] * WIDE[1]), 3)


def _quantized() -> set[tuple[str, str]]:
    """(layout, kind) of what `qmix quantize` writes."""
    schemes = (*bit_allocation.NARROW, *bit_allocation.WIDE)
    kinds = {scheme.kind for scheme in schemes}
    return {("bitsandbytes", NF4.kind), *(("GPTQ", kind) for kind in kinds)}


def _exported(checkpoint: Checkpoint, layout: Format | None, out: Path) -> bool:
    if layout is None:
        return False
    try:
        export_checkpoint(checkpoint.metadata.directory, out, layout)
    except UnsupportedError:
        return False
    again = open_checkpoint(out)
    return _stored(again) == _stored(checkpoint)


def _stored(checkpoint: Checkpoint) -> list[tuple[str, str, Scheme]]:
    """(layout, GGUF's type, scheme) of every expert's matrix."""
    found = []
    for tensor in checkpoint.tensors:
        if tensor.kind == "expert" and (packing := checkpoint.packing(tensor)):
            kind = gguf_schemes.type_of(packing.infos) if packing.layout == "GGUF" else ""
            found.append((packing.layout, kind, checkpoint.weight(tensor).scheme))
    return found


def _groups(experts: Iterable[StoredWeight]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The groups that a GPU's packed layout takes and does not take, in words."""
    found: dict[str, bool] = {}
    for weight in experts:
        for size, label in _sizes(weight.scheme):
            spec = replace(weight.spec, shape=WIDE, group=size)
            found[label] = found.get(label, True) and _packable(spec)
    return (
        tuple(label for label, taken in found.items() if taken),
        tuple(label for label, taken in found.items() if not taken),
    )


def _sizes(scheme: Scheme) -> Iterator[tuple[int, str]]:
    """The groups that weights of this kind may have, with their names."""
    if scheme.group_bits is not None:
        yield scheme.group_size if scheme.integer else scheme.block_size, "any"
    elif scheme.integer:
        yield from ((size, str(size)) for size in GROUP_SIZES)
        yield WIDE[1], "row"
    else:
        yield from ((size, str(size)) for size in NF4_BLOCK_SIZES if size <= 256)


def _packable(spec: MatrixSpec) -> bool:
    try:
        matrix_format(spec)
    except QmixError:
        return False
    return True


def _cells(row: Row) -> tuple[str, ...]:
    found = [facts(name) for name in row.sources]
    layouts = sorted(set.union(*(set(one.layouts) for one in found)))
    return (
        row.label,
        ", ".join(MAKERS[layout] for layout in layouts),
        "as 16 bits" if all(one.dense for one in found) else "yes",
        _bits(found),
        _written(row, found),
        "yes" if all(one.on_cpu for one in found) else "no",
        _on_gpu(found),
    )


def _bits(found: list[Facts]) -> str:
    bits = sorted(set.union(*(set(one.bits) for one in found)))
    return f"{bits[0]:g}" if len(bits) == 1 else f"{bits[0]:g} to {bits[-1]:g}"


def _written(row: Row, found: list[Facts]) -> str:
    ways = ["quantize"] if all(one.quantized for one in found) else []
    exported = [name for name, one in zip(row.sources, found, strict=True) if one.exported]
    if len(exported) == len(found):
        ways.append("export")
    elif exported:
        names = (name.removeprefix("gguf ").rpartition("/")[2] for name in exported)
        ways.append(f"export of {', '.join(names)}")
    return ", ".join(ways) or "no"


def _on_gpu(found: list[Facts]) -> str:
    taken = [label for label in found[0].on_gpu if all(label in one.on_gpu for one in found)]
    refused = {label for one in found for label in one.off_gpu} - set(taken)
    if not refused:
        return "yes"
    return f"groups of {', '.join(taken)}" if taken else "no"


HEADER = ("layout", "made by", "read", "bits in memory", "written", "fused, CPU", "fused, GPU")


def kinds() -> str:
    """Every layout that is read, whole."""
    return markdown.table(HEADER, map(_cells, ROWS))


# The README's rows -> how the labels of their rows begin.
_SHORT = {
    "NF4, FP4 (bitsandbytes)": ("bitsandbytes",),
    "GPTQ, AWQ, compressed-tensors": ("GPTQ", "AWQ", "compressed-tensors"),
    "NVFP4, MXFP4, MLX, HQQ": ("NVFP4", "MXFP4", "MLX", "HQQ"),
    "GGUF": ("GGUF",),
}


def layouts_in_short() -> str:
    """The README's table."""
    return markdown.table(
        ("layout", "bits in memory", "written", "fused, CPU", "fused, GPU"),
        (_short(label, starts) for label, starts in _SHORT.items()),
    )


def _short(label: str, starts: tuple[str, ...]) -> tuple[str, ...]:
    rows = [row for row in ROWS if row.label.startswith(starts)]
    cells = [_cells(row) for row in rows]
    found = [facts(name) for row in rows for name in row.sources]
    return (
        label,
        _bits(found),
        _share(each[4] != "no" for each in cells),
        _share(each[5] == "yes" for each in cells),
        _share(each[6] != "no" for each in cells),
    )


def _share(answers: Iterable[bool]) -> str:
    given = set(answers)
    return {(True,): "yes", (False,): "no"}.get(tuple(given), "some")


def unread() -> str:
    """The layouts that are refused by name."""
    rows = ((layout.name, layout.remedy) for layout in UNREAD_LAYOUTS)
    return markdown.table(("not read", "instead"), rows)
