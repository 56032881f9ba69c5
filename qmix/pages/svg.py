"""matplotlib's figures as SVG and PNG: the same bytes each time, colours that follow the page.

Text stays text. Knows nothing of what is drawn.
"""

import html
import io
import re
import warnings
from typing import TYPE_CHECKING, Any

from qmix.pages import theme
from qmix.printable import escaped, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SETTINGS: Any = {  # matplotlib's newer versions type each key
    "svg.fonttype": "none",
    "svg.hashsalt": "qmix",  # or else ids are drawn at random
    "font.family": "DejaVu Sans",
    "hatch.linewidth": 0.7,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_REFERRED = re.compile(r'(?:url\(#|href="#)([^)"]+)')
_UNSEEN = re.compile(
    r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->|(?<=>)\s+(?=<)", re.DOTALL
)
_OF_PAGE = re.compile(r"font-family: [^;\"]*;? ?| transform=\"rotate\(-0 [^\"]*\"")
_HUNDREDTHS = re.compile(r"(\d+\.\d\d)\d+")  # of a point: a page of grids is a third smaller
# What every picture's element takes of its page.
STYLE = (
    "svg { font-family: 'DejaVu Sans', Verdana, system-ui, sans-serif; "
    "stroke-linejoin: round; stroke-linecap: butt; }"
)
_TAG = re.compile(r"<[^>]*>")  # in text, matplotlib writes &lt;
_PNG_DPI = 150


def inline(figure: "Figure", name: str, alt: str) -> str:
    """The figure as an `svg` element for a page whose stylesheet is the theme's.

    Args:
        name: unlike those of all other pictures of the page; it begins the element's ids.
        alt: what the picture shows, for those who do not see it.
    """
    document = _saved(figure)
    view = re.search(r'viewBox="[^"]*"', document)
    assert view is not None
    body = document[document.index(">", document.index("<svg")) + 1 :]
    body = _UNSEEN.sub("", body)
    referred = frozenset(_REFERRED.findall(body))
    body = _TAG.sub(lambda tag: _for_page(tag[0], name, referred), body)
    label = html.escape(escaped(alt), quote=True)
    return f'<svg role="img" aria-label="{label}" {view[0]}>{body.strip()}'


def _for_page(tag: str, name: str, referred: frozenset[str]) -> str:
    """A tag with the page's colours, and with ids of its own where they are referred to."""
    tag = re.sub(
        r' id="([^"]*)"', lambda at: f' id="{name}-{at[1]}"' if at[1] in referred else "", tag
    )
    tag = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", tag)
    tag = _HUNDREDTHS.sub(r"\1", _OF_PAGE.sub("", tag))
    for color in theme.ALL:
        tag = tag.replace(color.light, f"var(--{color.name})")
    return tag


def standalone(figure: "Figure", alt: str) -> bytes:
    """The figure as a file of its own, which follows the theme of what shows it."""
    width, height = figure.get_size_inches() * 72
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width:g}pt" height="{height:g}pt" role="img"'
    )
    style = f"<style>{theme.stylesheet()}{STYLE} svg {{ background: var(--paper); }}</style>"
    element = inline(figure, "picture", alt).replace('<svg role="img"', head, 1)
    return element.replace(">", f">{style}", 1).encode() + b"\n"


def png(figure: "Figure") -> bytes:
    """The figure as PNG, in the light colours."""
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names in scripts that the font lacks
        figure.savefig(data, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return data.getvalue()


def _saved(figure: "Figure") -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names in scripts that the font lacks
        figure.savefig(text, format="svg", metadata=_NO_METADATA, transparent=True)
    return printable(text.getvalue())
