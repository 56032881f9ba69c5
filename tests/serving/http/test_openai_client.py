"""OpenAI's own client against a server: chats, completions, streams, and their errors."""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from qmix.generation.config import GenerationConfig
from qmix.text import chat_template
from tests.support.http_server import serving
from tests.support.promptness import within

ASK = [{"role": "user", "content": "def add(a, b):"}]


@pytest.fixture(scope="module")
def served():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def chat(client):
    def create(**options):
        given = {"model": "tiny", "messages": ASK, "max_tokens": 8, "temperature": 0, **options}
        return client.chat.completions.create(**given)

    return create


@pytest.fixture(scope="module")
def complete(client):
    def create(**options):
        given = {"model": "tiny", "prompt": "Return a", "max_tokens": 6, "temperature": 0}
        return client.completions.create(**{**given, **options})

    return create


def greedy(served, ids, new):
    config = GenerationConfig(max_new_tokens=new, eos_token_id=2)
    return served.model.generate(torch.tensor([ids]), config)[0, len(ids) :].tolist()


@torch.no_grad()
def scores(served, ids):
    return served.model(torch.tensor([ids])).logits[0].log_softmax(-1)


def chat_text(served, new=8, ask=ASK):
    return served.tokenizer.decode(greedy(served, chat_template.encode(ask, served.tokenizer), new))


def streamed(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_greedy_chat_is_what_generate_writes(served, chat):
    reply = chat()
    assert reply.choices[0].message.content == chat_text(served)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    assert reply.object == "chat.completion"


def test_a_stream_is_the_same_text_in_pieces_and_ends_with_the_usage(served, chat):
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert streamed(chunks) == chat_text(served)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert not any(c.usage for c in chat(stream=True))


def test_clients_of_one_event_loop_get_their_own_replies(served):
    asks = [[{"role": "user", "content": text}] for text in ("def add", "a list", "Return", "if x")]

    async def ask(client, messages):
        chunks = await client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=6, temperature=0, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in chunks])

    async def all_asked():
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none") as client:
            return await asyncio.gather(*(ask(client, messages) for messages in asks))

    assert asyncio.run(all_asked()) == [chat_text(served, 6, messages) for messages in asks]


def test_max_completion_tokens_counts_before_max_tokens(chat):
    assert chat(max_tokens=9, max_completion_tokens=3).usage.completion_tokens == 3


def test_a_stop_string_ends_the_reply_before_it(served, chat):
    whole = chat_text(served)
    stop = whole.split()[2]
    reply = chat(stop=[stop, "never"]).choices[0]
    assert reply.message.content == whole[: whole.index(stop)]
    assert reply.finish_reason == "stop"
    assert streamed(chat(stop=stop, stream=True)) == reply.message.content


