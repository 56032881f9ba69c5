"""docs/qmix.1 is what the commands say of themselves."""

import re

from tests.support import man_page


def test_the_manual_page_is_in_step_with_the_commands():
    found = man_page.PAGE.read_text(encoding="utf-8")
    assert found == man_page.text(), "run: python -m tests.support.man_page"


def test_it_has_every_command_and_option_and_only_requests_that_man_knows():
    page = man_page.text()
    for path, (command, context) in man_page.pages().items():
        if path != "qmix":
            assert f".SH {path.upper()}\n" in page
        for param in command.get_params(context):
            if param.param_type_name == "option" and param.opts != ["--help-all"]:
                assert param.opts[0].replace("-", "\\-") in page
    requests = set(re.findall(r"^\.(\w+)", page, re.MULTILINE))
    assert requests == {"TH", "SH", "SS", "TP", "PP", "B", "RS", "RE"}
    assert not re.search(r"\\(?![-e&])", page)
