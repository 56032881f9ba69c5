"""A reply's text comes apart into what is said and what is called, however it comes in pieces."""

import json

import pytest

from qmix.serving.call_reader import CallReader

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": [1, {"b": "} \\" {"}], "ß": "☺"}}\n</tool_call>'
ARGUMENTS = '{"a": [1, {"b": "} \\" {"}], "ß": "☺"}'
LIST = '[TOOL_CALLS] [{"name": "add", "arguments": {}}, {"name": "sub", "arguments": {"x": 1}}]'


def read(text, *, size=None, opener="<tool_call>"):
    """The content, and (name, arguments) of each call, from pieces of a size."""
    reader = CallReader(opener)
    size = size or len(text) or 1
    reads = [reader.put(text[at : at + size]) for at in range(0, len(text), size)]
    pieces = [piece for each in reads for piece in each.calls]
    calls = {}
    for piece in pieces:
        if piece.id is not None:
            assert piece.index == len(calls)
            calls[piece.index] = [piece.name, ""]
        calls[piece.index][1] += piece.arguments
    assert reader.calls == len(calls)
    content = "".join(each.content for each in reads) + reader.end().content
    return content, [tuple(call) for call in calls.values()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, None])
def test_calls_are_found_in_pieces_of_any_size(size):
    assert read("Let me see." + CALL, size=size) == ("Let me see.", [("add", ARGUMENTS)])
    twice = read(f"{CALL}\n{CALL}", size=size)
    assert twice == ("", [("add", ARGUMENTS)] * 2)
    assert json.loads(ARGUMENTS)["ß"] == "☺"
    calls = [("add", "{}"), ("sub", '{"x": 1}')]
    assert read(LIST, size=size, opener="[TOOL_CALLS]") == ("", calls)


@pytest.mark.parametrize("size", [1, 5, None])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "no call",
        "a < b and <tool_cal",
        "<tool_call>",
        "<tool_call>add(1, 2)</tool_call>",
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>\n{"name": "ad',
        '{"name": "add", "arguments": {}}',
    ],
)
def test_what_is_no_call_stays_text(text, size):
    assert read(text, size=size) == (text, [])


def test_text_is_told_as_soon_as_no_call_can_begin_in_it():
    reader = CallReader("<tool_call>")
    assert reader.put("a <").content == "a "
    assert reader.put("b").content == "<b"
    assert reader.put("<tool_").content == ""
    assert reader.put("box>").content == "<tool_box>"


def test_arguments_come_in_pieces_behind_the_name():
    reader = CallReader("<tool_call>")
    (head,) = reader.put('<tool_call>{"name": "f", "arguments": {"x": ').calls
    assert (head.name, head.arguments) == ("f", '{"x": ')
    assert len(head.id) == 9
    (more,) = reader.put('"12').calls
    assert (more.index, more.id, more.name, more.arguments) == (0, None, None, '"12')
    (end,) = reader.put('3"}}</tool_call>').calls
    assert end.arguments == '3"}'
    assert reader.end().content == ""


def test_a_call_that_is_cut_keeps_what_came():
    content, calls = read('<tool_call>{"name": "f", "arguments": {"x": [1, 2')
    assert (content, calls) == ("", [("f", '{"x": [1, 2')])


def test_a_name_may_be_escaped():
    assert read('<tool_call>{"name":"a\\u0062","arguments":{}}')[1] == [("ab", "{}")]
