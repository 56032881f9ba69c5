"""The tokenizer in a GGUF file's metadata is the one that the file was made from."""

from array import array

import pytest

from qmix.errors import CheckpointError, UnsupportedError
from qmix.text import gguf_vocabulary
from qmix.text.tokenizer import LlamaTokenizer
from qmix.text.vocabulary import model_bytes
from tests.support.gguf_files import tokenizer_metadata
from tests.support.models import TINY


@pytest.fixture(scope="module")
def metadata():
    return tokenizer_metadata()


def built(metadata):
    vocabulary = gguf_vocabulary.vocabulary(metadata, "m.gguf")
    return LlamaTokenizer(model_bytes(vocabulary), gguf_vocabulary.settings(metadata, "m.gguf"))


def test_ids_are_those_of_the_original(metadata):
    ours, theirs = built(metadata), LlamaTokenizer.from_pretrained(TINY)
    for text in ("My favourite condiment is", " Zwei\n\nWörter 🙂", "<s>[INST] x [/INST]"):
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, None)


def test_the_settings_of_the_file_are_kept(metadata):
    changes = {"bos_token_id": 2, "add_eos_token": True, "add_bos_token": False}
    changes |= {"padding_token_id": 0, "add_space_prefix": False}
    tokenizer = built(metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    assert tokenizer.bos_token_id == 2
    assert tokenizer.pad_token_id == 0
    ids = tokenizer.encode("to")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "to"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "gpt2"}, UnsupportedError, r"tokenizer\.ggml\.model.*expected 'llama'.*gpt2"),
        ({"model": None}, UnsupportedError, "found None"),
        ({"tokens": ()}, CheckpointError, "tokens.*expected 1 to"),
        ({"tokens": "text"}, CheckpointError, "tokens.*a list.*str"),
        ({"scores": None}, CheckpointError, "scores.*nothing"),
        ({"token_type": array("f", [1.0])}, CheckpointError, "token_type.*integers"),
        ({"bos_token_id": 1.5}, CheckpointError, "bos_token_id.*an id.*1.5"),
        ({"eos_token_id": 1 << 40}, CheckpointError, "eos token"),
        ({"padding_token_id": -1}, CheckpointError, "padding_token_id"),
        ({"add_bos_token": 1}, CheckpointError, "add_bos_token.*true or false"),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_key(metadata, changes, error, message):
    with pytest.raises(error, match=message):
        built(metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})


def test_the_templates_of_a_file_are_used(metadata):
    templates = {"default": "{{ messages[0].content }}!", "tool_use": "T", "ignored": "x"}
    described = gguf_vocabulary.described_templates(templates)
    assert described["tokenizer.chat_template"] == "{{ messages[0].content }}!"
    tokenizer = built(metadata | described)
    assert tokenizer.chat_templates == templates
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "Hi!"
    assert built(metadata).chat_template is None


def test_a_template_that_is_none_is_refused(metadata):
    with pytest.raises(CheckpointError, match="chat_template"):
        built(metadata | {"tokenizer.chat_template": 3})
