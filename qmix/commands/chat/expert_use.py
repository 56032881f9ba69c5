"""Which experts a reply went through, drawn in characters: a row a layer, a column an expert.

Knows no model: it gets counts. The shades need no colour, and the numbers no shades.
"""

from collections.abc import Sequence

from qmix.quantities import counted

_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:*#"
_WIDE = 12  # experts whose numbers fit a line of 80 columns


def heatmap(counts: Sequence[Sequence[int]], tokens: int, *, encoding: str = "utf-8") -> str:
    """The share of each layer's activations that went to each expert, in percent.

    Args:
        counts: activations, layer by layer and expert by expert.
        encoding: of the terminal; without block characters, ASCII stands for them.
    """
    experts = len(counts[0])
    even = 100 / experts
    shades = _SHADES if _encodes(_SHADES, encoding) else _ASCII_SHADES
    numbers = experts <= _WIDE
    cell = 6 if numbers else 2
    header = "layer" + "".join(f"{expert:>{cell}}" for expert in range(experts) if numbers)
    lines = [
        f"{counted(tokens, 'token')}; percent of a layer's activations, even is {even:.3g}",
        header,
    ]
    for layer, row in enumerate(counts):
        shares = [100 * count / max(sum(row), 1) for count in row]
        cells = (_cell(share, even, shades, numbers=numbers) for share in shares)
        lines.append(f"{layer:>5}" + "".join(cells))
    flat = [
        (count, layer, expert)
        for layer, row in enumerate(counts)
        for expert, count in enumerate(row)
    ]
    count, layer, expert = max(flat)
    share = 100 * count / max(sum(counts[layer]), 1)
    silent = sum(1 for each in flat if not each[0])
    lines.append(f"busiest: layer {layer}, expert {expert}, {share:.0f} %")
    lines.append(f"silent: {silent} of {len(flat)} experts")
    return "\n".join(lines)


def _cell(share: float, even: float, shades: str, *, numbers: bool) -> str:
    """A share as a shade: the darkest from three times the even share on."""
    index = 0 if not share else 1 + min(int(share / even), len(shades) - 2)
    if not numbers:
        return f" {shades[index]}"
    return f" {2 * shades[index]}{share:3.0f}"


def _encodes(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
