"""Grids of a model's parts as pictures: layer x expert, and layer x matrix.

Knows the names of a model's weights, and neither weights nor files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qmix.formats.names import Place, place
from qmix.pages.charts import Grid, shades
from qmix.pages.page import Picture, Table


@dataclass(frozen=True)
class Words:
    """What a picture says about itself; `name` is unlike those of all others of its page."""

    name: str
    title: str
    caption: str
    alt: str


def expert_picture(
    words: Words,
    shares: Sequence[Sequence[float]],
    least: float,
    largest: float,
    unit: str = " %",
) -> Picture:
    """Layers across, experts down.

    Args:
        shares: a row a layer, of a number for each expert; negative ones are drawn apart.
        least, largest: the magnitudes of no shade and of the full one.
    """
    experts = len(shares[0])
    grid = Grid(
        values=tuple(tuple(layer[expert] for layer in shares) for expert in range(experts)),
        rows=tuple(map(str, range(experts))),
        x="layer",
        y="expert",
        least=least,
        largest=largest,
        unit=unit,
    )
    header = ("layer", *(f"expert {expert}" for expert in range(experts)))
    rows = tuple(
        (str(layer), *(f"{share:.2f}" for share in row)) for layer, row in enumerate(shares)
    )
    table = Table(f"{words.title}{f', in{unit}' if unit else ''}", header, rows)
    return Picture(words.name, words.title, words.caption, words.alt, shades(grid), (table,))


def matrix_picture(words: Words, values: Mapping[str, float], y: str) -> Picture:
    """Layers across, the matrices of a layer down, each a shade of its value.

    Args:
        values: by the name of the weight; those outside of layers are left out.
        y: what the values are.
    """
    places = {place(name): value for name, value in values.items()}
    layers = 1 + max(at.layer for at in places if at.layer is not None)
    matrices = sorted({(at.expert, at.part) for at in places if at.layer is not None}, key=_order)
    cells = tuple(
        tuple(places.get(Place(layer, expert, part)) for layer in range(layers))
        for expert, part in matrices
    )
    labels = tuple(_label(expert, part) for expert, part in matrices)
    known = [value for row in cells for value in row if value is not None]
    grid = Grid(cells, labels, "layer", "matrix", min(known), max(known))
    rows = tuple(
        (label, *("" if value is None else f"{value:.2f}" for value in row))
        for label, row in zip(labels, cells, strict=True)
    )
    table = Table(f"{words.title}: {y}", ("matrix", *map(str, range(layers))), rows)
    return Picture(words.name, words.title, words.caption, words.alt, shades(grid), (table,))


def _order(matrix: tuple[int | None, str]) -> tuple[int, int]:
    expert, part = matrix
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w3", "w2")
    return (-1 if expert is None else expert, parts.index(part) if part in parts else len(parts))


def _label(expert: int | None, part: str) -> str:
    return part.removesuffix("_proj") if expert is None else f"{expert}.{part}"
