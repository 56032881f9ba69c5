"""What a picture looks like: its colours in light and in dark, and what tells series apart without.

A picture is drawn in the light colours. In a page each of them stands for a CSS variable, so that
the picture follows the page. Knows no library that draws.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Color:
    """A colour by its purpose; the two themes' values are CSS hex colours, unlike all others."""

    name: str
    light: str
    dark: str


INK = Color("ink", "#1b1f24", "#e6e8eb")
PAPER = Color("paper", "#fefefe", "#14171b")
FAINT = Color("faint", "#5c6570", "#a4adb8")
GRID = Color("grid", "#d5dae0", "#39414a")
SHADE = Color("shade", "#0b4f9c", "#8cc4ff")
LESS = Color("less", "#a34a00", "#ffb066")
# Eight colours that stay apart for the colour-blind (after Okabe and Ito), dark enough on paper.
SERIES = (
    Color("series-1", "#1b1f25", "#e6e8ec"),
    Color("series-2", "#0a62a8", "#6bb6ff"),
    Color("series-3", "#b34700", "#ff9d57"),
    Color("series-4", "#00785a", "#3fd1a4"),
    Color("series-5", "#a03a7c", "#f08fcb"),
    Color("series-6", "#7a6000", "#e5c53a"),
    Color("series-7", "#3a6f86", "#8fd3ee"),
    Color("series-8", "#5b4ab5", "#b9aaff"),
)
ALL = (INK, PAPER, FAINT, GRID, SHADE, LESS, *SERIES)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[str | tuple[float, tuple[float, ...]], ...] = (
    *("-", "--", "-.", ":"),
    *((0, (6, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 2, 2))),
)
HATCHES = ("", "//", "\\\\", "xx", "--", "||", "++", "/|")
MOST = len(SERIES)  # series that a picture tells apart


def variables(theme: str) -> Mapping[str, str]:
    """CSS variables of a theme, `light` or `dark`: name -> value."""
    return {f"--{color.name}": getattr(color, theme) for color in ALL}


def stylesheet() -> str:
    """The variables of both themes as CSS; the system's setting chooses."""

    def block(theme: str) -> str:
        return " ".join(f"{name}: {value};" for name, value in variables(theme).items())

    return (
        f":root {{ color-scheme: light dark; {block('light')} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {block('dark')} }} }}\n"
    )
