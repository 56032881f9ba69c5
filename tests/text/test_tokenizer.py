"""The tokenizer against sentencepiece on the real Mixtral model, and the streaming detokenizer."""

import io
import json
import os
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import CheckpointError, UsageError, WriteError
from qmix.text.detokenizer import StreamDetokenizer
from qmix.text.sentencepiece_file import MODEL_FILE
from qmix.text.tokenizer import LlamaTokenizer
from qmix.text.tokenizer_config import CONFIG_FILE
from tests.support.models import ROOT
from tests.support.process import succeeds

UDHR = ROOT.parent / "shared" / "data" / "udhr2.zip"
BYTE_0 = 3  # the id of the piece <0x00>


def real_model():
    package = pytest.importorskip("mistral_common")
    return (Path(package.__file__).parent / "data" / "tokenizer.model.v1").read_bytes()


MODEL = real_model()
TOKENIZER = LlamaTokenizer(MODEL)
ORACLE = sentencepiece.SentencePieceProcessor(model_proto=MODEL)

# U+2581 is sentencepiece's own mark for a space, and the one character that decodes to another.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
spaces = [i for i in range(32000) if set(ORACLE.id_to_piece(i)) == {"\u2581"}]
byte_ids = st.integers(BYTE_0, BYTE_0 + 255)
# Bytes that begin or continue a character meet often enough to form one.
utf8_ids = st.characters(exclude_categories=["Cs"]).map(
    lambda c: [BYTE_0 + b for b in c.encode()][: 1 + ord(c) % 4]
)
any_ids = st.lists(
    st.one_of(
        st.integers(0, 31999).map(lambda i: [i]),
        st.sampled_from([0, 1, 2, *spaces]).map(lambda i: [i]),
        byte_ids.map(lambda i: [i]),
        utf8_ids,
    ),
    max_size=30,
).map(lambda parts: [i for part in parts for i in part])


def random_text(rng):
    ranges = [
        (0, 0x80),
        (0x20, 0x7F),
        (0x80, 0x800),
        (0x3040, 0x9FFF),
        (0x1F300, 0x1FAFF),
        (0, 0x110000),
    ]
    low, high = rng.choice(ranges)
    drawn = (rng.randrange(low, high) for _ in range(rng.randrange(60)))
    kept = [chr(c) for c in drawn if not 0xD800 <= c < 0xE000 and c != 0x2581]
    for _ in range(rng.randrange(4)):
        kept.insert(rng.randrange(len(kept) + 1), rng.choice([" ", "  ", "\n", "\t", "</s>", "é"]))
    return "".join(kept)


def ordinary(text):
    """The ids of a text in which no special token is one."""
    return TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)


def streamed(ids, prompt=(), **options):
    stream = StreamDetokenizer(TOKENIZER, prompt, **options)
    return [stream.put(i) for i in ids] + [stream.end()]


