"""`qmix serve`: what it refuses before it loads anything, and its end by a signal."""

import json
import os
import signal
import threading
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import pytest

from qmix.commands import serve
from qmix.errors import UsageError
from tests.support.process import qmix


def refused(*arguments, code=2):
    done = qmix("serve", *arguments)
    assert done.returncode == code
    assert done.stdout == ""
    return done.stderr


def test_a_model_or_the_demo_is_needed():
    assert "found neither" in refused()
    assert "found both" in refused("model", "--demo")


def test_an_address_that_others_can_call_needs_a_key(monkeypatch):
    monkeypatch.delenv("QMIX_API_KEY", raising=False)
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        assert "there is no key" in refused("--demo", "--host", host)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert serve._checked_key(host, None, None) is None


def test_a_key_comes_from_the_option_the_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.setenv("QMIX_API_KEY", "from-environment")
    assert serve._checked_key("0.0.0.0", None, None) == "from-environment"
    assert serve._checked_key("0.0.0.0", None, file) == "from-file"
    assert serve._checked_key("0.0.0.0", "given", None) == "given"
    for key in ("", "é", "a\nb", " a"):
        with pytest.raises(UsageError, match="not a key"):
            serve._checked_key("0.0.0.0", key, None)
    assert "contradict" in refused("--demo", "--api-key", "a", "--api-key-file", file)
    refused("--demo", "--api-key-file", tmp_path / "none", code=3)


def test_without_the_extra_its_name_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'qmix-runtime[serve]'" in refused("--demo", code=3)


def test_a_context_beyond_the_model_and_a_port_in_use_are_refused(free_port):
    assert "expected 16 to 1024" in refused("--demo", "--ctx", "2k")
    assert "cannot listen" in refused("--demo", "--port", free_port.getsockname()[1], code=4)


@pytest.fixture
def free_port():
    from qmix.serving.http.server import listening

    with listening("127.0.0.1", 0) as taken:
        yield taken


@dataclass
class Asked:
    """What servers answered, and their engines."""

    answers: list = field(default_factory=list)
    engines: list = field(default_factory=list)


@contextmanager
def asked_and_ended(path, body=None):
    """Servers started here are asked once, and then end themselves by SIGTERM."""
    from qmix.serving.http import server

    serve_until_a_signal, asked = server.serve, Asked()

    def served(app, engine, listener, started):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}{path}"
        request = urllib.request.Request(url, body and json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")

        def ask_and_end():
            try:
                with urllib.request.urlopen(request) as answer:
                    asked.answers.append(json.load(answer))
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=ask_and_end)
        thread.start()
        serve_until_a_signal(app, engine, listener, started)
        thread.join()
        asked.engines.append(engine)

    with mock.patch.object(server, "serve", served):
        yield asked


def test_sigterm_ends_it_with_exit_code_0():
    with asked_and_ended("/health") as asked:
        done = qmix("serve", "--demo", "--port", "0", "--slots", "2", "--ctx", "64")
    assert done.returncode == 0, done.stderr
    assert len(asked.answers) == 1
    assert not asked.engines[0].healthy
    assert "serving tiny at http://127.0.0.1:" in done.stderr
    assert "2 slots of 64 tokens" in done.stderr


def test_a_second_server_goes_on_from_the_folder_of_the_first(tmp_path):
    body = {"prompt": "def area(width, height):\n" * 4, "max_tokens": 8, "temperature": 0}
    arguments = ("--demo", "--port", 0, "--slots", 1, "--ctx", 256)
    with asked_and_ended("/v1/completions", body) as asked:
        for more in ((), ("--speculate", "off")):
            done = qmix("serve", *arguments, "--prompt-cache", tmp_path / "prompts", *more)
            assert done.returncode == 0, done.stderr
    first, second = (engine.counts for engine in asked.engines)
    assert first.restored_tokens <= 30 < second.restored_tokens == second.prompt_tokens - 1
    before, after = asked.answers
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == second.restored_tokens
    assert before["choices"][0]["text"] == after["choices"][0]["text"]


def test_a_signal_that_comes_as_it_says_that_it_serves_ends_it(monkeypatch):
    from qmix.serving.http import server

    serve_until_a_signal = server.serve

    def signalled(app, engine, listener, started):
        def ended():
            started()
            os.kill(os.getpid(), signal.SIGTERM)

        serve_until_a_signal(app, engine, listener, ended)

    monkeypatch.setattr(server, "serve", signalled)
    done = qmix("serve", "--demo", "--port", "0", "--slots", "1", "--ctx", "64")
    assert (done.returncode, done.stderr.count("serving tiny at")) == (0, 1)
