"""What a quantization did as a page: errors by kind and layer, bits, tokens of the experts.

The same run writes the same bytes, so it holds no times. Knows nothing of methods.
"""

from collections.abc import Callable, Mapping, Sequence

from qmix.formats.names import place
from qmix.pages import charts
from qmix.pages.charts import Series
from qmix.pages.model_grids import Words, expert_picture, matrix_picture
from qmix.pages.page import Page, Picture, Section, Table, series_table
from qmix.quantities import counted, gigabytes
from qmix.quantize.report import KIND_HEADER, QuantizeReport, TensorResult

_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")


def report_page(report: QuantizeReport, name: str, source: str, version: str) -> Page:
    """The page of a report.

    Args:
        name, source: of the checkpoint and of what it was made from, as people call them.
        version: of qmix.
    """
    rounded = [tensor for tensor in report.tensors if tensor.scheme.kind != "dense"]
    sections = [Section("Tensors by kind", (), (_kinds(report),))]
    if rounded:
        sections.append(_errors(rounded))
    sections += filter(None, (_bits(rounded), _tokens(rounded), _exceptions(rounded)))
    return Page(
        title=f"{name}: {source} in {report.bits_per_weight:.2f} bits a weight",
        lead="Times and the figures of every tensor are in qmix_report.json.",
        facts=(
            ("method", report.method),
            ("size", f"{gigabytes(report.bytes_out)}, {gigabytes(report.bytes_in)} before"),
            ("made by", f"qmix {version}"),
        ),
        sections=tuple(sections),
    )


def _kinds(report: QuantizeReport) -> Table:
    rows = tuple(kind.cells for kind in report.kinds())
    return Table("All tensors; errors are relative, in the Frobenius norm", KIND_HEADER, rows)


def _errors(rounded: Sequence[TensorResult]) -> Section:
    first = _by_layer(
        "weights",
        "Error of the weights by layer",
        "|W - Q(W)| / |W| over all matrices of a kind in a layer.",
        rounded,
        lambda group: _ratio([(t.squared_error, t.squared_norm) for t in group]),
    )
    items = [first]
    if any(tensor.output_error is not None for tensor in rounded):
        outputs = _by_layer(
            "outputs",
            "Error of the outputs by layer",
            "|(W - Q(W)) x| / |W x| over the calibration tokens, the root mean square over all "
            "matrices of a kind in a layer.",
            rounded,
            lambda group: _ratio([(t.output_error**2, 1.0) for t in group if t.output_error]),
        )
        items.append(outputs)
    return Section("Errors by layer", (), tuple(items))


def _ratio(squares: Sequence[tuple[float, float]]) -> float | None:
    norm = sum(norm for _, norm in squares)
    return (sum(error for error, _ in squares) / norm) ** 0.5 if norm else None


def _by_layer(
    name: str,
    title: str,
    caption: str,
    rounded: Sequence[TensorResult],
    value: Callable[[Sequence[TensorResult]], float | None],
) -> Picture:
    """A line for each kind of matrix over the layers; `value` is of those of one layer."""
    groups: dict[str, dict[int, list[TensorResult]]] = {}
    for tensor in rounded:
        at = place(tensor.name)
        if at.layer is not None and at.part in _PARTS:
            groups.setdefault(at.part, {}).setdefault(at.layer, []).append(tensor)
    layers = range(1 + max(layer for group in groups.values() for layer in group))
    lines = [
        Series(
            part.removesuffix("_proj"),
            "",
            style,
            tuple(value(groups[part].get(layer, [])) for layer in layers),
        )
        for style, part in enumerate(_PARTS)
        if part in groups
    ]
    columns = [
        (line.letter, ["-" if each is None else f"{each:.5f}" for each in line.values])
        for line in lines
    ]
    return Picture(
        name,
        title,
        caption,
        f"{title}: a line a kind of matrix; the table has the figures.",
        charts.lines(list(layers), lines, "layer", "relative error"),
        (series_table("Relative error", "layer", list(map(str, layers)), columns),),
    )


def _bits(rounded: Sequence[TensorResult]) -> Section | None:
    if len({tensor.scheme for tensor in rounded}) < 2:
        return None
    bits: Mapping[str, float] = {t.name: t.scheme.bits_per_weight for t in rounded}
    words = Words(
        "bits",
        "Bits a weight",
        "Scales included. The stronger the shade, the more bits; experts are numbered.",
        "Bits of each matrix by layer; the table has the figures.",
    )
    return Section("Bits of each matrix", (), (matrix_picture(words, bits, "bits a weight"),))


def _tokens(rounded: Sequence[TensorResult]) -> Section | None:
    """How many calibration tokens each expert saw."""
    seen = {place(t.name): t.tokens for t in rounded if t.kind == "expert" and t.tokens is not None}
    tokens = {(at.layer, at.expert): count for at, count in seen.items() if at.part == "w1"}
    layers = 1 + max((layer for layer, _ in tokens if layer is not None), default=-1)
    experts = 1 + max((expert for _, expert in tokens if expert is not None), default=-1)
    if len(tokens) < layers * experts or not tokens:
        return None
    counts = [[float(tokens[layer, e]) for e in range(experts)] for layer in range(layers)]
    every = [count for row in counts for count in row]
    words = Words(
        "tokens",
        "Calibration tokens by expert",
        f"{min(every):,.0f} (no shade) to {max(every):,.0f}. An expert that sees few tokens is "
        "rounded with less knowledge of its inputs.",
        "Tokens that each expert saw, by layer; the table has the figures.",
    )
    picture = expert_picture(words, counts, min(every), max(every), unit="")
    return Section("Tokens of the experts", (), (picture,))


def _exceptions(rounded: Sequence[TensorResult]) -> Section | None:
    rows = tuple(
        (
            tensor.name,
            f"rounded to nearest: {tensor.fallback}"
            if tensor.fallback
            else f"damping was raised {counted(tensor.raised, 'time')}",
        )
        for tensor in rounded
        if tensor.fallback or tensor.raised
    )
    if not rows:
        return None
    table = Table("Matrices that GPTQ could not round as usual", ("matrix", "what was done"), rows)
    return Section("Exceptions", (), (table,))