def write(folder, model=MODEL, **config):
    (folder / MODEL_FILE).write_bytes(model)
    if config:
        (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def small_model(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ran after the cat"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def test_ids_are_those_of_sentencepiece_on_500_random_texts_which_come_back():
    rng = random.Random(8)
    for _ in range(500):
        text = random_text(rng)
        ids = ordinary(text)
        assert ids == ORACLE.encode(text)
        assert TOKENIZER.encode(text, split_special_tokens=True) == [1, *ids]
        assert TOKENIZER.decode(ids) == text
        assert TOKENIZER.decode([1, *ids, 2], skip_special_tokens=True) == text


@pytest.mark.skipif(not UDHR.exists(), reason=f"{UDHR} is absent")
def test_the_declaration_of_human_rights_comes_back_in_388_languages():
    with zipfile.ZipFile(UDHR) as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt")]
        for name in names:
            text = archive.read(name).decode("utf-8")
            ids = TOKENIZER.encode(text, add_special_tokens=False)
            assert TOKENIZER.decode(ids) == text, name
            assert "".join(streamed(ids)) == text, name
    assert len(names) == 388


@given(texts)
def test_every_text_comes_back(text):
    assert TOKENIZER.decode(ordinary(text)) == text


@given(st.lists(st.sampled_from(["<s>", "</s>", "<unk>", "<0x0A>", " ", "a", "\n", "[INST]"])))
def test_no_text_gives_a_control_token_if_special_tokens_are_split(parts):
    text = "".join(parts)
    ids = ordinary(text)
    assert not {0, 1, 2} & set(ids)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_the_reference_pages_ids():
    assert TOKENIZER.encode("My favourite condiment is") == [1, 1984, 16020, 2076, 2487, 349]
    assert TOKENIZER.encode("  lead", add_special_tokens=False) == [259, 1736]
    assert ordinary("</s>") == [1867, 28713, 28767]
    assert TOKENIZER.encode("</s>", add_special_tokens=False) == [2]
    assert len(TOKENIZER) == TOKENIZER.vocab_size == 32000
    assert TOKENIZER.bos_token_id == 1
    assert TOKENIZER.eos_token_id == 2
    assert TOKENIZER.unk_token_id == 0
    assert TOKENIZER.pad_token_id is None


@given(any_ids)
def test_any_ids_decode_as_sentencepiece_decodes_them(ids):
    known = [i for i in ids if i != 0]  # sentencepiece draws the unknown token as " \u2047 "
    assert TOKENIZER.decode(known, skip_special_tokens=True) == ORACLE.decode(known)


@given(any_ids, st.booleans())
def test_streamed_text_is_the_decoded_text(ids, skip):
    whole = TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(ids, skip_special_tokens=skip)) == whole


@given(any_ids, any_ids, st.booleans())
def test_streaming_goes_on_after_any_prompt(prompt, ids, skip):
    whole = TOKENIZER.decode(prompt + ids, skip_special_tokens=skip)
    before = "".join(streamed(prompt, skip_special_tokens=skip)[:-1])
    after = "".join(streamed(ids, prompt, skip_special_tokens=skip))
    assert before + after == whole


@given(texts.filter(bool))
def test_streaming_shows_no_half_characters(text):
    ids = ordinary(text)
    shown = ""
    for part in streamed(ids):
        shown += part
        assert text.startswith(shown)
    assert shown == text


@given(st.lists(byte_ids, max_size=200))
def test_streaming_keeps_at_most_three_bytes_back(ids):
    stream = StreamDetokenizer(TOKENIZER)
    for i in ids:
        stream.put(i)
        assert len(stream._waiting) <= 3


def test_an_emoji_comes_out_with_its_last_byte():
    ids = [BYTE_0 + b for b in "🦙".encode()]
    assert streamed(ids) == ["", "", "", "🦙", ""]
    assert streamed([*ids[:3], 1984]) == ["", "", "", "\ufffd\ufffd\ufffd My", ""]
    assert streamed(ids[:2]) == ["", "", "\ufffd\ufffd"]


def test_the_first_piece_keeps_its_space_only_after_a_prompt():
    assert streamed([1984, 16020]) == ["My", " favourite", ""]
    assert streamed([1984, 16020], prompt=[1, 264]) == [" My", " favourite", ""]
    assert streamed([1984, 16020], prompt=[1]) == ["My", " favourite", ""]


def test_control_tokens_are_written_where_they_stand_or_left_out():
    ids = [1, 1984, 16020, 2, 1984, 16020, 0]
    assert TOKENIZER.decode(ids) == "<s> My favourite</s> My favourite<unk>"
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "My favourite My favourite"
    assert TOKENIZER.batch_decode([ids[:3], [1984]]) == ["<s> My favourite", "My"]


def test_ids_come_as_lists_tensors_or_one_number():
    ids = [1984, 16020]
    assert TOKENIZER.decode(torch.tensor(ids)) == TOKENIZER.decode(tuple(ids)) == "My favourite"
    assert TOKENIZER.decode(torch.tensor(1984)) == TOKENIZER.decode(1984) == "My"
    assert TOKENIZER.batch_decode(torch.tensor([ids, ids])) == ["My favourite"] * 2


@pytest.mark.parametrize("ids", [[-1], [1.0], ["1"], [True], [[1, 2]], torch.ones(2, 2)])
def test_what_is_no_token_id_is_refused_with_its_range(ids):
    with pytest.raises(UsageError, match="31999"):
        TOKENIZER.decode(ids)


@pytest.mark.parametrize("token_id", [-1, 1.0, None])
def test_a_stream_refuses_what_is_no_token_id(token_id):
    with pytest.raises(UsageError, match="31999"):
        StreamDetokenizer(TOKENIZER).put(token_id)


def test_a_row_of_a_padded_embedding_has_no_text():
    stream = StreamDetokenizer(TOKENIZER)
    assert [stream.put(i) for i in (32000, 99999)] == ["", ""]


@pytest.mark.parametrize("text", ["a\ud800", "\udfff", None, b"bytes", 3])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(UsageError):
        TOKENIZER.encode(text)


def test_space_clean_up_changes_nothing_as_in_transformers_5():
    ids = ordinary("He is n't , or is he ?")
    for cleans in (True, False, None):
        text = TOKENIZER.decode(ids, clean_up_tokenization_spaces=cleans)
        assert text == "He is n't , or is he ?"


def test_ids_above_the_vocabulary_have_no_text():
    assert TOKENIZER.decode([1984, 32000, 10**6, 16020]) == "My favourite"
    assert TOKENIZER.decode(40000) == ""
    assert TOKENIZER.convert_ids_to_tokens([1984, 32000]) == ["\u2581My", None]


def test_a_call_gives_a_mapping_with_attributes():
    one = TOKENIZER("My favourite")
    assert isinstance(one, Mapping)
    assert one.input_ids == one["input_ids"] == [1, 1984, 16020]
    assert {**one} == {"input_ids": [1, 1984, 16020], "attention_mask": [1, 1, 1]}
    assert not hasattr(one, "token_type_ids")
    tensors = TOKENIZER("My favourite", return_tensors="pt")
    moved = tensors.to("meta")
    assert moved.input_ids.device.type == tensors.attention_mask.device.type == "meta"
    assert moved.input_ids.shape == (1, 3)
    assert moved.input_ids.dtype == torch.int64


def test_a_batch_is_padded_on_the_left_with_the_end_token():
    batch = TOKENIZER(["My", "My favourite"], return_tensors="pt", padding=True)
    assert batch.input_ids.tolist() == [[2, 1, 1984], [1, 1984, 16020]]
    assert batch.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert TOKENIZER(["My", "My favourite"]).input_ids == [[1, 1984], [1, 1984, 16020]]


def test_padding_can_be_changed():
    tokenizer = LlamaTokenizer(MODEL)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = "<unk>"
    batch = tokenizer(["My", "My favourite"], padding="longest", add_special_tokens=False)
    assert batch.input_ids == [[1984, 0], [1984, 16020]]
    assert batch.attention_mask == [[1, 0], [1, 1]]
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    with pytest.raises(UsageError, match="pad_token"):
        tokenizer.pad_token = "[PAD]"


def test_truncation_keeps_the_special_tokens():
    assert TOKENIZER("My favourite", truncation=True, max_length=2).input_ids == [1, 1984]
    ends = LlamaTokenizer(MODEL, {"add_eos_token": True})
    assert ends("My favourite").input_ids == [1, 1984, 16020, 2]
    assert ends("My favourite", max_length=3).input_ids == [1, 1984, 2]
    assert ends("My favourite", max_length=1).input_ids == [1, 2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"return_tensors": "tf"}, "return_tensors"),
        ({"return_tensors": "pt"}, "padding=True"),
        ({"padding": "shortest"}, "padding"),
        ({"padding": "max_length"}, "max_length"),
        ({"padding_side": "top"}, "padding_side"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": 3, "truncation": False}, "truncation"),
        ({"truncation": True}, "max_length"),
    ],
)
def test_a_wrong_option_is_named(options, named):
    with pytest.raises(UsageError, match=named):
        TOKENIZER(["My", "My favourite"], **options)


