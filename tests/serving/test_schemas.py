"""Replies of the tiny model, drawn at random, hold the schemas that they were asked to follow."""

import json
from contextlib import closing

import jsonschema
import pytest

import qmix
from qmix.generation.config import GenerationConfig
from qmix.serving.engine import Engine
from qmix.serving.grammar import Grammars, of_schema
from qmix.serving.limits import Limits
from qmix.serving.request import Ended, Events, Request
from tests.support.json_schemas import json_schema
from tests.support.models import TINY

COUNT, BATCH = 300, 12
_NEW_TOKENS = 300


@pytest.fixture(scope="module")
def served():
    model, tokenizer = qmix.load(TINY, device="cpu", dtype="float32")
    limits = Limits(context=512, slots=BATCH)
    with closing(Engine(model, tokenizer, limits)) as engine:
        yield engine, tokenizer, Grammars(tokenizer, model.generation_config.eos_ids)


def replies(served, indices):
    """(schema, text, finish) for each schema, all of them running together."""
    engine, tokenizer, grammars = served
    prompt = tokenizer.encode("A document:")
    waiting = []
    for index in indices:
        schema = json_schema(index)
        config = GenerationConfig(
            max_new_tokens=_NEW_TOKENS, do_sample=True, temperature=1.2, seed=index, eos_token_id=2
        )
        mask = grammars.mask(grammars.compiled(of_schema(schema)))
        events = Events()
        engine.submit(Request(prompt, config, mask=mask), events)
        waiting.append((schema, events))
    for schema, events in waiting:
        text = ""
        for event in events:
            if isinstance(event, Ended):
                assert event.error is None, (schema, event.error)
                yield schema, text, event.finish
            else:
                text += event.text


def check(served, indices):
    """How many replies were whole; each of those holds its schema."""
    whole = 0
    for schema, text, finish in replies(served, indices):
        if finish == "stop":
            validator = jsonschema.Draft202012Validator(
                schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
            validator.validate(json.loads(text))
            whole += 1
    return whole


def test_every_whole_reply_holds_its_schema(served):
    assert check(served, range(BATCH)) >= BATCH - 1


@pytest.mark.soak
@pytest.mark.parametrize("start", range(0, COUNT, BATCH))
def test_every_whole_reply_of_three_hundred_holds_its_schema(served, start):
    assert check(served, range(start, start + BATCH)) >= BATCH - 3


def test_the_schemas_hold_every_kind_of_bound():
    text = json.dumps([json_schema(index) for index in range(COUNT)], ensure_ascii=False)
    for word in ("$ref", "anyOf", "const", "enum", "pattern", "minItems", "multipleOf", "☺",
                 "exclusiveMaximum", "format", "prefixItems", "additionalProperties"):  # fmt: skip
        assert word in text
