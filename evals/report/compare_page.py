"""A comparison as a page: what each model costs in quality, where, and at which size.

Knows nothing of how the figures were measured.
"""

from collections.abc import Sequence
from string import ascii_uppercase

from qmix.errors import UsageError
from qmix.evals.quality.comparison import Comparison, ModelResult, ReferenceDistance
from qmix.evals.quality.perplexity import ReferenceScore
from qmix.evals.quality.worst_tokens import Prediction, WorstToken
from qmix.evals.report.recorded_speed import RecordedSpeed, speed_section
from qmix.pages import charts, theme
from qmix.pages.charts import Series
from qmix.pages.model_grids import Words, expert_picture, matrix_picture
from qmix.pages.page import (
    Page,
    Picture,
    Quotation,
    Quotations,
    Section,
    Table,
    series_table,
)
from qmix.quantities import gigabytes

MOST = theme.MOST  # models that a page tells apart
_MATRICES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate",
    "w1",
    "w2",
    "w3",
    "embed_tokens",
    "lm_head",
)


def check_count(models: int) -> None:
    """Refuse more models than a page can show, or fewer than two, before anything is measured.

    Raises:
        UsageError: there are.
    """
    if not 2 <= models <= MOST:
        raise UsageError("give some models", expected=f"2 to {MOST} in all", found=models)


def compare_page(comparison: Comparison, data: str, speeds: Sequence[RecordedSpeed] = ()) -> Page:
    """The page of a comparison.

    Args:
        data: the name of the text.
        speeds: what `qmix bench` recorded of some of the models.
    """
    reference = comparison.reference
    others = [_Entry(index, model) for index, model in enumerate(comparison.models)]
    sections = [
        _overview(others),
        _positions(others),
        _layers(others),
        _weights(others),
        _worst(others),
        _experts(others, comparison.chosen),
        _bits(others),
        speed_section(speeds),
    ]
    names = ", ".join(model.name for model in comparison.models[1:])
    return Page(
        title=f"{names} beside {reference.name}",
        lead=f"A is the reference: {reference.name}. Every distance on this page is from A. "
        "A letter, a marker and a pattern stand for the same model in every picture.",
        facts=(
            ("text", f"{data}, SHA-256 {reference.score.text_sha256}"),
            ("scored", f"{reference.score.tokens:,} tokens; {reference.score.protocol}"),
            ("computed", f"in {comparison.dtype} on {comparison.device}"),
        ),
        sections=tuple(section for section in sections if section is not None),
    )


class _Entry:
    """A model, and how it looks in every picture."""

    def __init__(self, index: int, model: ModelResult) -> None:
        self.index, self.model, self.letter = index, model, ascii_uppercase[index]

    @property
    def key(self) -> str:
        return f"{self.letter} {self.model.name}"

    @property
    def distance(self) -> ReferenceDistance:
        assert self.model.distance is not None
        return self.model.distance

    @property
    def reference(self) -> ReferenceScore:
        assert self.model.score.reference is not None
        return self.model.score.reference

    def series(self, values: Sequence[float | None]) -> Series:
        return Series(self.letter, self.model.name, self.index, tuple(values))


