"""Prompts turn by turn: a template's ids, the answers' own, and nothing that a user typed."""

import pytest
from tokenizers import AddedToken

from qmix.errors import CheckpointError, UsageError
from qmix.text import chat_template
from qmix.text.chat_format import InstFormat, chat_format
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.chat_templates import ALPACA, CHATML, MISTRAL_V3, TEMPLATES
from tests.support.fast_tokenizers import fast, write
from tests.support.models import TINY

ADDED = [
    AddedToken("<|im_start|>", normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
]
OWN = {"default": CHATML, "v3": MISTRAL_V3}
FIRST = Message("user", "  Tell me</s> about <|im_end|>.")


@pytest.fixture(scope="module", params=["none", "prepend"])
def tokenizer(request, tmp_path_factory):
    model = (TINY / "tokenizer.model").read_bytes()
    tokenizer = fast(model, spaces=request.param, added=ADDED)
    folder = tmp_path_factory.mktemp("format")
    write(folder, tokenizer, bos_token="<s>", eos_token="</s>")
    return LlamaTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("given", "space"), [(None, ""), ("v3", "\u2581")])
def test_the_ids_of_an_answer_stay_as_they_were_generated(tokenizer, given, space):
    """Odd ids that no text encodes to: letters and bytes one by one."""
    tokenizer.chat_template = dict(OWN)
    form = chat_format(tokenizer, given)
    first = form.prompt([FIRST])
    letters = tokenizer.convert_tokens_to_ids([*space, *"Helo", "<0x0A>", *"there"])
    assert tokenizer.encode(tokenizer.decode(letters), add_special_tokens=False) != letters
    answer = Message("assistant", "", tuple(letters))
    second = form.prompt([FIRST, answer, Message("user", "More")])
    assert second[: len(first) + len(letters)] == [*first, *letters]
    third_answer = Message("assistant", "", tuple(letters[:4]))
    conversation = [FIRST, answer, Message("user", "More"), third_answer, Message("user", "Now")]
    third = form.prompt(conversation)
    assert third[: len(second) + 4] == [*second, *letters[:4]]


@pytest.mark.parametrize("name", ["ChatML", "Mistral v3", "Llama 3", "Vicuna", "merged system"])
def test_a_prompt_is_what_the_whole_conversation_gives(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    form = chat_format(tokenizer)
    form.prompt([FIRST])
    space = " " if name in ("Mistral v3", "Vicuna") else ""
    ids = tokenizer._backend.encode(f"{space}Hello, all of it.", starts=False)
    turns = [FIRST, Message("assistant", "", tuple(ids)), Message("user", "More")]
    texts = [FIRST, Message("assistant", tokenizer.decode(ids)), Message("user", "More")]
    whole = tokenizer.apply_chat_template(texts, sanitize_control_tokens=True)
    assert tokenizer.decode(form.prompt(turns)) == tokenizer.decode(whole)


def test_what_a_user_types_is_no_control_token(tokenizer):
    tokenizer.chat_template = dict(OWN)
    ids = chat_format(tokenizer, "v3").prompt([FIRST])
    assert (ids.count(2), ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>"))) == (0, 0)


def test_the_formats_that_can_be_asked_for(tokenizer, tmp_path):
    tokenizer.chat_template = dict(OWN)
    assert chat_format(tokenizer).name == "the checkpoint's own, default"
    assert chat_format(tokenizer, "v3").name == "the checkpoint's own, v3"
    form = chat_format(tokenizer, "inst")
    assert isinstance(form, InstFormat)
    assert form.prompt([FIRST]) == chat_template.encode([FIRST], tokenizer)
    file = tmp_path / "mine.jinja"
    file.write_text("\ufeff" + ALPACA)
    form = chat_format(tokenizer, str(file))
    assert form.name == str(file)
    assert "### Response:" in tokenizer.decode(form.prompt([FIRST]))
    with pytest.raises(UsageError, match=r"--template: no such template.*default, v3, inst"):
        chat_format(tokenizer, "v4")
    file.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        chat_format(tokenizer, str(file))


def test_without_a_template_it_is_inst(tokenizer):
    tokenizer.chat_template = None
    assert chat_format(tokenizer).name == "[INST]"
