"""qmix/API.md says what the docstrings say, and every public name is on it."""

import qmix
from tests.support import api_page


def test_the_page_is_in_step_with_the_docstrings():
    found = api_page.PAGE.read_text(encoding="utf-8")
    assert found == api_page.page(), "run: python -m tests.support.api_page"


def test_every_public_name_is_on_the_page():
    listed = {
        name for files in api_page.CONTENTS.values() for names in files.values() for name in names
    }
    assert set(qmix.__all__) <= listed


def test_every_argument_of_a_public_forward_is_on_the_page():
    page = api_page.page()
    for name in ("attention_mask", "past_key_values", "output_attentions", "return_dict", "labels"):
        assert f"    {name}: " in page
    assert "- `attention_mask`: (B, L + S), 0 at padding." in page