def _overview(entries: Sequence[_Entry]) -> Section:
    rows = []
    for each in entries:
        score, other = each.model.score, each.model.score.reference
        rows.append(
            (
                each.key,
                gigabytes(each.model.nbytes),
                f"{each.model.bits_per_weight:.3f}",
                f"{score.perplexity:.4f}",
                f"{score.stderr:.4f}",
                *(
                    ("-",) * 4
                    if other is None
                    else (
                        f"{other.kl_mean:.5f}",
                        f"{other.kl_median:.5f}",
                        f"{other.kl_p99:.4f}",
                        f"{100 * other.top1_agreement:.2f}",
                    )
                ),
            )
        )
    header = (
        "model",
        "size",
        "bits/weight",
        "perplexity",
        "± at least",
        "mean KL",
        "median KL",
        "p99 KL",
        "top-1 agreement, %",
    )
    table = Table("All models. KL is KL(A || model) in nats a token.", header, tuple(rows))
    unit, scale = ("GB", 1e9) if entries[0].model.nbytes >= 1e9 else ("MB", 1e6)
    sizes = [each.series([each.model.nbytes / scale]) for each in entries]
    perplexities = [each.series([each.model.score.perplexity]) for each in entries]
    distances = [each.series([each.reference.kl_mean]) for each in entries[1:]]
    kl = Picture(
        "size-kl",
        "Size and divergence",
        "Mean KL from A over the size of the stored weights: lower and further left is better.",
        f"Mean KL by size: {_said(entries[1:], distances, 'nats')}.",
        charts.points(sizes[1:], distances, unit, "mean KL, nats"),
    )
    perplexity = Picture(
        "size-perplexity",
        "Size and perplexity",
        "Perplexity of the text over the size of the stored weights.",
        f"Perplexity by size: {_said(entries, perplexities, '')}.",
        charts.points(sizes, perplexities, unit, "perplexity"),
    )
    return Section("Size and quality", (), (table, kl, perplexity))


def _said(entries: Sequence[_Entry], series: Sequence[Series], unit: str) -> str:
    return ", ".join(
        f"{each.key} {line.values[0]:.4g} {unit}".strip()
        for each, line in zip(entries, series, strict=True)
    )


def _positions(entries: Sequence[_Entry]) -> Section:
    bins = entries[1].distance.positions
    lines = [each.series([at.kl for at in each.distance.positions]) for each in entries[1:]]
    places = [f"{at.start} to {at.stop - 1}" for at in bins]
    table = series_table("Mean KL in nats", "position", places, _columns(entries[1:], lines, 5))
    picture = Picture(
        "positions",
        "KL by position in the window",
        "Each point is the mean over the tokens of a range of positions, drawn at its middle.",
        "Lines of mean KL over the position in the window, one a model; the table has the figures.",
        charts.lines(
            [(at.start + at.stop - 1) / 2 for at in bins],
            lines,
            "position in the window",
            "mean KL, nats",
        ),
        (table,),
    )
    return Section("Where in the text", (), (picture,))


def _columns(
    entries: Sequence[_Entry], lines: Sequence[Series], digits: int
) -> list[tuple[str, list[str]]]:
    return [
        (each.key, ["-" if value is None else f"{value:.{digits}f}" for value in line.values])
        for each, line in zip(entries, lines, strict=True)
    ]


def _layers(entries: Sequence[_Entry]) -> Section:
    lines = [each.series(each.distance.layer_errors) for each in entries[1:]]
    layers = range(len(lines[0].values))
    words = (
        "The hidden states that leave a layer, beside those of A at the same layer and token: "
        "the length of the difference over the length of A's, the mean over all tokens. Each "
        "model runs on its own hidden states, so a layer's figure holds the errors of all layers "
        "before it. It is no KL, and it does not tell what one layer alone would cost.",
    )
    picture = Picture(
        "layers",
        "Error of the hidden states after each layer",
        "0 is no difference; 1 is a difference as long as the hidden state itself.",
        "Lines of the relative error over the layers, one a model; the table has the figures.",
        charts.lines(list(layers), lines, "layer", "relative error"),
        (
            series_table(
                "Relative error", "layer", list(map(str, layers)), _columns(entries[1:], lines, 5)
            ),
        ),
    )
    return Section("Where in the model", words, (picture,))


def _weights(entries: Sequence[_Entry]) -> Section:
    found = {part for each in entries[1:] for part in each.distance.weight_errors}
    if not found:
        return Section("Error of the weights", ("No model but A holds quantized weights.",))
    parts = [part for part in _MATRICES if part in found] + sorted(found - {*_MATRICES})
    lines = [
        each.series([each.distance.weight_errors.get(part) for part in parts])
        for each in entries[1:]
    ]
    names = [part.removesuffix("_proj").removesuffix("_tokens") for part in parts]
    picture = Picture(
        "weights",
        "Error of the weights by kind",
        "|W - W_A| / |W_A| over all quantized matrices of a kind (Frobenius norms). A kind that "
        "a model keeps in 16 bits has no bar. A smaller error of the weights need not mean a "
        "smaller KL: GPTQ trades one for the other.",
        "Bars of the relative error of weights, a group a kind and a bar a model; the table has "
        "the figures.",
        charts.bars(names, lines, "relative error"),
        (series_table("Relative error", "kind", names, _columns(entries[1:], lines, 5)),),
    )
    return Section("Error of the weights", (), (picture,))


