"""docs/terminal.md: each row of its table names a test that is there."""

import re

from tests.support.models import ROOT


def test_every_row_names_a_test():
    text = (ROOT / "docs" / "terminal.md").read_text()
    rows = re.findall(r"^\|(?:[^|\n]*\|){3} (.+) \|$", text, re.MULTILINE)
    assert rows.pop(0) == "shown by"
    assert len(rows) > 20
    for shown in rows:
        if shown != "-":
            file, name = shown.strip("`").split("::")
            assert f"def {name}(" in (ROOT / file).read_text(), shown