def test_the_habits_of_transformers():
    ids = [1, 1984, 16020]
    assert TOKENIZER.encode("My favourite", return_tensors="pt").tolist() == [ids]
    assert TOKENIZER.encode("My favourite", return_tensors="np").tolist() == [ids]
    assert TOKENIZER.encode("My favourite", truncation=True, max_length=2) == ids[:2]
    assert TOKENIZER("My", return_tensors="np").input_ids.dtype == "int64"
    wide = TOKENIZER("My", padding="max_length", max_length=5)
    assert (wide.input_ids, wide.attention_mask) == ([2, 2, 2, 1, 1984], [0, 0, 0, 1, 1])
    right = TOKENIZER(["My", "My favourite"], padding=True, padding_side="right")
    assert right.input_ids == [[1, 1984, 2], ids]
    eight = TOKENIZER(["My"], padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert eight.input_ids.shape == (1, 8)
    assert TOKENIZER.tokenize("My favourite") == ["\u2581My", "\u2581favourite"]
    assert TOKENIZER.pad({"input_ids": [[5], [6, 7]]}).input_ids == [[2, 5], [6, 7]]
    assert set(TOKENIZER("My", return_token_type_ids=False)) == {"input_ids", "attention_mask"}
    assert set(TOKENIZER("My", return_attention_mask=False)) == {"input_ids"}
    assert TOKENIZER.convert_ids_to_tokens(ids, skip_special_tokens=True)[0] == "\u2581My"
    assert TOKENIZER.special_tokens_map["eos_token"] == "</s>"
    assert TOKENIZER.all_special_ids == [1, 2, 0]
    assert repr(TOKENIZER).startswith("LlamaTokenizer(name_or_path=")
    assert TOKENIZER.model_max_length > 10**29
    short = LlamaTokenizer(MODEL, {"model_max_length": 2, "padding_side": "right"})
    assert short("My favourite", truncation=True).input_ids == ids[:2]
    assert short("My", padding="max_length").input_ids == [1, 1984]
    assert short(["My", ""], padding=True).input_ids[1] == [1, 2]
    assert short.add_special_tokens({"pad_token": "<unk>"}) == 0
    assert short.pad_token_id == 0
    with pytest.raises(UsageError, match="pad_token"):
        short.add_special_tokens({"pad_token": "[PAD]"})
    short.truncation_side = "left"
    assert short("My favourite", truncation=True).input_ids == [1, 16020]


def test_an_empty_batch_is_refused():
    with pytest.raises(UsageError, match="text"):
        TOKENIZER([])


def test_tokens_and_ids_name_each_other():
    assert TOKENIZER.convert_ids_to_tokens([1, 13, 1984]) == ["<s>", "<0x0A>", "\u2581My"]
    assert TOKENIZER.convert_ids_to_tokens(2) == "</s>"
    assert TOKENIZER.convert_tokens_to_ids(["<s>", "\u2581My", "no such piece"]) == [1, 1984, 0]
    assert TOKENIZER.convert_tokens_to_ids("</s>") == 2
    assert TOKENIZER.get_vocab()["\u2581My"] == 1984


def test_a_directory_or_its_file_is_read_with_its_config(tmp_path):
    write(tmp_path, add_bos_token=False, pad_token={"content": "</s>"}, some_later_key=[1])
    for path in (tmp_path, tmp_path / MODEL_FILE, str(tmp_path)):
        tokenizer = LlamaTokenizer.from_pretrained(path)
        assert tokenizer.encode("My") == [1984]
        assert tokenizer.pad_token_id == 2


def test_tokens_that_a_fine_tune_added_are_encoded_and_decoded(tmp_path):
    added = {
        "2": {"content": "</s>", "special": True},
        "32001": {"content": "<|im_start|>", "special": False},
        "32000": {"content": "<|im_end|>", "special": True},
    }
    write(tmp_path, added_tokens_decoder=added, eos_token="<|im_end|>")
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == 32000
    assert (tokenizer.vocab_size, len(tokenizer)) == (32000, 32002)
    assert tokenizer.decode([32001, 1984, 32000]) == "<|im_start|> My<|im_end|>"
    assert tokenizer.decode([32001, 1984, 32000], skip_special_tokens=True) == "<|im_start|> My"
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, 32001, 28708, 32000]
    split = tokenizer.encode("<|im_start|>a<|im_end|>", split_special_tokens=True)
    assert 32001 in split
    assert 32000 not in split


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"eos_token": 2}, "eos_token"),
        ({"eos_token": "<|im_end|>"}, "eos_token"),
        ({"pad_token": {"content": None, "id": 3}, "bos_token": {"content": 7}}, "bos_token"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"32000": "a"}}, "added_tokens_decoder.32000"),
        ({"added_tokens_decoder": {"32000": {"content": ""}}}, "added_tokens_decoder.32000"),
        ({"additional_special_tokens": "<a>"}, "additional_special_tokens"),
        ({"padding_side": "top"}, "padding_side"),
        ({"model_max_length": "long"}, "model_max_length"),
        ({"added_tokens_decoder": {"99999999": {"content": "a"}}}, "gap"),
    ],
)
def test_a_wrong_config_entry_is_named(tmp_path, config, named):
    write(tmp_path, **config)
    with pytest.raises(CheckpointError, match=named) as caught:
        LlamaTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path / CONFIG_FILE) in str(caught.value)


