"""A model that is loaded while its user types: what is said of it, and how it ends."""

import io
import threading
from contextlib import nullcontext

import pytest
from rich.console import Console

from qmix.commands.chat import command
from qmix.commands.chat.background_load import BackgroundLoad
from qmix.commands.repl import Repl, Streams
from qmix.errors import CheckpointError
from tests.support.process import PATIENCE as SECONDS
from tests.support.process import Keyboard, Terminal, small_session


class Typing:
    """A LineReader that types these lines, some of them while the model is loaded."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def read(self, prompt, default=""):
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def read_during(self, prompt, work):
        return self.read(prompt)

    def held(self):
        return nullcontext()


def chat(load, *lines):
    """What a chat says that loads its model in this way."""
    notices = io.StringIO()
    streams = Streams(
        Keyboard(), io.StringIO(), Console(file=notices, width=100, color_system=None)
    )
    command._talk(Repl(load, streams, reader=Typing(*lines)), None)
    return notices.getvalue()


def test_a_command_that_needs_no_model_does_not_wait_for_one():
    go = threading.Event()

    def load(read):
        assert go.wait(SECONDS)
        read(1, 2)  # the chat has been left: this ends it
        raise AssertionError

    loading = BackgroundLoad(load)
    closed = loading.cancel
    loading.cancel = lambda: (loading._cancelled.set(), go.set(), closed())
    assert "/regen" in chat(loading, "/help")


def test_a_message_waits_for_the_model_which_is_introduced_once():
    said = chat(BackgroundLoad(lambda read: small_session()), "/help", "Hi", "/set top_k 3", "Ho")
    assert said.index("/regen") < said.index("tiny · ") < said.index("tok/s")
    assert said.count("tiny · ") == 1


def test_a_load_that_fails_ends_the_chat_with_its_error():
    def load(read):
        raise CheckpointError("damaged", where="model.safetensors")

    with pytest.raises(CheckpointError, match="damaged"):
        chat(BackgroundLoad(load), "/stats", "Hi")


def test_a_load_tells_how_far_it_is():
    half, go = threading.Event(), threading.Event()

    def load(read):
        read(1_000_000, 2_000_000)
        half.set()
        assert go.wait(SECONDS)
        return "model"

    loading = BackgroundLoad(load)
    assert half.wait(SECONDS)
    assert loading.status()[1:] == (1_000_000, 2_000_000)
    assert loading.text().startswith("loading 2.000 MB, ")
    assert "50 %" in loading.text()
    go.set()
    assert loading.wait()
    assert loading.result() == "model"
    assert BackgroundLoad(lambda read: None, quiet=True).text() == ""


def test_a_chat_is_left_while_its_model_is_loaded(tiny, tmp_path):
    with Terminal.of("chat", tiny, XDG_STATE_HOME=str(tmp_path)) as chat:
        chat.until("loading")
        chat.until(">>>")
        chat.send("\x03")
        chat.until("Ctrl-D")
        chat.until_prompt()
        chat.send("\x04")
        assert chat.process.wait(SECONDS) == 0
