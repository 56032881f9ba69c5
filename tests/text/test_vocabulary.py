"""A tokenizer rebuilt from its pieces encodes and decodes as the one that they came from."""

import random
from dataclasses import replace

import pytest
import sentencepiece

from qmix.errors import CheckpointError
from qmix.text import vocabulary
from qmix.text.tokenizer import LlamaTokenizer
from qmix.text.vocabulary import Vocabulary, model_bytes
from tests.support.models import TINY

TEXTS = ("", " ", "a", " two  spaces ", "\n\ttabs", "übergroß 你好 🙂", "</s> is text", "x" * 300)


@pytest.fixture(scope="module")
def original():
    return sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))


@pytest.fixture(scope="module")
def pieces(original):
    def kind(i):
        for number, asked in (
            (vocabulary.UNKNOWN, original.is_unknown),
            (vocabulary.CONTROL, original.is_control),
            (vocabulary.BYTE, original.is_byte),
        ):
            if asked(i):
                return number
        return vocabulary.NORMAL

    ids = range(original.get_piece_size())
    return Vocabulary(
        pieces=[original.id_to_piece(i) for i in ids],
        scores=[original.get_score(i) for i in ids],
        types=[kind(i) for i in ids],
        bos=original.bos_id(),
        eos=original.eos_id(),
        unk=original.unk_id(),
        space_prefix=True,
        where="model.gguf",
    )


def test_it_encodes_and_decodes_as_the_original(original, pieces):
    ours = LlamaTokenizer(model_bytes(pieces))
    theirs = LlamaTokenizer.from_pretrained(TINY)
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
    draw = random.Random(0)
    words = [theirs.pieces.texts[draw.randrange(2048)] for _ in range(4000)]
    drawn = ["".join(words[i : i + 8]) for i in range(0, 4000, 8)]
    for text in (*TEXTS, *drawn):
        text = text.replace("\ufffd", "")
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_without_a_space_prefix_no_space_is_added(pieces):
    ours = LlamaTokenizer(model_bytes(replace(pieces, space_prefix=False)))
    names = ours.convert_ids_to_tokens(ours.encode("to", add_special_tokens=False))
    assert "".join(names) == "to"
    names = LlamaTokenizer(model_bytes(pieces)).encode("to", add_special_tokens=False)
    assert ours.convert_ids_to_tokens(names) == ["▁to"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "scores.*expected 2048.*found 1"),
        ({"types": [1] * 5}, "types.*expected 2048.*found 5"),
        ({"types": [1] * 2048}, "unknown tokens.*expected one.*found 0"),
        ({"types": [2, 9] + [1] * 2046}, "type of token 1.*expected 1 to 6.*found 9"),
        ({"bos": 2048}, "bos token.*expected 0 to 2047.*found 2048"),
        ({"eos": -1}, "eos token"),
    ],
)
def test_a_damaged_vocabulary_is_refused(pieces, changes, message):
    with pytest.raises(CheckpointError, match=message):
        model_bytes(replace(pieces, **changes))
