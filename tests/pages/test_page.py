"""Pages stand alone, escape what they are given, and are the same bytes for the same figures."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from qmix.pages import charts, page, svg, theme
from qmix.pages.charts import Grid, Series
from qmix.pages.model_grids import Words, expert_picture, matrix_picture
from qmix.pages.page import Page, Picture, Quotation, Quotations, Section, Table

HOSTILE = "</text></svg><script>alert(1)</script> $x$ & \x1b[31m \u202e 模"


def series(values, style=0, name="mixtral-nf4"):
    return Series("ABCDEFGH"[style], name, style, tuple(values))


def hostile_page():
    table = Table(HOSTILE, (HOSTILE, "n"), ((HOSTILE, "1"),))
    line = charts.lines([0, 1], [series([1, 2], name=HOSTILE)], "x", HOSTILE.replace("$", ""))
    picture = Picture("one", HOSTILE, HOSTILE, HOSTILE + '" onload="', line, (table,))
    quotes = Quotations(HOSTILE, (Quotation(HOSTILE, HOSTILE, HOSTILE, (HOSTILE,)),))
    section = Section(HOSTILE, (HOSTILE,), (table, picture, quotes))
    return Page(HOSTILE, HOSTILE, ((HOSTILE, HOSTILE),), (section,))


class Tags(HTMLParser):
    """Every tag with its attributes, and the text between."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_what_a_page_is_given_stays_text():
    text = page.html(hostile_page()).decode()
    parsed = Tags(text)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert all(not name.startswith("on") for _, names in parsed.tags for name in names)
    assert not {"\x1b", "\u202e"} & set(text)
    assert parsed.text.count("<script>alert(1)</script>") > 10
    assert "模" in parsed.text
    assert "$x$" in parsed.text  # which matplotlib would read as mathematics


def test_a_page_loads_nothing_and_its_ids_are_unique():
    picture = expert_picture(Words("use", "t", "c", "a"), [[1.0, 2.0], [3.0, -1.0]], 0.0, 3.0)
    other = Picture("bars", "t", "c", "a", charts.bars(["q"], [series([1]), series([2], 1)], "y"))
    section = Section("s", (), (picture, other))
    text = page.html(Page("t", "l", (), (section,))).decode()
    parsed = Tags(text)
    ids = [names["id"] for _, names in parsed.tags if "id" in names]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert referred <= set(ids)
    outside = [names.get(a, "") for _, names in parsed.tags for a in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in outside if value)
    assert "default-src 'none'" in text


def test_pictures_follow_the_theme_and_have_words():
    text = page.html(hostile_page()).decode()
    drawn = text[text.index("<svg") : text.index("</svg>")]
    assert "var(--ink)" in drawn
    assert not re.search(r"(fill|stroke): #", drawn)
    assert 'role="img" aria-label="' in drawn
    for name, value in theme.variables("dark").items():
        assert f"{name}: {value};" in text


def test_the_same_figures_give_the_same_bytes():
    assert page.html(hostile_page()) == page.html(hostile_page())


def test_a_picture_of_its_own_is_well_formed_and_has_both_themes():
    figure = charts.stacks(
        ["device", "host"], [series([1, 2]), series([3, None], 1)], [4, None], "x"
    )
    drawn = svg.standalone(figure, HOSTILE)
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "\x1b" not in root.attrib["aria-label"]
    assert b"prefers-color-scheme: dark" in drawn
    assert svg.png(figure).startswith(b"\x89PNG")


def test_a_table_sets_figures_to_the_right_and_words_to_the_left():
    table = Table("c", ("name", "value", "maybe"), (("a", "1.5", "-"), ("b", "-2", "x")))
    assert table.numeric == (False, True, False)


def test_grids_mirror_below_zero_and_start_at_the_least():
    grid = Grid(((0.0,),), ("a",), "x", "y", 10.0, 20.0)
    assert [grid.strength(value) for value in (5, 10, 15, -20, 30)] == [0, 0, 0.5, 1, 1]
    assert Grid(((1.0,),), ("a",), "x", "y", 1.0, 1.0).strength(1.0) == 0


def test_matrices_stand_by_layer_and_in_the_model_s_order():
    experts = "model.layers.1.block_sparse_moe.experts"
    bits = {
        f"{experts}.1.w2": 4.25,
        f"{experts}.0.w1": 8.0,
        "model.layers.0.self_attn.q_proj": 4.0,
        "lm_head": 16.0,
    }
    (table,) = matrix_picture(Words("bits", "t", "c", "a"), bits, "bits").tables
    assert table.rows == (("q", "4.00", ""), ("0.w1", "", "8.00"), ("1.w2", "", "4.25"))


def test_values_far_apart_get_a_logarithmic_axis_unless_one_is_zero():
    scales = [
        charts.lines([0, 1], [series(values)], "x", "y").axes[0].get_yscale()
        for values in ((1, 100), (1, 2), (0, 100), (None, 1))
    ]
    assert scales == ["log", "linear", "linear", "linear"]


def test_letters_at_the_ends_of_lines_do_not_touch_and_stay_inside():
    heights = charts._apart([0.9, 0.95, 0.95, 0.96, 0.97, 0.98, 0.99])
    assert max(heights) <= 1
    assert min(b - a for a, b in pairwise(heights)) == pytest.approx(0.085)
    assert charts._apart([0.1, 0.5]) == [0.1, 0.5]


def test_short_names_share_lines_of_the_key():
    names = ("q", "k", "v", "o", "w1", "w2", "w3")
    short = charts.lines([0, 1], [series([1, 2], i, name=n) for i, n in enumerate(names)], "x", "y")
    long = charts.lines(
        [0, 1], [series([1, 2], i, name="long " + n) for i, n in enumerate(names)], "x", "y"
    )
    assert short.get_size_inches()[1] < long.get_size_inches()[1]


def test_large_values_of_a_scale_are_whole_numbers_and_a_logarithmic_axis_has_more_than_one():
    assert [charts._figure(value) for value in (9714, 8.125, 0.25)] == ["9,714", "8.12", "0.25"]
    figure = charts.lines([0, 1], [series([0.0021, 0.049])], "x", "y")
    figure.canvas.draw()
    shown = [label.get_text() for label in figure.axes[0].yaxis.get_minorticklabels()]
    assert {"0.005", "0.02"} <= set(shown)
