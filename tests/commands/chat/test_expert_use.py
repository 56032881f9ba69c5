"""The heatmap of a reply's experts."""

from qmix.commands.chat.expert_use import heatmap


def test_shares_in_numbers_and_in_shades():
    lines = heatmap([[5, 0, 3, 0], [2, 2, 2, 2]], tokens=4).splitlines()
    assert lines[1].split() == ["layer", "0", "1", "2", "3"]
    assert lines[2].split() == ["0", "▓▓", "62", "0", "▒▒", "38", "0"]
    assert lines[-2] == "busiest: layer 0, expert 0, 62 %"
    assert lines[-1] == "silent: 2 of 8 experts"
    assert lines[0].startswith("4 tokens; ")
    assert heatmap([[1, 0]], tokens=1).startswith("1 token; ")


def test_a_line_has_at_most_80_columns_and_a_terminal_without_blocks_gets_ascii():
    for experts in (1, 8, 12, 37):
        text = heatmap([[1] * experts] * 2, tokens=3, encoding="ascii")
        assert text.isascii()
        assert max(map(len, text.splitlines())) <= 80
