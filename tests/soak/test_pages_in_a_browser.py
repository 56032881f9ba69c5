"""Pages as headless Chromium shows them: light and dark, on a wide screen and on a narrow one."""

import shutil
import subprocess

import numpy as np
import pytest

from qmix.pages import charts, theme
from qmix.pages.charts import Grid, Series, shades
from qmix.pages.page import Page, Picture, Quotation, Quotations, Section, Table, html

pytestmark = pytest.mark.soak

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
HEIGHT = 4000


def series(style, values):
    return Series("ABCDEFGH"[style], f"a model with quite a long name {style}", style, values)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Every kind of picture and table, with words that are too long for a narrow screen."""
    four = [series(style, (0.1 * style, 0.3, None, 0.2)) for style in range(4)]
    grid = Grid(
        tuple((0.1 * row,) * 32 for row in range(-4, 4)), tuple("01234567"), "x", "y", 0, 0.4
    )
    figures = {
        "points": charts.points(four, four, "GB", "KL"),
        "lines": charts.lines(range(4), four, "position", "KL"),
        "bars": charts.bars(tuple("qkvo"), four, "error"),
        "stacks": charts.stacks(("device memory", "disk", "c", "d"), four, (None,) * 4, "GiB"),
        "shades": shades(grid),
    }
    wide = Table("wide", tuple(map(str, range(60))), (tuple(map(str, range(1000, 1060))),))
    pictures = [Picture(name, name, "c", "a", figure, (wide,)) for name, figure in figures.items()]
    quotes = Quotations("q", (Quotation("x" * 300, "word", "y" * 300, ("fact",)),))
    section = Section("s" * 200, ("w" * 200,), (wide, *pictures, quotes))
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_bytes(html(Page("t" * 200, "l" * 200, (("text", "f" * 200),), (section,))))
    return path


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize(("scheme", "name"), [(0, "dark"), (1, "light")])
def test_a_page_fits_its_screen_in_its_theme(page, tmp_path, width, scheme, name):
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"),
        *(f"--window-size={width},{HEIGHT}", f"--blink-settings=preferredColorScheme={scheme}"),
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    pixels = (imread(shot)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape == (HEIGHT, width, 3)
    paper = theme.variables(name)["--paper"]
    expected = [int(paper[i : i + 2], 16) for i in (1, 3, 5)]
    blank = (pixels == expected).all(-1)
    margin = 12  # of the 16 pixels that the page leaves at each side
    assert blank[:, :margin].all()
    assert blank[:, -margin:].all(), "something is wider than the screen"
    inked = np.flatnonzero(~blank.all(1))
    assert len(inked) > 1000
