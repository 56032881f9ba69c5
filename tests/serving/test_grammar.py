"""Grammars that are none, that explode, and that are asked for again."""

import pytest
import torch

from qmix.errors import QmixError, UsageError
from qmix.serving.grammar import Grammars, inline, of_lark, of_regex, of_schema, of_text
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY
from tests.support.promptness import within

GBNF = 'root ::= "a" tail\ntail ::= [0-9]{2} | "-" tail\n'
LARK = 'start: "a" tail\ntail: /[0-9]{2}/ | "-" tail\n'


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, [2])


def accepts(grammars, tokenizer, grammar, text):
    matcher = grammars.compiled(grammar).deep_copy()
    ids = tokenizer.continued(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("text", [GBNF, LARK])
def test_grammars_of_two_syntaxes_hold(grammars, tokenizer, text):
    assert accepts(grammars, tokenizer, of_text(text), "a--07")
    assert not accepts(grammars, tokenizer, of_text(text), "a-7")


@pytest.mark.parametrize(
    "text", ["", "root ::= x", "(" * 5000, 'root ::= "a', "start: x", "start: %json {"]
)
def test_a_text_that_is_no_grammar_is_refused(grammars, text):
    with pytest.raises(UsageError, match="not a grammar"):
        grammars.compiled(of_text(text))


def wide(patterns):
    return {"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]}


COSTLY = {
    "allOf": wide(f"(a|b)*a(a|b){{{count}}}" for count in range(5, 25)),
    "multipleOf": {"type": "integer", "multipleOf": 999983},
    "patternProperties": {"patternProperties": {f"^x{i}[a-z]*$": {} for i in range(300)}},
    "product": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]}
                          for i in range(12)]},
    "itself": {"$ref": "#"},
    "circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
               "$ref": "#/$defs/a"},
    "integer": {"type": "integer", "minimum": -(10**300)},
    "unknown": {"not": {"type": "string"}},
}  # fmt: skip
SOAK = ("multipleOf", "patternProperties")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.soak if n in SOAK else ()) for n in COSTLY]
)
def test_a_schema_that_costs_too_much_is_refused_and_costs_this_process_nothing(grammars, name):
    with within(1.5), pytest.raises(UsageError, match="grammar:"):
        grammars.compiled(of_schema(COSTLY[name]))
    grammars.compiled(of_regex("a"))  # goes on


@pytest.mark.parametrize(
    "grammar",
    [
        of_regex("((((((a?){9}){9}){9}){9}){9}){9}"),
        of_regex("(a{1,1000}){1,1000}"),
        of_regex("(a|b)*a(a|b){2000}"),
        of_text("start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1} | r{i + 1}" for i in range(40))
                + '\nr40: "x" | "y"'),
        of_schema({"enum": [f"w{i:05d}" for i in range(5000)]}),
        of_schema({"type": "array", "items": {"type": "null"}, "minItems": 10**5}),
    ],
)  # fmt: skip
def test_what_explodes_word_by_word_ends_alone(grammars, grammar):
    draw = torch.Generator().manual_seed(0)
    with within(2):
        mask = grammars.mask(grammars.compiled(grammar))
        for _ in range(30):
            try:
                scores = mask(torch.zeros(1, 0), torch.zeros(1, 2048))[0]
            except QmixError:
                break
            allowed = scores.isfinite().nonzero()[:, 0].tolist()
            if allowed == [2]:
                break
            mask.advance(allowed[int(torch.randint(len(allowed), (1,), generator=draw))])


def test_a_grammar_of_late_is_not_compiled_again(grammars):
    first = grammars.compiled(of_regex("again"))
    assert grammars.compiled(of_regex("again")) is first
    for index in range(20):
        grammars.compiled(of_regex(f"other{index}"))
    assert grammars.compiled(of_regex("again")) is not first


def test_a_schema_within_a_rule_is_written_in_one_way(grammars, tokenizer):
    grammar = of_lark(f"start: {inline({'properties': {'a': {'type': 'null'}}, 'type': 'object'})}")
    assert accepts(grammars, tokenizer, grammar, '{"a": null}')
    assert not accepts(grammars, tokenizer, grammar, '{ "a":null}')
