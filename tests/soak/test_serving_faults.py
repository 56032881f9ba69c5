"""A server as a process: killed, asked to end, out of descriptors or disk, with a lost device."""

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import ExitStack

import pytest

from qmix.evals.serving.ports import free_port
from tests.support.http_server import all_of, request, until
from tests.support.server_process import SLOW, of_session, server_process

pytestmark = pytest.mark.soak

COMPLETIONS = "/v1/completions"
LONG = {"prompt": [5], "max_tokens": 900, "temperature": 0, "stream": True}
SHORT = {"prompt": "a list", "max_tokens": 8, "temperature": 0}
SLOW_STEPS = SLOW.format(seconds=0.05)


def streaming(server, **options):
    """A connection on which a long stream has begun."""
    return server.streaming(COMPLETIONS, {**LONG, **options})


def text(server):
    status, document = server.post(COMPLETIONS, SHORT)
    assert status == 200, document
    return document["choices"][0]["text"]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_killed_server_leaves_nothing_and_starts_again_at_once(tmp_path):
    port = free_port()
    given = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    given |= {"XDG_STATE_HOME": str(tmp_path)}
    with server_process(port=port, fault=SLOW_STEPS, environment=given) as server:
        right = text(server)
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        assert server.post("/v1/chat/completions", chat)[0] == 200  # starts the templates' process
        before = files(tmp_path)
        with ExitStack() as clients:
            for _ in range(8):
                clients.enter_context(streaming(server))
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            until(lambda: not of_session(server.process.pid))
    assert files(tmp_path) == before
    with server_process(port=port, environment=given) as server:
        assert text(server) == right
    assert files(tmp_path) == before


def deaf(server):
    """A connection that asks for a long stream and never reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", server.port))
    body = json.dumps({**LONG, "logprobs": 5}).encode()
    client.sendall(request("POST", COMPLETIONS, body))
    return client


def test_sigterm_lets_short_replies_end_and_long_ones_say_so():
    with server_process(fault=SLOW_STEPS) as server, ExitStack() as clients:
        long, short, *_ = (
            clients.enter_context(client)
            for client in (
                streaming(server),
                streaming(server, max_tokens=40),
                deaf(server),
                *(server.connected() for _ in range(50)),
            )
        )
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert b'"finish_reason":"length"' in all_of(short)
        events = all_of(long)
        assert b"the server is shutting down" in events
        assert events.rpartition(b"data: ")[2].startswith(b"[DONE]")
        code, _ = server.ended()
        seconds = time.monotonic() - begun
        assert (code, seconds < 10) == (0, True), seconds


def test_a_full_disk_under_its_output_and_its_log_ends_nothing():
    with open("/dev/full", "wb") as full:
        fault = SLOW.format(seconds=0)
        options = ("--log-prompts", "/dev/full")
        with server_process(*options, fault=fault, stdout=full, stderr=full) as server:
            right = text(server)
            assert server.raw(b"\x16\x03\x01\r\n\r\n").startswith(b"HTTP/1.1 400")  # is warned of
            assert text(server) == right
            server.process.send_signal(signal.SIGTERM)
            assert server.ended()[0] == 0


@pytest.mark.parametrize("shell", ["", "ulimit -n 256;"])
def test_a_thousand_idle_connections_hold_nobody_up(shell):
    with server_process(shell=shell, stderr=subprocess.PIPE) as server:
        right = text(server)
        with ExitStack() as clients:
            stream = clients.enter_context(streaming(server))
            for number in range(1000):
                client = clients.enter_context(server.connected())
                if number % 2:
                    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: loc")
            for _ in range(5):
                assert text(server) == right
            assert b"[DONE]" in all_of(stream)
        assert text(server) == right
        server.process.send_signal(signal.SIGTERM)
        assert server.ended()[0] == 0
        said = server.process.stderr.read().decode()
        assert len(said.splitlines()) < 5, said


LOST = """
import torch
from qmix.models.causal_lm import MixtralForCausalLM
whole, steps = MixtralForCausalLM.next_logits, []
def lost(*arguments):
    steps.append(1)
    if len(steps) > 20:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    return whole(*arguments)
MixtralForCausalLM.next_logits = lost
"""


def test_a_lost_device_turns_the_health_red_and_then_ends_the_server():
    with server_process(fault=LOST, stderr=subprocess.PIPE) as server:
        with streaming(server) as client:
            events = all_of(client)
        assert b"the GPU failed" in events
        status, document = server.get("/health")
        assert (status, document["status"]) == (503, "failed")
        assert server.post(COMPLETIONS, SHORT)[0] == 503
        code, seconds = server.ended()
        assert (code, seconds < 10) == (4, True), seconds
        said = server.process.stderr.read().decode()
        assert "the GPU failed" in said
        assert "Traceback" not in said
