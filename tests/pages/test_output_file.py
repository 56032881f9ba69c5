"""Names of pages are refused before the work, and pictures follow their names."""

import pytest

from qmix.errors import UsageError
from qmix.pages import charts, output_file
from qmix.pages.charts import Series


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("report.pdf", "not a name"),
        ("report", "not a name"),
        ("missing/report.html", "no such folder"),
        ("folder.html", "a folder has this name"),
        ("there.html", "the file exists"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused(tmp_path, name, found):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "there.html").write_text("kept")
    with pytest.raises(UsageError, match=found):
        output_file.check(tmp_path / name, (output_file.PAGE,), force=False)
    assert (tmp_path / "there.html").read_text() == "kept"


def test_force_allows_an_existing_file_and_no_folder(tmp_path):
    (tmp_path / "there.HTML").write_text("old")
    output_file.check(tmp_path / "there.HTML", (output_file.PAGE,), force=True)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match="a folder"):
        output_file.check(tmp_path / "folder.html", (output_file.PAGE,), force=True)


def test_a_picture_is_what_its_name_says(tmp_path):
    figure = charts.bars(["q"], [Series("A", "a", 0, (1.0,))], "y")
    for name, start in (("a.svg", b"<svg xmlns"), ("a.PNG", b"\x89PNG")):
        output_file.write_picture(tmp_path / name, figure, "a bar")
        assert (tmp_path / name).read_bytes().startswith(start)
