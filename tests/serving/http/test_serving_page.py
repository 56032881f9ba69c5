"""docs/serving.md lists the fields that the code has."""

from tests.support.serving_page import PAGE, written


def test_the_page_lists_every_field():
    text = PAGE.read_text()
    assert written(text) == text, "run: python -m tests.support.serving_page"