def _worst(entries: Sequence[_Entry]) -> Section:
    words = (
        "The tokens at which a model's expectation is farthest from A's, with the text around "
        "them; the underlined token is the one that was to be predicted.",
    )
    lists = tuple(
        Quotations(each.key, tuple(_quoted(token, each) for token in each.distance.worst))
        for each in entries[1:]
    )
    return Section("Worst tokens", words, lists)


def _quoted(token: WorstToken, entry: _Entry) -> Quotation:
    facts = (
        f"KL {token.kl:.3f} nats",
        f"A {_expected(token, token.reference)}",
        f"{entry.letter} {_expected(token, token.model)}",
        f"window {token.window}, position {token.position}",
    )
    return Quotation(token.before, token.token, token.after, facts)


def _expected(token: WorstToken, prediction: Prediction) -> str:
    share = f"gave it {100 * prediction.probability:.1f} %"
    if prediction.choice == token.token:
        return f"{share}, its first choice"
    return f"{share}, and {100 * prediction.choice_probability:.1f} % to “{prediction.choice}”"


def _experts(entries: Sequence[_Entry], chosen: int) -> Section:
    shares = [_shares(each.model) for each in entries]
    every = [value for model in shares for layer in model for value in layer]
    even = 100 / len(shares[0][0])
    words = (
        f"Each token goes through {chosen} experts of every layer. A cell is an expert's share of "
        f"them; if all were used alike, each would have {even:.1f} %.",
    )
    pictures = [
        expert_picture(
            Words(
                f"experts-{each.letter}",
                f"Expert use: {each.key}",
                f"The stronger the shade, the more; at most {_most(model):.1f} %. No shade is "
                f"{min(every):.1f} %, the least of all models.",
                f"Shares of the experts by layer; the table has the figures. At most {_most(model):.1f} %.",
            ),
            model,
            min(every),
            max(every),
        )
        for each, model in zip(entries, shares, strict=True)
    ]
    differences = [
        [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(model, shares[0], strict=True)]
        for model in shares[1:]
    ]
    span = max(_most(difference) for difference in differences) or 1.0
    pictures += [
        expert_picture(
            Words(
                f"difference-{each.letter}",
                f"Expert use: {each.letter} less A",
                f"In points; a minus sign marks what {each.letter} uses less than A. At most "
                f"{_most(difference):.2f}.",
                f"Difference of the shares by layer and expert; at most {_most(difference):.2f} points.",
            ),
            difference,
            0.0,
            span,
            unit="",
        )
        for each, difference in zip(entries[1:], differences, strict=True)
    ]
    return Section("Which experts are used", words, tuple(pictures))


def _most(shares: Sequence[Sequence[float]]) -> float:
    return max(abs(value) for layer in shares for value in layer)


def _shares(model: ModelResult) -> list[list[float]]:
    return [[100 * count / sum(layer) for count in layer] for layer in model.expert_tokens]


def _bits(entries: Sequence[_Entry]) -> Section | None:
    mixed = [each for each in entries if each.model.mixed]
    pictures = [
        matrix_picture(
            Words(
                f"bits-{each.letter}",
                f"Bits a weight: {each.key}",
                "Scales included. The stronger the shade, the more bits; experts are numbered.",
                "Bits of each matrix by layer; the table has the figures.",
            ),
            {name: bits for name, bits in each.model.bits.items() if not name.endswith(".gate")},
            "bits a weight",
        )
        for each in mixed
    ]
    if not pictures:
        return None
    words = ("Models whose matrices have different numbers of bits.",)
    return Section("Bits of each matrix", words, tuple(pictures))