def test_what_is_saved_reads_back_the_same(tmp_path):
    source, target = (
        write(tmp_path, chat_template="{{x}}", auto_map={"a": "evil.py"}),
        tmp_path / "new",
    )
    tokenizer = LlamaTokenizer.from_pretrained(source)
    tokenizer.pad_token = "</s>"
    tokenizer.add_bos_token = False
    tokenizer.save_pretrained(target)
    tokenizer.save_pretrained(target)
    assert sorted(os.listdir(target)) == [MODEL_FILE, CONFIG_FILE]
    assert (target / MODEL_FILE).read_bytes() == MODEL
    document = json.loads((target / CONFIG_FILE).read_text())
    assert document["chat_template"] == "{{x}}"
    assert "auto_map" not in document
    again = LlamaTokenizer.from_pretrained(target)
    assert again.encode("My") == [1984]
    assert again.pad_token_id == 2


def test_a_missing_model_is_named_with_its_remedy(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: no such file"):
        LlamaTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        LlamaTokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a folder here nor complete in the hub's"):
        LlamaTokenizer.from_pretrained("mistralai/Mixtral-8x7B-v0.1")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / MODEL_FILE)
    with pytest.raises(CheckpointError, match="found a named pipe"):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_an_oversized_model_is_not_read(tmp_path):
    with (tmp_path / MODEL_FILE).open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(CheckpointError, match="too large"):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    write(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:dadf\nsize 493443\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_a_model_cut_anywhere_is_refused():
    rng = random.Random(3)
    tail = range(len(MODEL) - 40, len(MODEL))
    # A cut between two pieces leaves a message that the parser accepts with default settings.
    between = [at for at in range(1000) if MODEL[at] == 0x0A]
    for at in [0, *between, *(rng.randrange(len(MODEL)) for _ in range(40)), *tail]:
        with pytest.raises(CheckpointError, match=MODEL_FILE):
            LlamaTokenizer(MODEL[:at])


@given(st.binary(max_size=300))
def test_other_bytes_are_refused(data):
    with pytest.raises(CheckpointError, match=MODEL_FILE):
        LlamaTokenizer(data)


@pytest.mark.parametrize("prefix", [True, False])
def test_the_models_own_rule_for_the_leading_space_is_followed(prefix):
    model = small_model(add_dummy_prefix=prefix)
    tokenizer, oracle = (
        LlamaTokenizer(model),
        sentencepiece.SentencePieceProcessor(model_proto=model),
    )
    for text in ("the cat", " the cat", "  é", "", " ", "\n"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == oracle.encode(text)
        assert tokenizer.decode(ids) == text == oracle.decode(ids)


def test_importing_the_tokenizer_imports_no_torch():
    code = "import sys, qmix.text.tokenizer; sys.exit('torch' in sys.modules)"
    succeeds(code)


def test_the_added_tokens_of_older_fine_tunes_are_read(tmp_path):
    (tmp_path / MODEL_FILE).write_bytes(MODEL)
    (tmp_path / CONFIG_FILE).write_text('{"eos_token": "<|im_end|>"}')
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 32000, "<|im_start|>": 32001}')
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == 32000
    assert tokenizer.encode("<|im_end|>") == [1, 32000]
    assert tokenizer.decode([32000, 32001], skip_special_tokens=True) == "<|im_start|>"
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": "x"}')
    with pytest.raises(CheckpointError, match=r"added_tokens\.json"):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_from_pretrained_takes_the_options_of_transformers(tmp_path):
    write(tmp_path)
    plain = LlamaTokenizer.from_pretrained(tmp_path)
    same = LlamaTokenizer.from_pretrained(
        tmp_path, use_fast=False, legacy=True, trust_remote_code=False, revision="main"
    )
    assert same.encode("My favourite") == plain.encode("My favourite")
    right = LlamaTokenizer.from_pretrained(tmp_path, padding_side="right", pad_token="</s>")
    assert right(["My", "My favourite"], padding=True)["attention_mask"][0][-1] == 0
    assert right.pad_token_id == 2
    bare = LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=False, add_eos_token=True)
    assert bare.encode("My") == [1984, 2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"padding_sides": "left"}, "padding_sides"),
        ({"padding_side": "top"}, "padding_side"),
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"eos_token": "<|nowhere|>"}, "eos_token"),
    ],
    ids=str,
)
def test_from_pretrained_refuses_other_options_by_name(tmp_path, options, named):
    write(tmp_path)
    with pytest.raises((UsageError, CheckpointError), match=named):
        LlamaTokenizer.from_pretrained(tmp_path, **options)


def test_saving_onto_a_file_is_an_error_that_names_it(tmp_path):
    tokenizer = LlamaTokenizer.from_pretrained(write(tmp_path))
    file = tmp_path / "out"
    file.touch()
    with pytest.raises(WriteError, match=r"out: cannot be written; found File exists"):
        tokenizer.save_pretrained(file)
    assert file.read_bytes() == b""
