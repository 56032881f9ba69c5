"""Expressions of settings: matched as Python's `re.match` does, in a time that has a bound."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import QmixError
from qmix.formats.layouts import gptq_config
from qmix.formats.layouts.name_matcher import NameMatcher
from tests.support.packers import MODULES
from tests.support.promptness import within


def matcher(*texts):
    return NameMatcher(tuple((text, text) for text in texts), "config.json: dynamic")


ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[0-9_]", "x{", "-"])
COUNTS = st.sampled_from(["", "", "", "?", "*", "+", "{2}", "{1,2}", "{,2}", "{2,}", "*?"])


def grouped(inside):
    branches = st.lists(inside, min_size=1, max_size=3).map("|".join)
    return st.tuples(st.sampled_from(["(", "(?:"]), branches, st.sampled_from([")", ")?"])).map(
        "".join
    )


SEQUENCES = st.recursive(
    st.tuples(ATOMS, COUNTS).map("".join),
    lambda inside: st.lists(st.one_of(inside, grouped(inside)), max_size=4).map("".join),
    max_leaves=6,
)
LOOKAHEADS = st.sampled_from(["", "", "", "^", "(?!.*b$)", "(?=a)", "^(?!.*1)(?=.)"])
WHOLE = st.tuples(LOOKAHEADS, SEQUENCES, st.sampled_from(["", "$"])).map("".join)


@given(st.lists(WHOLE, max_size=4), st.lists(st.text("ab.1_x{-", max_size=8), max_size=4))
def test_the_first_match_is_that_of_python(texts, names):
    try:
        ours = matcher(*texts)
    except QmixError:  # more choices than are taken
        assert any(len(re.findall(r"[*+?{]", text)) > 3 for text in texts)
        return
    for name in names:
        found = (i for i, text in enumerate(texts) if re.match(text, name))
        assert ours.first(name) == next(found, None), (texts, name)


@pytest.mark.parametrize(
    "text",
    [
        r".*\.18\..*gate.*",
        r".*mlp\.experts\.\d+\.(gate|up)_proj",
        r"model\.layers\.(?:0|1)\.self_attn\.[qk]_proj$",
        r"^(?!.*experts).*proj$",
        r".*block_sparse_moe.gate",
        r"lm_head",
        r"\Amodel.*?w[13]\Z",
        r"(?P<start>model\.layers)\.\d{1,2}\..*w2",
    ],
)
def test_the_expressions_that_files_have(text):
    ours = matcher(text)
    for module in MODULES:
        assert (ours.first(module) == 0) == bool(re.match(text, module)), module


HOSTILE = {
    "many stars": ([".*.*.*" + ".?" * 8 + f"!{i}" for i in range(64)], "fewer repeats"),
    "a vast count": (["a{99999999999}"], "at most 64 repeats"),
    "a count with an end": (["a{1,99999999999}"], "at most 64 repeats"),
    "nothing but groups": (["(" * 5000 + ")" * 5000], "at most 1024 characters"),
    "groups in groups": (["(" * 500 + ")" * 500], "at most 16 groups in groups"),
    "repeats in repeats": ([r"(\w+\.?)+x"], "no repeated group"),
    "a counted group": (["(a|b){40}"], "no repeated group"),
    "equal alternatives": (["(a|a)" * 30 + "$"], "fewer repeats"),
    "optionals": (["a?" * 30], "fewer repeats"),
    "a back-reference": ([r"(.*)\1x"], "escapes of"),
    "a flag": (["(?i)a"], "groups"),
    "a lookbehind": (["a(?<=a)"], "groups"),
    "sets": ([f"[a{chr(1000 + i)}]" for i in range(1000)], "at most 512 different sets"),
    "long ones": (["x" * 1000 + str(i) for i in range(100)], "at most 65536 characters"),
    "many rules of stars": ([f".*a?b?c?d?e?{i}" for i in range(1024)], "less work"),
    "wide alternatives": (
        [f"({'|'.join('m' * 250)})({'|'.join('o' * 250)}).{i}" for i in range(60)],
        "less work",
    ),
}


def match_all(texts):
    ours = matcher(*texts)
    for module in MODULES:
        ours.first(module)


@pytest.mark.parametrize(("texts", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_expressions_that_explode_are_refused_within_a_second_by_key(texts, expected):
    message = rf"^config\.json: dynamic: .*expected {expected}"
    with within(1), pytest.raises(QmixError, match=message) as caught:
        match_all(texts)
    assert caught.value.exit_code == 3
    assert any(f"dynamic: {text[:20]}" in str(caught.value) for text in texts)


@pytest.mark.parametrize(
    "text", ["a(", "a)", "*a", "[a", "[z-a]", "[[a]", "\\", "a***", "a**", "(", "a{3,2}", "+"]
)
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(QmixError, match=r"^config\.json: dynamic: "):
        matcher(text)


def test_the_rules_of_gptq_are_refused_when_they_are_read():
    document = {"dynamic": {"-:" + ".*.*.*" + ".?" * 8 + "!": {}}}
    with pytest.raises(QmixError, match=r"^x\.json: dynamic: -:\.\*"):
        gptq_config.parse(document, "x.json")
