"""Texts as people have them: byte-order marks, CRLF, UTF-16, a shell's pipe; what is put around."""

import hashlib
import os
import subprocess
import threading
from pathlib import Path

import pytest

from qmix.errors import CheckpointError
from qmix.evals.quality.texts import read_text
from qmix.evals.quality.windows import added_tokens
from qmix.text.tokenizer import LlamaTokenizer


def test_a_mark_and_windows_line_ends_are_dropped_and_said(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\rthree\n")
    text = read_text(path)
    assert text.content == "one\ntwo\n\rthree\n"
    assert text.changes == ("a byte-order mark was dropped", "2 line ends CRLF became LF")
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()
    kept = read_text(path, as_it_is=True)
    assert (kept.content.encode(), kept.changes) == (path.read_bytes(), ())
    path.write_bytes("one\r\n".encode("utf-16"))
    with pytest.raises(CheckpointError, match=r"UTF-16.*iconv"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(CheckpointError, match="empty"):
        read_text(path)


def test_a_pipe_is_read_if_somebody_writes_to_it(tmp_path):
    with subprocess.Popen(["printf", "hello"], stdout=subprocess.PIPE) as process:
        assert read_text(Path(f"/dev/fd/{process.stdout.fileno()}")).content == "hello"
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="a named pipe"):  # and nobody is waited for
        read_text(path)

    def write():
        while True:
            try:
                path.write_text("x" * 200_000)
                return
            except BrokenPipeError:  # the reader had gone between opening and writing
                continue

    writer = threading.Thread(target=write)
    writer.start()
    while True:
        try:
            assert read_text(path).content == "x" * 200_000
            break
        except CheckpointError:  # the writer has not come yet
            continue
    writer.join()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "BOS at the text's start only"),
        ({"add_bos_token": False}, "nothing in front"),
        ({"add_eos_token": True}, "BOS at the text's start only, </s> (2) at its end"),
    ],
)
def test_the_protocol_says_what_was_put_around_the_text(tiny, options, words):
    assert added_tokens(LlamaTokenizer.from_pretrained(tiny, **options)) == words
