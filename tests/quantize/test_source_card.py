"""The license of a source's card, and cards that are hostile, huge, or none."""

import os

import pytest

from qmix.quantize.source_card import License, stated_license


def stated(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return stated_license(tmp_path)


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", License("apache-2.0")),
        ('language:\n- en\nlicense: "mit"  # as before\r', License("mit")),
        (
            "license: other\nlicense_name: my-license\nlicense_link: https://example.org/l#1",
            License("other", "my-license", "https://example.org/l#1"),
        ),
        ("license: other\nlicense_link: LICENSE", License("other")),
        ("language: en", None),
        ("license:\n- mit\n- apache-2.0", None),
        ("metadata:\n  license: mit", None),
        ('license: "<script>alert(1)</script>"', None),
        ("license: mit\\nbase_model: x", None),
        ("license: &a [*a, *a, *a]", None),
        ("license: !!python/object/apply:os.system [ls]", None),
        (f"license: {'a' * 1000}", None),
        ("license: 'mit\"", None),
    ],
)
def test_only_a_plain_identifier_is_carried(tmp_path, front, expected):
    assert stated(tmp_path, f"---\n{front}\n---\n# A model\nlicense: gpl\n") == expected


@pytest.mark.parametrize(
    "card",
    ["", "# no front matter\nlicense: mit\n", "---\nlicense: mit\n", b"---\n\xff\xfe\x00\n---\n"],
)
def test_a_card_without_front_matter_states_nothing(tmp_path, card):
    assert stated(tmp_path, card) is None


def test_a_bomb_and_a_huge_card_take_no_time_and_no_memory(tmp_path):
    bomb = "\n".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 60))
    assert stated(tmp_path, f"---\n{bomb}\nlicense: mit\n---\n") == License("mit")
    with (tmp_path / "README.md").open("r+b") as file:
        file.truncate(1 << 40)  # a hole
    assert stated_license(tmp_path) == License("mit")


def test_what_is_no_file_states_nothing(tmp_path):
    assert stated_license(tmp_path) is None
    os.mkfifo(tmp_path / "README.md")
    assert stated_license(tmp_path) is None
