"""Saved conversations: what is written is read again, and nothing else is."""

import json
import os

import pytest

from qmix.commands.chat import saved_chat
from qmix.commands.chat.saved_chat import ModelIdentity, SavedChat
from qmix.errors import CheckpointError, UsageError, WriteError

MODEL = ModelIdentity("mixtral-nf4", "ab" * 32)
TURNS = (("Grüß dich\n日本", "Hallo \x1b[31m\x7f\u009b 👩\u200d💻"), ("", " x"))
CHAT = SavedChat(MODEL, "Be brief.", TURNS, {"temperature": 0.5, "seed": None})


def test_what_was_saved_is_read_and_people_can_read_it_too(tmp_path):
    path = tmp_path / "chat.json"
    saved_chat.save(path, CHAT)
    saved_chat.save(path, CHAT)  # its own file is replaced
    assert saved_chat.read(path) == CHAT
    assert os.stat(path).st_mode & 0o777 == 0o600
    text = path.read_text()
    assert "Grüß dich\\n日本" in text
    assert all(c.isprintable() or c == "\n" for c in text)


def test_nothing_but_a_saved_chat_is_replaced(tmp_path):
    other = tmp_path / "thesis.json"
    other.write_text('{"format": "thesis"}')
    for path in (other, tmp_path):
        with pytest.raises(UsageError, match="something else"):
            saved_chat.save(path, CHAT)
    assert other.read_text() == '{"format": "thesis"}'
    with pytest.raises(WriteError):
        saved_chat.save(tmp_path / "none" / "chat.json", CHAT)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "format"),
        ({"model": "mixtral"}, "model"),
        ({"model": {"name": "a"}}, "model.sha256"),
        ({"system": 3}, "system"),
        ({"settings": []}, "settings"),
        ({"messages": {}}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"messages\[0\]"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": "a"}]}, "an answer to each message"),
        ({"extra": 1}, "extra"),
    ],
    ids=str,
)
def test_what_is_no_saved_chat_is_refused_by_name(tmp_path, change, named):
    path = tmp_path / "chat.json"
    saved_chat.save(path, CHAT)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=named):
        saved_chat.read(path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'{"format": "qmix-chat"'])
def test_damaged_files_are_refused(tmp_path, data):
    path = tmp_path / "chat.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"chat\.json"):
        saved_chat.read(path)


def test_the_words_of_another_model_are_told():
    assert list(saved_chat.differences(CHAT, MODEL)) == []
    (said,) = saved_chat.differences(CHAT, ModelIdentity("mixtral-nf4", "cd" * 32))
    assert "another model of the same name" in said
    assert list(saved_chat.differences(CHAT, ModelIdentity("mixtral-nf4", ""))) == []  # a server's
    (said,) = saved_chat.differences(CHAT, ModelIdentity("other", ""))
    assert said.endswith("another model: mixtral-nf4")