def test_a_seed_repeats_a_sample_and_choices_differ(chat):
    options = {"temperature": 1.0, "top_p": 0.9, "n": 3, "seed": -7}
    first, second = (
        [choice.message.content for choice in chat(**options).choices] for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 3
    reply = chat(**options)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.completion_tokens == 24
    assert reply.usage.prompt_tokens == chat().usage.prompt_tokens


def test_choices_of_a_stream_carry_their_index(chat):
    options = {"temperature": 1.0, "n": 2, "seed": 5}
    texts = ["", ""]
    for chunk in chat(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in chat(**options).choices]


@pytest.mark.parametrize(
    "filters",
    [{"extra_body": {"top_k": 1}}, {"top_p": 0.0}, {"extra_body": {"min_p": 1.0}}],
    ids=["top_k", "top_p", "min_p"],
)
def test_a_filter_that_leaves_one_token_is_greedy(served, chat, filters):
    reply = chat(temperature=1.5, **filters)
    assert reply.choices[0].message.content == chat_text(served)


def test_the_default_temperature_samples(chat):
    texts = {chat(temperature=None, seed=seed).choices[0].message.content for seed in range(4)}
    assert len(texts) > 1


def test_a_bias_excludes_or_forces_a_token(served, chat):
    first = greedy(served, chat_template.encode(ASK, served.tokenizer), 1)[0]
    assert (
        not chat(logit_bias={str(first): -100})
        .choices[0]
        .message.content.startswith(served.tokenizer.decode([first]))
    )
    forced = served.tokenizer.encode("list", add_special_tokens=False)[-1]
    reply = chat(logit_bias={str(forced): 100}, logprobs=True, max_tokens=3)
    tokens = [entry.token for entry in reply.choices[0].logprobs.content]
    assert len(set(tokens)) == 1


def test_penalties_keep_a_reply_from_repeating(chat):
    def longest_run(**options):
        ids = chat(max_tokens=60, logprobs=True, **options).choices[0].logprobs.content
        return max(sum(e.token == entry.token for e in ids) for entry in ids)

    plain = longest_run()
    assert longest_run(frequency_penalty=2.0) < plain
    assert longest_run(presence_penalty=2.0) < plain
    assert longest_run(extra_body={"repetition_penalty": 3.0}) < plain


def test_log_probabilities_are_those_of_the_model(served, chat):
    content = chat(max_tokens=4, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    ids = chat_template.encode(ASK, served.tokenizer)
    new = greedy(served, ids, 4)
    right = scores(served, ids + new)[len(ids) - 1 : -1]
    for entry, index, row in zip(content, new, right, strict=True):
        assert bytes(entry.bytes).decode() == entry.token
        assert entry.logprob == pytest.approx(float(row[index]), abs=1e-4)
        values = [top.logprob for top in entry.top_logprobs]
        assert values == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert chat().choices[0].logprobs is None
    (streams,) = [
        [c.choices[0].logprobs.content[0].logprob for c in chunks if c.choices[0].logprobs]
        for chunks in [list(chat(max_tokens=4, logprobs=True, stream=True))]
    ]
    assert streams == pytest.approx([entry.logprob for entry in content], abs=1e-4)


def test_system_and_developer_messages_and_parts_of_text(chat):
    texts = [
        chat(messages=[{"role": role, "content": "Be brief."}, {"role": "user", "content": ask}])
        for role in ("system", "developer")
        for ask in ("hello there", [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}])
    ]  # fmt: skip
    assert len({reply.choices[0].message.content for reply in texts}) == 1


def test_a_final_message_is_continued(served, chat):
    begun = [*ASK, {"role": "assistant", "content": "Return the"}]
    reply = chat(messages=begun, extra_body={"continue_final_message": True})
    ids = served.tokenizer.apply_chat_template(begun, continue_final_message=True)
    whole = served.tokenizer.decode(ids + greedy(served, ids, 8))
    assert whole == served.tokenizer.decode(ids) + reply.choices[0].message.content


def test_a_completion_continues_its_prompt(served, complete):
    ids = served.tokenizer.encode("Return a")
    whole = served.tokenizer.decode(ids + greedy(served, ids, 6), skip_special_tokens=True)
    reply = complete()
    assert "Return a" + reply.choices[0].text == whole
    assert complete(prompt=ids).choices[0].text == reply.choices[0].text
    assert complete(echo=True).choices[0].text == whole
    assert complete(prompt=ids, echo=True).choices[0].text == whole
    assert "".join(c.choices[0].text for c in complete(stream=True)) == reply.choices[0].text
    assert "".join(c.choices[0].text for c in complete(echo=True, stream=True)) == whole


def test_several_prompts_have_choices_in_their_order(complete):
    prompts = ["Return a", "def f(x):", "if"]
    alone = [complete(prompt=prompt).choices[0].text for prompt in prompts]
    reply = complete(prompt=prompts)
    assert [choice.text for choice in reply.choices] == alone
    both = complete(prompt=prompts[:2], n=2)
    assert [choice.text for choice in both.choices] == [alone[0]] * 2 + [alone[1]] * 2
    assert both.usage.prompt_tokens == sum(
        complete(prompt=prompt).usage.prompt_tokens for prompt in prompts[:2]
    )


def test_echo_scores_the_prompt_as_lm_eval_asks_for_it(served, complete):
    """Its local-completions: ids, one new token, the likeliest of each, echoed."""
    ids = served.tokenizer.encode("Return a new list containing")
    choice = complete(prompt=ids, max_tokens=1, logprobs=1, echo=True).choices[0]
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(ids) + 1
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    right = scores(served, ids)
    for position, index in enumerate(ids[1:]):
        row = right[position]
        assert found.token_logprobs[position + 1] == pytest.approx(float(row[index]), abs=1e-4)
        assert max(found.top_logprobs[position + 1].values()) == pytest.approx(
            float(row.max()), abs=1e-4
        )
    words = zip(found.tokens, found.text_offset, strict=True)
    assert all(choice.text.startswith(word.lstrip(), offset) or offset == 0 or
               choice.text.startswith(word, offset) for word, offset in words if word != "<s>")  # fmt: skip
    none_new = complete(prompt=ids, max_tokens=0, logprobs=1, echo=True).choices[0]
    assert none_new.logprobs.token_logprobs[1:] == pytest.approx(
        found.token_logprobs[1:-1], abs=1e-4
    )
    assert none_new.text == served.tokenizer.decode(ids, skip_special_tokens=True)


def test_offsets_of_a_reply_alone_begin_with_it(complete):
    choice = complete(logprobs=2).choices[0]
    found = choice.logprobs
    assert found.text_offset[0] == 0
    assert all(len(top) == 2 for top in found.top_logprobs)
    ends = [*found.text_offset[1:], len(choice.text)]
    pieces = [choice.text[a:b] for a, b in zip(found.text_offset, ends, strict=True)]
    assert pieces == found.tokens


WRONG = [
    ({"messages": []}, "messages", "0 items|1 to"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "system, developer"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "list of text parts"),
    ({"messages": [*ASK, *ASK]}, "messages", "out of order"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
        "reads text",
    ),
    ({"temperature": 2.5}, "temperature", "0 to 2"),
    ({"top_p": -0.1}, "top_p", "0 to 1"),
    ({"n": 17}, "n", "1 to 16"),
    ({"n": 10**9}, "n", "1 to 16"),
    ({"max_tokens": 0}, "max_tokens", "1 to"),
    ({"max_tokens": True}, "max_tokens", "an integer"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"4096": 1}}, "logit_bias", "below 2048"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs", "0 to 20"),
    ({"stop": [""]}, "stop", "1 to 256"),
    ({"stop": ["x"] * 17}, "stop", "0 to 16"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
        "response_format",
        "not a grammar",
    ),
    ({"extra_body": {"guided_regex": "("}}, "guided_regex", "not a grammar"),
    ({"extra_body": {"guided_regex": "a" * 4097}}, "guided_regex", "4096"),
    ({"extra_body": {"guided_grammar": "start: x"}}, "guided_grammar", "not a grammar"),
    ({"extra_body": {"guided_grammar": "x" * 16385}}, "guided_grammar", "16384"),
    (
        {"extra_body": {"guided_grammar": 'start: "a"', "guided_regex": "a"}},
        "guided_grammar",
        "guided_regex or guided_grammar",
    ),
    ({"extra_body": {"best_of": 2}}, "best_of", "unrecognized"),
    ({"extra_body": {"continue_final_message": True}}, "continue_final_message", "assistant"),
    ({"stream_options": {"usage": True}}, "stream_options", "include_usage"),
]


