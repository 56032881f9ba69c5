"""qmix/API.md says what the docstrings say, and every public name is on it."""

import re

import qmix
from tests.support import api_page


def test_the_page_is_in_step_with_the_docstrings():
    found = api_page.PAGE.read_text(encoding="utf-8")
    assert found == api_page.page(), "run: python -m tests.support.api_page"


def test_every_public_name_is_on_the_page():
    listed = [
        path for files in api_page.CONTENTS.values() for path, _ in api_page.definitions(files)
    ]
    assert {f"qmix.{name}" for name in qmix.__all__} - {"qmix.errors"} <= set(listed)
    assert "qmix.errors.UsageError" in listed


def test_the_index_has_a_line_a_name_and_links_to_its_heading():
    page = api_page.page()
    index, *_ = page.partition("\n## ")
    headings = {line.removeprefix("### ") for line in page.splitlines() if line[:4] == "### "}
    links = dict(re.findall(r"^- \[(`[^`]+`)\]\(#([^)]+)\): \S.*\.$", index, re.MULTILINE))
    assert links.keys() == headings
    assert len(set(links.values())) == len(links)


def test_every_argument_of_a_public_forward_is_on_the_page():
    page = api_page.page()
    for name in ("attention_mask", "past_key_values", "output_attentions", "return_dict", "labels"):
        assert f"    {name}: " in page
    assert "- `attention_mask`: (B, L), 0 at padding; L counts past and new positions." in page
