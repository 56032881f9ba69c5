"""The figures of a trace's page, and the commands that draw traces."""

import pytest

from qmix.evals.report.trace_page import trace_page, use_picture
from qmix.evals.routing.expert_use import coverage, repeats, use_counts
from qmix.evals.routing.trace import Trace, TraceHeader
from qmix.pages.page import html
from tests.support.process import qmix

HEADER = TraceHeader(layers=2, experts=4, chosen=2, model="tiny <b>")
TRACE = Trace(
    HEADER,
    (((0, 1), (2, 3)), ((0, 2), (2, 3)), ((1, 0), (3, 2))),
)


def test_uses_are_counted_by_layer_and_expert():
    assert use_counts(TRACE) == [[3, 2, 1, 0], [0, 0, 3, 3]]


def test_coverage_grows_from_nothing_to_all_by_the_most_used():
    shares = coverage(use_counts(TRACE))
    assert shares == [n / 12 for n in (0, 3, 6, 9, 11, 12, 12, 12, 12)]


def test_repeats_ignore_the_order_of_a_route():
    assert repeats(TRACE) == [2 / 4, 4 / 4]
    assert repeats(Trace(HEADER, TRACE.tokens[:1])) == [None, None]


def test_the_page_shows_them_as_tables_too():
    text = html(trace_page(TRACE, "a.trace")).decode()
    assert "tiny &lt;b&gt;: which experts" in text
    assert ">33.33<" in text
    (table,) = use_picture(TRACE).tables
    assert table.rows[0] == ("0", "50.00", "33.33", "16.67", "0.00")
    html(trace_page(Trace(HEADER, TRACE.tokens[:1]), "one token"))


@pytest.fixture
def trace(tmp_path):
    header = '{"format": "qmix-trace", "version": 1, "layers": 2, "experts": 4, "chosen": 2}'
    path = tmp_path / "a.trace"
    path.write_text(f"{header}\n0,1 2,3\n0,2 2,3\n")
    return path


def test_a_trace_is_drawn_as_its_name_says_and_nothing_is_replaced(trace, tmp_path):
    for name, start in (("a.html", b"<!DOCTYPE"), ("a.svg", b"<svg"), ("a.png", b"\x89PNG")):
        out = tmp_path / name
        result = qmix("trace", "plot", trace, "--out", out)
        assert result.returncode == 0, result.stderr
        assert str(out) in result.stderr.replace("\n", "")
        assert out.read_bytes().startswith(start)
    assert qmix("trace", "plot", trace, "--out", tmp_path / "a.svg").returncode == 2
    assert qmix("trace", "plot", trace, "--out", tmp_path / "a.svg", "--force").returncode == 0
    assert qmix("trace", "plot", tmp_path / "a.png", "--out", tmp_path / "b.svg").returncode == 3
    assert not (tmp_path / "b.svg").exists()
