"""Streamers: what they write, in whole characters, while a generation runs."""

import queue
from threading import Thread

import pytest
import torch

from qmix import TextIteratorStreamer, TextStreamer
from qmix.errors import UsageError
from qmix.printable import printable
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, small_model


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(TINY)


@pytest.fixture
def model(tokenizer):
    return small_model(vocab_size=len(tokenizer), num_hidden_layers=1)


def prompt(tokenizer, text="Return the"):
    return torch.tensor([tokenizer.encode(text)])


def test_what_is_written_is_the_decoded_sequence_and_a_line_end(model, tokenizer, capsys):
    ids = model.generate(prompt(tokenizer), max_new_tokens=20, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == printable(tokenizer.decode(ids[0])) + "\n"


def test_prompt_and_control_tokens_may_be_left_out(model, tokenizer, capsys):
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for _ in range(2):  # a streamer serves one generation after the other
        ids = model.generate(prompt(tokenizer), max_new_tokens=20, streamer=streamer)
        start = tokenizer.decode(prompt(tokenizer)[0], skip_special_tokens=True)
        whole = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert capsys.readouterr().out == printable(whole.removeprefix(start)) + "\n"


def test_the_bytes_of_an_unfinished_character_wait(tokenizer):
    class Recorder(TextStreamer):
        def __init__(self):
            super().__init__(tokenizer, skip_prompt=True)
            self.pieces = []

        def on_finalized_text(self, text, stream_end=False):
            self.pieces.append((text, stream_end))

    recorder = Recorder()
    recorder.put(torch.tensor([[1]]))
    for byte in "\U0001f680".encode():
        recorder.put(torch.tensor([3 + byte]))
    recorder.put(torch.tensor([3 + 0xC3]))
    recorder.end()
    assert recorder.pieces == [("\U0001f680", False), ("\ufffd", True)]


def test_an_iterator_gives_the_text_of_a_generation_in_another_thread(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    worker = Thread(
        target=model.generate,
        args=(prompt(tokenizer),),
        kwargs={"max_new_tokens": 20, "streamer": streamer},
    )
    worker.start()
    pieces = list(streamer)
    worker.join()
    model.tokenizer = tokenizer
    assert "".join(pieces) == "".join(model.stream("Return the", max_new_tokens=20))
    assert len(pieces) > 3


def test_an_iterator_that_waits_too_long_says_so(tokenizer):
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(tokenizer, timeout=0.01))


def test_several_rows_are_refused(model, tokenizer):
    batch = prompt(tokenizer).expand(2, -1)
    with pytest.raises(UsageError, match="one row"):
        model.generate(batch, max_new_tokens=2, streamer=TextStreamer(tokenizer))
    with pytest.raises(UsageError, match="one row"):
        TextStreamer(tokenizer).put(batch)
