"""The corpus and the tokenizer trained on it: stable, split without a leak, complete."""

import sys
from itertools import islice

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import CheckpointError
from qmix.evals import corpus
from qmix.evals.training.plan import TrainingPlan
from qmix.evals.training.text_stream import TextStream, questions
from qmix.evals.training.train_tokenizer import train_tokenizer
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import ROOT
from tests.support.process import finished

LONG = corpus.PARAGRAPH_CHARS


def long_keys(documents):
    keys = {corpus.paragraph_key(p) for d in documents for p in d.paragraphs}
    return {key for key in keys if len(key) >= LONG}


def run(part, **environment):
    return finished([sys.executable, "-m", "qmix.evals.corpus", part], environment=environment)


def test_no_heldout_paragraph_occurs_in_the_training_part():
    training = long_keys(corpus.training_documents())
    heldout = long_keys(corpus.heldout_documents())
    assert len(heldout) > 400
    assert not heldout & training
    everything = "\0".join(sorted(training))
    assert [key for key in heldout if key in everything] == []


def test_every_long_paragraph_stands_once():
    documents = corpus.documents()
    keys = [corpus.paragraph_key(p) for d in documents for p in d.paragraphs]
    long = [key for key in keys if len(key) >= LONG]
    assert len(long) == len(set(long))


def test_a_twentieth_to_a_twelfth_is_held_out():
    training, heldout = len(corpus.training_text()), len(corpus.heldout_text())
    assert 1_500_000 < training + heldout < 3_000_000
    assert 1 / 20 < heldout / (training + heldout) < 1 / 12


def test_the_name_alone_decides_what_is_held_out():
    def heldout(name):
        return corpus.Document(name=name, text="").heldout

    assert heldout("topic:debugger")
    assert heldout("doc:subprocess.Popen")
    assert not heldout("topic:assert")
    assert not heldout("doc:argparse.ArgumentParser")


def test_documents_come_in_the_order_of_unique_names():
    names = [d.name for d in corpus.documents()]
    assert names == sorted(set(names))
    assert {"topic:assert", "doc:argparse.ArgumentParser", "doc:str", "doc:math.cos"} <= set(names)


def test_another_process_and_hash_seed_give_the_same_text_without_torch():
    code = (
        "import sys; from qmix.evals.corpus import main; main(); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "heldout"]
    result = finished(command, environment={"PYTHONHASHSEED": "1"})
    assert result.returncode == 0
    assert result.stdout == corpus.heldout_text()
    assert corpus.fingerprint(corpus.heldout_text()) in result.stderr


def test_the_command_refuses_another_part_in_one_line():
    result = run("test")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "corpus: name one part; expected train or heldout; found test\n"


def test_a_python_without_pydoc_topics_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    with pytest.raises(CheckpointError, match=r"no pydoc_data.*Use a full CPython"):
        corpus.documents.__wrapped__()


def test_a_python_without_library_sources_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(CheckpointError, match="sources are missing"):
        corpus.documents.__wrapped__()


@pytest.fixture(scope="module")
def tiny():
    path = ROOT / "evals" / "tiny" / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_special_ids_are_those_of_mixtral(tiny):
    assert (tiny.unk_id(), tiny.bos_id(), tiny.eos_id(), tiny.pad_id()) == (0, 1, 2, -1)
    assert tiny.get_piece_size() == 2048
    assert [tiny.id_to_piece(3 + byte) for byte in range(256)] == [
        f"<0x{b:02X}>" for b in range(256)
    ]


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_every_string_round_trips_through_the_tiny_tokenizer(tiny, text):
    assert tiny.decode(tiny.encode(text)) == text


def test_newlines_are_bytes_and_indentation_is_one_piece(tiny):
    assert tiny.encode("\n", out_type=str) == ["▁", "<0x0A>"]
    for spaces in (2, 4, 8, 16):
        # One more space is the dummy prefix of the first line or the space before the word.
        assert len(tiny.encode("x\n" + " " * spaces + "(")) == len(tiny.encode("x\n(")) + 1


def test_digits_stand_alone(tiny):
    assert tiny.encode("1984", out_type=str) == ["▁", "1", "9", "8", "4"]


def test_the_tiny_tokenizer_compresses_the_heldout_text(tiny):
    text = corpus.heldout_text()
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text
    assert len(text) / len(ids) > 2.7


def test_the_same_text_trains_the_same_tokenizer():
    text = corpus.heldout_text()
    assert train_tokenizer(text, 512) == train_tokenizer(text, 512)


def test_questions_come_from_headings_and_their_first_words():
    text = "m.f(a, b=1)\n\nAdd a\nto b.\n\nUsage\n\n  f(1)\n\nm.g()\n\nNothing."
    document = corpus.Document(name="doc:m", text=text)
    assert list(questions(document)) == [
        ("m.f", "Add a to b.\n\nUsage\n\n  f(1)"),
        ("m.g", "Nothing."),
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer((ROOT / "evals" / "tiny" / "tokenizer.model").read_bytes())


def test_training_conversations_are_one_to_three_turns_that_end(tokenizer):
    stream = TextStream(tokenizer, TrainingPlan(seed=3))
    counts = set()
    for _ in range(50):
        left = list(stream.questions[:3])
        asked = [left[-1], left[-2], left[-3]]
        ids = stream.conversation(left)
        answers = [answer for _, answer in asked[: 3 - len(left)]]
        assert ids[0] == 1
        assert ids[-1] == 2
        turns = tokenizer.decode(ids[1:-1]).split("</s>")
        for turn, answer in zip(turns, answers, strict=True):
            assert turn.lstrip().startswith("[INST] ")
            assert turn.endswith(f" [/INST] {answer}")
        counts.add(len(turns))
    assert counts == {1, 2, 3}


def test_the_same_seed_draws_the_same_batches(tokenizer):
    def first(seed):
        return [rows.tolist() for rows in TextStream(tokenizer, TrainingPlan(seed=seed)).batches(3)]

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_an_epoch_is_drawn_without_repeating_a_window(tokenizer):
    plan = TrainingPlan()
    stream = TextStream(tokenizer, plan)
    length = len(stream.epoch())
    count = (length - plan.window) // plan.window // plan.batch
    rows = [tuple(r) for b in islice(stream.batches(count), count) for r in b.tolist()]
    assert len(set(rows)) == len(rows) == count * plan.batch


def test_parts_of_the_training_text_have_no_document_in_common():
    first, second = corpus.training_parts(2)
    texts = [document.text for document in corpus.training_documents()]
    assert first.startswith(texts[0])
    assert second.startswith(texts[1])
    assert len(first) + len(second) == len(corpus.training_text()) - len(corpus.SEPARATOR) + 1
