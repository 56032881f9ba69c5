"""Grammars of replies that may or must call tools: what they let through, and what they end."""

import pytest

from qmix.serving.grammar import Grammars
from qmix.serving.tool_format import CallFormat, call_format
from qmix.serving.tools import Tool, ToolUse
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.chat_templates import CHATML, MISTRAL_TOOLS
from tests.support.models import TINY

HERMES = CallFormat("<tool_call>", "</tool_call>", False)
MISTRAL = CallFormat("[TOOL_CALLS]", "", True, 2)
COUNT = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/small"}},
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 9}},
}
FREE = Tool(name="count", parameters=COUNT)
HELD = Tool(name="counts", parameters=COUNT, strict=True)


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, [1])  # so that </s>, id 2, can stand for the token of calls


@pytest.fixture(scope="module")
def accepted(grammars, tokenizer):
    def check(text, use, form=HERMES, schema=None):
        """Whether a whole reply is let through; a token of calls stands as </s>."""
        matcher = grammars.compiled(form.grammar(use, schema)).deep_copy()
        ids = []
        for index, part in enumerate(text.split("</s>")):
            ids += [2] if index else []
            ids += tokenizer.continued(part)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


def use(*tools, **options):
    return ToolUse(shown=tools, callable=tools, **options)


def call(name="count", arguments='{"n": 3}'):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_a_free_reply_is_any_text_until_a_call_begins(accepted):
    free = use(FREE, HELD)
    for text in ("", "Hello <tool", "a\nb <tool_box> c", "Zählen: ☺"):
        assert accepted(text, free)
    for said in ("", " ", "I count.\n"):
        assert accepted(said + call(), free)
    assert accepted(call() + "\n" + call("counts"), free)
    for wrong in (
        "<tool_call>text",
        call("other"),
        call("count", "[1]"),
        call() + "and so on",
        call("counts", '{"n": 12}'),
    ):
        assert not accepted(wrong, free)
    assert accepted(call("count", '{"m": [{}]}'), free)


def test_a_reply_that_must_call_holds_every_schema(accepted):
    must = use(FREE, HELD, required=True)
    assert accepted(call(), must)
    assert accepted(" " + call("counts") + call(), must)
    for wrong in ("", "text", "so: " + call(), call("count", '{"n": 10}'), call("count", "{}")):
        assert not accepted(wrong, must)
    once = use(FREE, required=True, several=False)
    assert accepted(call(), once)
    assert not accepted(call() + call(), once)


def test_calls_of_mistral_are_one_list_behind_their_token(accepted):
    one = '{"name": "count", "arguments": {"n": 3}}'
    free = use(FREE)
    assert accepted("A text.", free, MISTRAL)
    assert accepted(f"</s> [{one}]", free, MISTRAL)
    assert accepted(f"Well</s>[{one}, {one}]", free, MISTRAL)
    assert not accepted(f"</s>[{one}, {one}]", use(FREE, several=False), MISTRAL)
    assert not accepted(f"[TOOL_CALLS] [{one}]", use(FREE, required=True), MISTRAL)
    assert not accepted(f"</s>[{one}", free, MISTRAL)


def test_a_reply_without_a_call_holds_its_own_schema(accepted):
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    assert accepted('{"a": null}', use(FREE), schema=schema)
    assert accepted(call(), use(FREE), schema=schema)
    assert not accepted("text", use(FREE), schema=schema)


def test_the_format_is_that_of_the_template(tokenizer):
    assert call_format("inst", tokenizer) == call_format(CHATML, tokenizer) == HERMES
    assert call_format(MISTRAL_TOOLS, tokenizer) == CallFormat("[TOOL_CALLS]", "", True)
    hermes = "{% for tool in tools %}<tools>{% endfor %}<tool_call>"
    assert call_format(hermes, tokenizer) == CallFormat("<tool_call>", "</tool_call>", True)
    assert call_format("{{ tools }}<|python_tag|>", tokenizer) == HERMES
