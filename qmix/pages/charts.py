"""Charts: points, lines, bars, stacks and grids of shades, each readable without colour.

Series carry a letter, a marker, a dash and a hatch beside their colour. A chart is a matplotlib
figure, which `svg` writes. Knows nothing of what the numbers mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmix.pages import theme
from qmix.printable import escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 6.0  # inches: a letter is 9 pixels high on a screen of 400, and 15 on a wide one
_FONT, _SMALL, _TINY = 12.0, 11.0, 9.0
_KEY = 46  # characters of a name in a chart's key
# Where a point's letter stands, in points: near points have their letters on different sides.
_BESIDE = ((11, 8), (-11, 8), (11, -8), (-11, -8))
_LETTER = 0.085  # of an axis: the height of a letter at a line's end
_LOG_FROM = 20.0  # values that differ by more than this factor get a logarithmic axis


@dataclass(frozen=True)
class Series:
    """One line, one set of bars or one point: `letter` stands in the chart, `name` in its key.

    Attributes:
        style: which colour, marker, dash and hatch of the theme.
        values: a None leaves a gap.
    """

    letter: str
    name: str
    style: int
    values: tuple[float | None, ...]

    @property
    def color(self) -> str:
        return theme.SERIES[self.style].light

    @property
    def key(self) -> str:
        """Letter and name, a long name without its middle; matplotlib reads $ as mathematics."""
        name = escaped(self.name)
        name = name if len(name) <= _KEY else f"{name[:24]}…{name[-20:]}"
        return f"{self.letter} {name}".strip().replace("$", r"\$")


def points(sizes: Sequence[Series], heights: Sequence[Series], x: str, y: str) -> "Figure":
    """One marker a series: its first value in `sizes` against its first in `heights`."""
    figure, axes = _axes(3.0)
    for size, height in zip(sizes, heights, strict=True):
        at = (size.values[0] or 0.0, height.values[0] or 0.0)
        axes.plot(
            *at,
            marker=theme.MARKERS[size.style],
            color=size.color,
            markersize=9,
            linestyle="none",
            clip_on=False,
        )
        axes.annotate(
            size.letter,
            at,
            xytext=_BESIDE[size.style % len(_BESIDE)],
            textcoords="offset points",
            color=size.color,
            fontsize=_FONT,
            fontweight="bold",
            ha="center",
            va="center",
        )
    axes.margins(0.12, 0.18)
    axes.ticklabel_format(useOffset=False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure


def lines(at: Sequence[float], series: Sequence[Series], x: str, y: str) -> "Figure":
    """Lines over the same places, each with its letter at its end."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(3.0 + 0.2 * -(-len(series) // _key_columns(series)))
    for line in series:
        axes.plot(
            at,
            [float("nan") if value is None else value for value in line.values],
            color=line.color,
            marker=theme.MARKERS[line.style],
            linestyle=theme.DASHES[line.style],
            markersize=4.5,
            markevery=max(1, len(at) // 12),
            linewidth=1.6,
            label=line.key,
        )
    _scaled(axes, [value for line in series for value in line.values])
    if all(isinstance(place, int) for place in at):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _label_ends(axes, at, series)
    _key(figure, axes, series)
    return figure


def bars(categories: Sequence[str], series: Sequence[Series], y: str) -> "Figure":
    """Groups of bars, one group a category."""
    figure, axes = _axes(3.0 + 0.2 * -(-len(series) // _key_columns(series)))
    width = 0.84 / len(series)
    for index, bar in enumerate(series):
        places = [place - 0.42 + (index + 0.5) * width for place in range(len(categories))]
        axes.bar(
            places,
            [value or 0.0 for value in bar.values],
            width,
            color=theme.PAPER.light if theme.HATCHES[bar.style] else bar.color,
            edgecolor=bar.color,
            hatch=theme.HATCHES[bar.style],
            label=bar.key,
        )
    axes.set_xticks(range(len(categories)), list(categories))
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(y)
    _key(figure, axes, series)
    return figure


def stacks(
    rows: Sequence[str], parts: Sequence[Series], limits: Sequence[float | None], x: str
) -> "Figure":
    """Horizontal bars of stacked parts, the first row on top.

    Args:
        parts: the value of each part in every row.
        limits: where a row ends at most, drawn as a line; None is no limit.
    """
    figure, axes = _axes(1.3 + 0.55 * len(rows) + 0.21 * len(parts))
    left = [0.0] * len(rows)
    for part in parts:
        values = [value or 0.0 for value in part.values]
        hatch = theme.HATCHES[part.style]
        axes.barh(
            range(len(rows)),
            values,
            0.55,
            left=left,
            color=theme.PAPER.light if hatch else part.color,
            edgecolor=part.color,
            hatch=hatch,
            label=part.key,
        )
        left = [start + value for start, value in zip(left, values, strict=True)]
    for row, limit in enumerate(limits):
        if limit is not None:
            axes.plot([limit, limit], [row - 0.42, row + 0.42], color=theme.INK.light, linewidth=2)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(x)
    _key(figure, axes, parts)
    return figure


@dataclass(frozen=True)
class Grid:
    """Values by row and column, drawn as shades: the stronger, the farther from `least`.

    Attributes:
        values: rows of equal length; None leaves a cell empty.
        rows: names of the rows; columns are numbered from 0.
        least, largest: the values of no shade and of the full one; below 0 the shades mirror.
        unit: of the scale's numbers, behind them.
    """

    values: tuple[tuple[float | None, ...], ...]
    rows: tuple[str, ...]
    x: str
    y: str
    least: float
    largest: float
    unit: str = ""

    def strength(self, value: float) -> float:
        """How much of the shade a value gets, 0 to 1."""
        span = self.largest - self.least
        share = (abs(value) - self.least) / span if span > 0 else 0.0
        return round(min(1.0, max(0.0, share)), 3)


def shades(grid: Grid) -> "Figure":
    """A grid of shades and its scale. Negative cells have another colour and a minus sign."""
    height = max(1.0, 0.19 * len(grid.rows))
    figure, axes = _axes(height + 0.75)
    axes.grid(visible=False)
    signed = any(value is not None and value < 0 for row in grid.values for value in row)
    _cells(axes, grid, grid.values)
    columns = len(grid.values[0])
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(len(grid.rows) - 0.5, -0.5)
    every = max(1, -(-columns // 16))
    axes.set_xticks(range(0, columns, every))
    axes.set_yticks(
        range(len(grid.rows)), list(grid.rows), fontsize=_SMALL if height < 3 else _TINY
    )
    axes.set_xlabel(grid.x)
    axes.set_ylabel(grid.y)
    _scale(axes, grid, signed=signed)
    return figure


def _cells(axes: "Axes", grid: Grid, values: Sequence[Sequence[float | None]]) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    squares, colors = [], []
    signs: dict[str, list[tuple[int, int]]] = {theme.INK.light: [], theme.PAPER.light: []}
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is None:
                continue
            squares.append([(x + dx, y + dy) for dx, dy in _CORNERS])
            color = (theme.LESS if value < 0 else theme.SHADE).light
            strength = grid.strength(value)
            colors.append(to_rgba(color, strength))
            if value < 0 and strength >= 0.1:
                signs[(theme.PAPER if strength > 0.5 else theme.INK).light].append((x, y))
    axes.add_collection(
        PolyCollection(
            squares,
            facecolors=colors,
            edgecolors=theme.GRID.light,
            linewidths=0.4,
            clip_on=False,
        )
    )
    for color, places in signs.items():
        across, down = [x for x, _ in places], [y for _, y in places]
        axes.plot(across, down, marker="_", color=color, markersize=5, linestyle="none")


_CORNERS = ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))


def _scale(axes: "Axes", grid: Grid, *, signed: bool) -> None:
    """Five shades with their values, to the right of the grid."""
    steps = (1.0, 0.5, 0.0, -0.5, -1.0) if signed else (1.0, 0.75, 0.5, 0.25, 0.0)
    values = [grid.least + step * (grid.largest - grid.least) for step in steps]
    inset = axes.inset_axes((1.02, 0.0, 0.04, 1.0))
    _cells(inset, grid, [[value] for value in values])
    inset.set_xlim(-0.5, 0.5)
    inset.set_ylim(len(values) - 0.5, -0.5)
    inset.set_xticks([])
    labels = [f"{_figure(value)}{grid.unit}" for value in values]
    inset.set_yticks(range(len(values)), labels, fontsize=_SMALL)
    inset.yaxis.tick_right()
    _plain(inset)


def _figure(value: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _axes(height: float) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_facecolor(theme.PAPER.light)
    axes: Axes = figure.subplots()
    axes.set_facecolor(theme.PAPER.light)
    axes.grid(color=theme.GRID.light, linewidth=0.7)
    axes.set_axisbelow(True)
    _plain(axes)
    return figure, axes


def _plain(axes: "Axes") -> None:
    """Only the lines that are read, all in the theme's colours."""
    for side, spine in axes.spines.items():
        spine.set_color(theme.GRID.light)
        spine.set_visible(side in ("left", "bottom"))
    axes.tick_params(which="both", length=0, labelcolor=theme.INK.light, labelsize=_SMALL)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.INK.light)
        label.set_fontsize(_FONT)


def _scaled(axes: "Axes", values: Sequence[float | None]) -> None:
    known = [value for value in values if value is not None]
    if known and min(known) > 0 and max(known) / min(known) > _LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if _leads(value) else "")
        axes.tick_params(which="minor", labelsize=_TINY)
    elif known and min(known) >= 0:
        axes.set_ylim(bottom=0)


def _leads(value: float) -> bool:
    """Whether a mark between two powers of ten gets its number: twice or five times the lower."""
    return f"{value:.0e}"[0] in "25"


def _label_ends(axes: "Axes", at: Sequence[float], series: Sequence[Series]) -> None:
    """The letter of each line at its end; letters that would touch are moved apart."""
    to_share = (axes.transData - axes.transAxes).transform
    ends = []
    for line in series:
        known = [value for value in line.values if value is not None]
        if known:
            ends.append((float(to_share((at[-1], known[-1]))[1]), line))
    ends.sort(key=lambda end: (end[0], end[1].letter))
    heights = _apart([end for end, _ in ends])
    for height, (_, line) in zip(heights, ends, strict=True):
        axes.annotate(
            line.letter,
            (1.01, height),
            xycoords="axes fraction",
            color=line.color,
            fontsize=_FONT,
            fontweight="bold",
            va="center",
        )


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending shares of an axis, moved so that letters at them do not touch or leave its top."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + _LETTER) if moved else height)
    top = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], top)
        top = moved[index] - _LETTER
    return moved


def _key_columns(series: Sequence[Series]) -> int:
    """Short names share lines of the key."""
    return 4 if all(len(each.key) <= 8 for each in series) else 1


def _key(figure: "Figure", axes: "Axes", series: Sequence[Series]) -> None:
    """The names of the series above the chart."""
    legend = figure.legend(
        *axes.get_legend_handles_labels(),
        ncols=_key_columns(series),
        loc="outside upper left",
        frameon=False,
        fontsize=_SMALL,
        labelcolor=theme.INK.light,
        handlelength=3.2,
    )
    legend.set_in_layout(True)
