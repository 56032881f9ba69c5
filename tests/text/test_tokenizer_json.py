"""tokenizer.json: the ids and texts are transformers' own, for the shapes that Mixtrals have."""

import copy
import json
import pickle
import random
from pathlib import Path

import mistral_common
import pytest
from tokenizers import AddedToken, decoders

from qmix.errors import CheckpointError, UnsupportedError
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.fast_tokenizers import byte_level, fast, write
from tests.support.models import TINY

transformers = pytest.importorskip("transformers")

DATA = Path(mistral_common.__file__).parent / "data"
TINY_MODEL = (TINY / "tokenizer.model").read_bytes()
V1 = (DATA / "tokenizer.model.v1").read_bytes()
V3 = (DATA / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()

CHATML = (
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<|im_start|>", normalized=False),
)
SPACED = (
    AddedToken("hello world", normalized=False),
    AddedToken("<| two words |>", special=True, normalized=False, lstrip=True),
    AddedToken("right", normalized=False, rstrip=True),
    AddedToken("cat", normalized=False, single_word=True),
    AddedToken("der Hund", normalized=True),
    AddedToken("  ", normalized=False),
)
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _classic(folder):
    return write(folder, fast(V1), V1, legacy=True, add_bos_token=True, **CONFIG)


def _fast_only(folder):
    return write(folder, fast(TINY_MODEL, spaces="none"), tokenizer_class="TokenizersBackend")


def _chatml(folder):
    tokens = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_end|>"]}
    decoder = {"2048": {"content": "<|im_end|>", "special": True, "normalized": False}}
    decoder["2049"] = {"content": "<|im_start|>", "special": False, "normalized": False}
    tokenizer = fast(TINY_MODEL, added=CHATML[:1])
    return write(folder, tokenizer, **CONFIG | tokens, added_tokens_decoder=decoder)


def _padded(folder):
    names = [f"[PAD{index}]" for index in range(6)]
    decoder = {str(2048 + i): {"content": name, "special": True} for i, name in enumerate(names)}
    tokenizer = fast(TINY_MODEL)
    return write(folder, tokenizer, **CONFIG, pad_token="[PAD0]", added_tokens_decoder=decoder)


def _v3(folder):
    return write(folder, fast(V3, spaces="metaspace"), V3, legacy=False, **CONFIG)


def _spaced(folder):
    return write(folder, fast(TINY_MODEL, added=SPACED), **CONFIG)


SHAPES = {
    "classic": _classic,
    "fast only": _fast_only,
    "ChatML": _chatml,
    "padded": _padded,
    "v3": _v3,
    "tokens with spaces": _spaced,
}


@pytest.fixture(scope="module", params=SHAPES)
def both(request, tmp_path_factory):
    """Ours and transformers', of one folder. Where it has both files, no warning is given."""
    folder = SHAPES[request.param](tmp_path_factory.mktemp("shape") / "m")
    return LlamaTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(
        folder
    )


def random_texts(tokenizer, count):
    rng = random.Random(18)
    words = [
        "the",
        " cat",
        "right ",
        " der Hund",
        "hello world",
        "  ",
        "\n",
        "\t",
        "é",
        "你好",
        "🙂",
    ]
    words += [
        *tokenizer.get_added_vocab(),
        "[INST]",
        "[/INST]",
        "<0x0A>",
        "\u2581",
        "\u0301",
        "\r\n",
    ]
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(12)):
            if rng.random() < 0.7:
                parts.append(rng.choice(words))
            else:
                code = rng.randrange(rng.choice((0x80, 0x3000, 0x20000)))
                parts.append("x" if 0xD800 <= code < 0xE000 else chr(code))
        yield "".join(parts)


def test_2000_random_texts_have_transformers_ids(both):
    ours, theirs = both
    for text in random_texts(ours, 2000):
        ids = ours.encode(text)
        assert ids == theirs.encode(text), repr(text)
        assert len(ids) == len(ours.encode(text, add_special_tokens=False)) + len(ours._before)


def test_split_special_tokens_are_transformers(both):
    ours, theirs = both
    for text in random_texts(ours, 100):
        split = ours.encode(text, split_special_tokens=True)
        assert split == theirs.encode(text, split_special_tokens=True), repr(text)


def test_texts_decode_as_in_transformers(both):
    ours, theirs = both
    for text in random_texts(ours, 300):
        ids = ours.encode(text)
        for skip in (False, True):
            decoded = ours.decode(ids, skip_special_tokens=skip)
            assert decoded == theirs.decode(ids, skip_special_tokens=skip), repr(text)