@pytest.mark.parametrize(("options", "param", "said"), WRONG, ids=[each[1] for each in WRONG])
def test_a_wrong_field_is_refused_by_name(chat, options, param, said):
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        chat(**options)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_fields_that_change_nothing_are_accepted(chat):
    chat(
        user="me",
        metadata={"a": "b"},
        store=False,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        stop=None,
        max_tokens=1,
    )


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, 2048]}, "prompt"),
        ({"prompt": ["a"] * 69}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
    ids=str,
)
def test_a_wrong_completion_is_refused_by_name(complete, options, param):
    if param is None:  # an empty text is the begin-of-sequence id alone
        assert complete(**options).usage.prompt_tokens == 1
        return
    with pytest.raises(openai.BadRequestError) as caught:
        complete(**options)
    assert caught.value.param == param


def test_a_prompt_beyond_the_context_is_refused_and_a_reply_is_cut(chat, complete):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(messages=[{"role": "user", "content": "word " * 300}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="256"):
        complete(prompt=[5] * 256)
    reply = complete(prompt=[5] * 250, max_tokens=100, logit_bias={"2": -100})
    assert reply.usage.completion_tokens == 6
    assert reply.choices[0].finish_reason == "length"


def test_another_model_and_embeddings_are_not_here(client, chat):
    with pytest.raises(openai.NotFoundError, match="'tiny'") as caught:
        chat(model="gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="x")


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["list", "größe"]},
        "size": {"type": "integer", "minimum": 3, "maximum": 17},
        "parts": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["kind", "size", "parts"],
    "additionalProperties": False,
}


