"""tests/support/house.py: imports go downward, no circles, each package has its owners."""

import ast
import sys

from tests.support import house
from tests.support.process import succeeds


def test_imports_go_downward_only():
    assert house.survey().upward == ()


def test_there_is_no_circle_of_rooms_or_files():
    assert house.survey().circles == ()


def test_every_room_says_what_it_is_for_and_what_it_does_not_know():
    for name, path in house.modules().items():
        if path.name == "__init__.py":
            text = path.read_text()
            assert text.startswith('"""'), name
    assert house.table().count("\n") == 1 + sum(map(len, house.FLOORS))


def test_the_design_page_shows_the_floors_that_are_kept():
    text = house.DESIGN.read_text()
    assert house.in_design(text) == text, "run: python -m tests.support.house --write"


def strangers(name):
    """The packages that a module imports and does not own."""
    for other in house.imported(name):
        package = other.partition(".")[0]
        if package in house.OWNERS:
            if name not in house.OWNERS[package]:
                yield package
        elif package not in (*sys.stdlib_module_names, "qmix", "torch", "pydoc_data"):
            yield package


def test_third_party_packages_stay_with_their_owners():
    found = {name: tuple(strangers(name)) for name in house.modules()}
    assert {name: packages for name, packages in found.items() if packages} == {}


def test_some_rooms_need_no_torch():
    for name in house.modules():
        if any(name == one or name.startswith(one + ".") for one in house.TORCHLESS):
            assert not any(other.partition(".")[0] == "torch" for other in house.imported(name))


def test_every_file_fits_a_few_screens():
    lines = {name: path.read_text().count("\n") for name, path in house.modules().items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_no_function_is_longer_than_sixty_lines():
    long = [
        (name, node.name)
        for name, path in house.modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert long == []


def test_importing_qmix_imports_no_torch():
    code = "import sys, qmix, qmix.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    succeeds(code)