def test_sizes_names_and_special_tokens_are_transformers(both):
    ours, theirs = both
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    names = [*list(ours.get_vocab())[:40], *ours.get_added_vocab()]
    assert ours.convert_tokens_to_ids(names) == theirs.convert_tokens_to_ids(names)
    assert ours.tokenize("the cat sat") == theirs.tokenize("the cat sat")


def test_saving_keeps_the_ids(both, tmp_path):
    ours, _ = both
    ours.save_pretrained(tmp_path)
    again = LlamaTokenizer.from_pretrained(tmp_path)
    for text in random_texts(ours, 50):
        assert again.encode(text) == ours.encode(text)
    assert again.special_tokens_map == ours.special_tokens_map
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("the cat") == ours.encode("the cat")


def test_copies_give_the_same_ids(tmp_path):
    ours = LlamaTokenizer.from_pretrained(_chatml(tmp_path))
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert again.encode("the cat</s>") == ours.encode("the cat</s>")


def test_what_goes_around_a_text_can_be_changed_and_saved(tmp_path):
    folder = write(tmp_path / "m", fast(TINY_MODEL), **CONFIG)
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=False, add_eos_token=True)
    assert tokenizer.encode("") == [2]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert LlamaTokenizer.from_pretrained(tmp_path / "saved").encode("") == [2]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.encode("the") == tokenizer.encode("the")


def test_a_file_without_a_post_processor_puts_nothing_around_a_text(tmp_path):
    folder = write(tmp_path, fast(TINY_MODEL, bos=None), **CONFIG, add_bos_token=True)
    ids = LlamaTokenizer.from_pretrained(folder).encode("the")
    assert ids == transformers.AutoTokenizer.from_pretrained(folder).encode("the")


def test_older_files_beside_it_name_the_special_tokens(tmp_path):
    write(tmp_path, fast(TINY_MODEL))
    (tmp_path / "tokenizer_config.json").unlink()
    special = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<unk>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)


def test_a_byte_level_vocabulary_is_read(tmp_path):
    folder = write(tmp_path, byte_level(), eos_token="<|end|>")
    ours = LlamaTokenizer.from_pretrained(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in random_texts(ours, 200):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )


def test_files_that_disagree_are_named_and_the_json_is_used(tmp_path):
    write(tmp_path, fast(TINY_MODEL, spaces="none"), TINY_MODEL)
    with pytest.warns(UserWarning, match=r"tokenizer\.json and tokenizer\.model disagree"):
        tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("the")[0][0] == "t"


@pytest.mark.parametrize("content", ["{}", "[]", "", "nonsense", '{"model": 3}', "\u2581" * 50])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_a_post_processor_that_names_an_unknown_token_is_refused(tmp_path):
    document = json.loads(fast(TINY_MODEL).to_str())
    document["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"post_processor.*no token '<s>'"):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_a_model_alone_finds_added_tokens_as_transformers_does(tmp_path):
    """Behind a control token, where no space is put in front: transformers drops it elsewhere."""
    shape = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<s>", "<two words>"]}
    decoder = {
        "2048": {"content": "<|im_end|>", "special": True},
        "2049": {"content": "hello world", "lstrip": True, "normalized": False},
        "2050": {"content": "cat", "single_word": True, "normalized": False},
    }
    folder = write(
        tmp_path / "m",
        fast(TINY_MODEL, spaces="none"),
        **CONFIG | shape,
        added_tokens_decoder=decoder,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere")
    (folder / "tokenizer.model").write_bytes(TINY_MODEL)
    ours = LlamaTokenizer.from_pretrained(folder)
    assert not ours.is_fast
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    for text in random_texts(ours, 500):
        assert ours.encode("<s>" + text) == theirs.encode("<s>" + text), repr(text)


def test_another_kind_of_vocabulary_is_refused_by_its_name(tmp_path):
    tokenizer = fast(TINY_MODEL)
    tokenizer.decoder = decoders.WordPiece()
    write(tmp_path, tokenizer)
    with pytest.raises(UnsupportedError, match="WordPiece"):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_a_gguf_file_needs_scores(tmp_path):
    tokenizer = LlamaTokenizer.from_pretrained(_fast_only(tmp_path))
    with pytest.raises(UnsupportedError, match=r"scores of tokenizer\.model"):
        tokenizer.vocabulary()