def test_replies_follow_a_schema_whatever_is_drawn(chat):
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    options = {"response_format": asked, "temperature": 1.5, "n": 4, "seed": 3, "max_tokens": 100}
    for choice in chat(**options).choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content)
        assert set(found) == {"kind", "size", "parts"}
        assert found["kind"] in ("list", "größe")
        assert 3 <= found["size"] <= 17
        assert len(found["parts"]) <= 2


def test_replies_follow_a_grammar_of_either_syntax(chat, complete):
    for text in ('start: ("ja" | "nein") "!"{1,3}', 'root ::= ("ja" | "nein") "!"{1,3}'):
        guided = {"extra_body": {"guided_grammar": text}, "max_tokens": 30}
        for reply in (
            chat(**guided).choices[0].message.content,
            complete(**guided).choices[0].text,
        ):
            assert re.fullmatch("(ja|nein)!{1,3}", reply)


def test_replies_match_a_regular_expression_to_the_first_space(chat, complete):
    guided = {"extra_body": {"guided_regex": " ?[a-c]{4}-[0-9]{2}"}, "max_tokens": 30}
    for reply in (chat(**guided).choices[0].message.content, complete(**guided).choices[0].text):
        assert re.fullmatch(" ?[a-c]{4}-[0-9]{2}", reply)
    assert chat(response_format={"type": "json_object"}).choices[0].message.content[0] == "{"


@pytest.mark.soak
def test_many_schemas_that_explode_at_once_leave_the_others_alone(served, chat):
    def bomb(number):
        patterns = [f"(a|b)*a(a|b){{{count}}}{number}" for count in range(5, 25)]
        schema = {"allOf": [{"type": "string", "pattern": each} for each in patterns]}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return served.post("/v1/chat/completions", {"messages": ASK, "response_format": form})[0]

    with ThreadPoolExecutor(12) as threads:
        bombs = [threads.submit(bomb, number) for number in range(12)]
        assert chat(max_tokens=2).choices[0].message.content
        assert not all(each.done() for each in bombs)
        assert {each.result() for each in bombs} <= {400, 429}


@pytest.mark.parametrize(
    "bomb", ["((a{1,999}){1,999}){1,999}b", "(((((a?){50}){50}){50}){50}){50}"]
)
def test_an_expression_that_explodes_costs_little(chat, bomb):
    with within(3):
        content = chat(max_tokens=3, extra_body={"guided_regex": bomb}).choices[0].message.content
    assert set(content) <= {"a", "b"}
